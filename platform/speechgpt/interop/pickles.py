"""A pickle machine that makes plain data and calls nothing.

Python's own unpickler calls what a pickle names, with what it gives; an allow-list in front of it still leaves methods
(`__setstate__`, `__reduce__` products) and attributes within reach. This machine interprets the opcodes itself: a
global is only a name, looked up in a table of functions of ours, and everything else becomes a list, dict, number,
string, array, tensor, or a `Record` that has a class's name and no behaviour. A name that is not in the table is
refused.
"""

import pickletools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn, cast

from speechgpt.interop.source import Source

MAX_OPERATIONS = 20_000_000
"""Steps of one pickle: a byte may make an object of sixty, so that a small file could fill the memory otherwise."""


class PickleError(ValueError):
    """Bytes that are no pickle, or not all of one."""


class RefusedError(PickleError):
    """A pickle that asks for more than data."""


@dataclass(frozen=True)
class Name:
    """A global that a pickle named. It is never looked up in any module."""

    path: str
    """`module.name`."""

    def __str__(self) -> str:
        return self.path


@dataclass(eq=False)
class Record:
    """What is left of an object of a foreign class: its name, arguments, attributes and items."""

    kind: str
    args: tuple = ()
    state: Any = None
    items: dict = field(default_factory=dict)


class Unbuilt(ABC):
    """A value that is known only with its state (an array's shape, type and bytes)."""

    @abstractmethod
    def build(self, state: Any, source: Source) -> Any:
        """The value. `source` stands right after the state; joblib writes an array's bytes there."""


Makers = Mapping[str, Callable[..., Any]]
"""What stands for a call of a global: {module.name: a function of ours of the call's arguments}."""


@dataclass(frozen=True)
class Allowed:
    """The names that a pickle may say."""

    makers: Makers
    is_record: Callable[[str], bool]
    """Names of classes of which only the data is kept."""
    is_mere_name: Callable[[str], bool]
    """Names that may stand as values (types in a configuration) but not be called."""

    def __contains__(self, path: str) -> bool:
        return path in self.makers or self.is_record(path) or self.is_mere_name(path)


def load(source: Source, allowed: Allowed, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle and leave `source` after its end. `persistent` turns a persistent id into a value.

    Raises RefusedError naming what was asked for, PickleError for bytes that are no whole pickle.
    """
    machine = _Machine(source, allowed, persistent)
    step, at = "start", source.position
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(cast(IO[bytes], source))):
            step, at = opcode.name, position or 0
            if count >= MAX_OPERATIONS:
                raise RefusedError(f"more than {MAX_OPERATIONS} operations")
            machine.do(step, argument)
        return machine.result()
    except PickleError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise PickleError(f"damaged, or no pickle ({step} at byte {at}: {error})") from None


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_NOTHING_TO_DO = {"PROTO", "FRAME", "STOP"}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class _Machine:
    def __init__(self, source: Source, allowed: Allowed, persistent: Callable[[Any], Any] | None) -> None:
        self.source, self.allowed, self.persistent = source, allowed, persistent
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        # Places in the memo of each value that is still to be built.
        self.waiting: dict[int, list[int]] = {}

    def result(self) -> Any:
        (value,) = self.stack
        return value

    def do(self, step: str, argument: Any) -> None:
        if step in _LITERALS:
            self.stack.append(argument)
        elif step in _CONSTANTS:
            self.stack.append(_CONSTANTS[step]())
        elif step not in _NOTHING_TO_DO:
            action = getattr(self, f"_{step.lower()}", None)
            if action is None:
                raise RefusedError(f"the operation {step} {'' if argument is None else argument}".rstrip())
            action(argument)

    # Stack and memo.

    def _mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _put(self, index: int) -> None:
        value = self.stack[-1]
        self.memo[index] = value
        if isinstance(value, Unbuilt):
            self.waiting.setdefault(id(value), []).append(index)

    def _memoize(self, _: Any) -> None:
        self._put(len(self.memo))

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _binput = _long_binput = _put
    _binget = _long_binget = _get

    # Containers.

    def _tuple(self, _: Any) -> None:
        self._push_last(tuple(self._since_mark()))

    def _tuple1(self, _: Any) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _list(self, _: Any) -> None:
        self._push_last(self._since_mark())

    def _dict(self, _: Any) -> None:
        made: dict = {}
        _put_pairs(made, self._since_mark())
        self._push_last(made)

    def _frozenset(self, _: Any) -> None:
        self._push_last(frozenset(map(key, self._since_mark())))

    def _push_last(self, value: Any) -> None:
        self.stack.append(value)

    def _append(self, _: Any) -> None:
        value = self.stack.pop()
        self._target(list).append(value)

    def _appends(self, _: Any) -> None:
        values = self._since_mark()
        self._target(list).extend(values)

    def _additems(self, _: Any) -> None:
        values = self._since_mark()
        self._target(set).update(map(key, values))

    def _setitem(self, _: Any) -> None:
        pair = [self.stack.pop(-2), self.stack.pop()]
        _put_pairs(self._items(), pair)

    def _setitems(self, _: Any) -> None:
        pairs = self._since_mark()
        _put_pairs(self._items(), pairs)

    def _items(self) -> dict:
        target = self.stack[-1]
        return target.items if isinstance(target, Record) else self._target(dict)

    def _target(self, kind: type) -> Any:
        target = self.stack[-1]
        if not isinstance(target, kind):
            raise RefusedError(f"items are put into {_described(target)}, which is no {kind.__name__}")
        return target

    # Names and calls.

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self._named(module, name))

    def _stack_global(self, _: Any) -> None:
        module, name = self.stack[-2:]
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedError("a global whose name is no text")
        self.stack[-2:] = [self._named(module, name)]

    def _named(self, module: str, name: str) -> Name:
        path = f"{_PYTHON_2.get(module, module)}.{name}"
        if path not in self.allowed:
            raise RefusedError(f"it asks for {path}")
        return Name(path)

    def _reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], arguments)

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        if named := self.stack.pop():
            raise RefusedError(f"a call of {_described(self.stack[0])} with named arguments {named!r:.80}")
        self._reduce(None)

    def _inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        arguments = tuple(self._since_mark())
        self.stack.append(self._made(self._named(module, name), arguments))

    def _obj(self, _: Any) -> None:
        called, *arguments = self._since_mark()
        self.stack.append(self._made(called, tuple(arguments)))

    def _made(self, called: Any, arguments: Any) -> Any:
        if not isinstance(called, Name):
            raise RefusedError(f"a call of {_described(called)}")
        if not isinstance(arguments, tuple):
            raise RefusedError(f"a call of {called} with {_described(arguments)} for arguments")
        if called.path in ("copyreg._reconstructor", "copyreg.__newobj__"):
            # Both make an object of their first argument, without a call of its class.
            called, arguments = arguments[0], () if called.path.endswith("tor") else arguments[1:]
            if not isinstance(called, Name):
                raise RefusedError(f"an object of {_described(called)}")
        if maker := self.allowed.makers.get(called.path):
            return maker(*arguments)
        if self.allowed.is_record(called.path):
            return Record(called.path, arguments)
        raise RefusedError(f"it calls {called}")

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, Unbuilt):
            built = self.stack[-1] = target.build(state, self.source)
            for index in self.waiting.pop(id(target), ()):
                self.memo[index] = built
        elif not isinstance(target, dict):
            # An OrderedDict's attributes are torch's notes on module versions, which nothing here reads.
            raise RefusedError(f"attributes are set on {_described(target)}")

    def _persid(self, identity: Any) -> None:
        if self.persistent is None:
            self._no_persistent()
        else:
            self.stack.append(self.persistent(identity))

    def _binpersid(self, _: Any) -> None:
        self._persid(self.stack.pop())

    def _no_persistent(self) -> NoReturn:
        raise RefusedError("it refers to objects outside itself")


def key(value: Any) -> Hashable:
    """A dict key or set member. Text, numbers, bytes, and flat tuples of them: the hash of a deeply nested tuple would
    overrun the C stack. Raises RefusedError for anything else.
    """
    plain = (str, int, float, bytes, type(None), Name)
    if isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(part, plain) for part in value)):
        return value
    raise RefusedError(f"{_described(value)} for a key")


def _put_pairs(target: dict, pairs: list[Any]) -> None:
    if len(pairs) % 2:
        raise PickleError("damaged: a key without a value")
    for index in range(0, len(pairs), 2):
        target[key(pairs[index])] = pairs[index + 1]


def _described(value: Any) -> str:
    if isinstance(value, Name | Record):
        return str(value) if isinstance(value, Name) else f"an object of {value.kind}"
    return f"a {type(value).__name__}"
