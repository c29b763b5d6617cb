"""Pickles that would run code, or fill the memory, where they are loaded as their makers load them."""

import copyreg
import io
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch

from speechgpt.interop import checkpoints
from speechgpt.interop.checkpoints import CheckpointError, RefusedCheckpointError, read

EXTENSION = 240


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


class WithState:
    def __init__(self, state: Any) -> None:
        self.state = state


def named(path: str) -> bytes:
    """Opcodes that push a global: protocol 4's, by two strings."""
    module, _, name = path.partition(":")
    return text(module) + text(name) + b"\x93"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def calling(path: str, *arguments: str) -> bytes:
    return named(path) + b"(" + b"".join(map(text, arguments)) + b"tR"


def whole(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def by_getattr(canary: str) -> bytes:
    """getattr(__import__("os"), "system")(…), as a chain of calls."""
    module = calling("builtins:__import__", "os")
    return whole(named("builtins:getattr"), module, text("system"), b"\x86R", text(f"touch {canary}"), b"\x85R")


def through_the_memo(canary: str) -> bytes:
    """Module and name come out of the memo, put there among harmless strings."""
    strings = text("os") + b"q\x01" + text("system") + b"q\x02" + b"00"
    return whole(strings, b"h\x01h\x02\x93", text(f"touch {canary}"), b"\x85R")


def in_a_state(canary: str) -> bytes:
    """An innocent argparse.Namespace whose attributes hide the call."""
    held = b"}" + text("lr") + calling("os:system", f"touch {canary}") + b"s"
    return whole(named("argparse:Namespace"), b")\x81", held, b"b")


def by_inst(canary: str) -> bytes:
    return f"(S'touch {canary}'\nios\nsystem\n.".encode()


def by_obj(canary: str) -> bytes:
    return whole(b"(", named("os:system"), text(f"touch {canary}"), b"o")


def by_extension(canary: str) -> bytes:
    return whole(b"\x82" + bytes([EXTENSION]), text(f"touch {canary}"), b"\x85R")


def by_dotted_name(canary: str) -> bytes:
    """Attributes of an allowed function lead to its module's globals."""
    found = named("collections:OrderedDict.fromkeys.__self__.__class__.__base__.__subclasses__")
    return whole(found, b")R0", calling("os:system", f"touch {canary}"))


def in_an_object_array(canary: str) -> bytes:
    return pickle.dumps(np.array([Call(os.system, f"touch {canary}")], dtype=object))


def in_joblib(canary: str) -> bytes:
    """joblib puts a pickle of its own behind an array of objects."""
    stream = io.BytesIO()
    joblib.dump({"a": np.zeros(3), "b": np.array([Call(os.system, f"touch {canary}")], dtype=object)}, stream)
    return stream.getvalue()


def dumped(make: Callable[[str], Any]) -> Callable[[str], bytes]:
    return lambda canary: pickle.dumps(make(canary))


def nested(canary: str) -> bytes:
    return pickle.dumps(Call(os.system, f"touch {canary}"))


def torch_file(canary: str) -> bytes:
    stream = io.BytesIO()
    torch.save(Call(os.system, f"touch {canary}"), stream)
    return stream.getvalue()


ATTACKS: dict[str, tuple[Callable[[str], bytes], str]] = {
    # name: (the pickle, what the refusal must name)
    "system": (dumped(lambda c: Call(os.system, f"touch {c}")), "posix.system"),
    "popen": (dumped(lambda c: Call(subprocess.Popen, ["touch", c])), "subprocess.Popen"),
    "eval": (dumped(lambda c: Call(eval, f"open({c!r}, 'w')")), "builtins.eval"),
    "exec": (dumped(lambda c: Call(exec, f"open({c!r}, 'w')")), "builtins.exec"),
    "open": (dumped(lambda c: Call(open, c, "w")), "io.open"),
    "getattr chain": (by_getattr, "builtins.getattr"),
    "runpy": (lambda c: whole(calling("runpy:_run_code", f"open({c!r}, 'w')")[:-2], b"}tR"), "runpy._run_code"),
    "torch's nested load": (
        lambda c: pickle.dumps(Call(torch.storage._load_from_bytes, torch_file(c))),
        "torch.storage._load_from_bytes",
    ),
    "pickle's nested load": (lambda c: pickle.dumps(Call(pickle.loads, nested(c))), "_pickle.loads"),
    "numpy's runstring": (
        lambda c: whole(named("numpy.testing._private.utils:runstring"), b"(", text(f"open({c!r}, 'w')"), b"}tR"),
        "numpy.testing._private.utils.runstring",
    ),
    "hidden in a state": (in_a_state, "os.system"),
    "name from the memo": (through_the_memo, "os.system"),
    "INST": (by_inst, "os.system"),
    "OBJ": (by_obj, "os.system"),
    "EXT1": (by_extension, f"EXT1 {EXTENSION}"),
    "dotted name": (by_dotted_name, "collections.OrderedDict.fromkeys.__self__"),
    "object array": (in_an_object_array, "type 'O8'"),
    "joblib's object array": (in_joblib, "type 'O8'"),
    "a reconstructor": (
        lambda c: whole(named("copyreg:_reconstructor"), calling("os:system", f"touch {c}"), b"0N."),
        "os.system",
    ),
}


@pytest.fixture
def extension() -> Any:
    copyreg.add_extension("os", "system", EXTENSION)
    yield
    copyreg.remove_extension("os", "system", EXTENSION)
    copyreg.clear_extension_cache()


def loads_as_its_maker_does(data: bytes, file: Path) -> None:
    file.write_bytes(data)
    try:
        done = joblib.load(file)
        if isinstance(done, subprocess.Popen):
            done.wait()
    except Exception:  # noqa: BLE001  # what comes after the attack is of no interest
        pass


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("container", ["pickle", "zip", "legacy", "zlib"])
def test_an_attack_is_refused_by_name(name: str, container: str, tmp_path: Path, extension: None) -> None:
    attack, wanted = ATTACKS[name]
    canary = tmp_path / "canary"
    data = attack(str(canary))
    if container == "pickle":
        loads_as_its_maker_does(data, tmp_path / "control")
        assert canary.exists(), "the attack itself does nothing, so that its refusal would prove nothing"
        canary.unlink()
    file = tmp_path / "model.pt"
    file.write_bytes(contained(data, container))
    with pytest.raises(RefusedCheckpointError) as refusal:
        read(file)
    assert wanted in str(refusal.value)
    assert str(file) in str(refusal.value)
    assert not canary.exists()


def contained(data: bytes, container: str) -> bytes:
    if container == "zip":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("model/data.pkl", data)
        return stream.getvalue()
    if container == "legacy":
        magic, version, system = 0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}
        return b"".join(map(pickle.dumps, (magic, version, system))) + data + pickle.dumps([])
    if container == "zlib":
        import zlib

        return zlib.compress(data)
    return data


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (
            whole(named("torch._utils:_rebuild_tensor_v2"), b"}", text("__code__"), b"Nsb"),
            "attributes are set on torch._utils",
        ),
        (whole(named("argparse:Namespace"), b")\x81)R"), "a call of an object of argparse.Namespace"),
        (whole(text("os"), b")R"), "a call of a str"),
        (whole(named("builtins:int"), text("1"), b"\x85R"), "calls builtins.int"),
        (whole(named("_codecs:encode"), text("x"), text("rot13"), b"\x86R"), "_codecs.encode with 'rot13'"),
        (whole(named("numpy:dtype"), text("O"), b"\x85R"), "type 'O'"),
        (whole(named("copyreg:_reconstructor"), named("numpy:ndarray"), b"N", b"N", b"\x87R"), "numpy.ndarray"),
        (whole(text("x"), b"Q"), "outside itself"),
        (whole(b"\x97"), "NEXT_BUFFER"),
        (whole(b"}", b")" + b"\x85" * 100_000, b"Ns"), "for a key"),
        (whole(text("a"), text("b"), b"a"), "put into a str"),
        (whole(named("typing:Any"), b")\x81"), "calls typing.Any"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_allowed_names_are_not_to_be_misused(data: bytes, wanted: str, tmp_path: Path) -> None:
    file = tmp_path / "km.bin"
    file.write_bytes(data)
    with pytest.raises(RefusedCheckpointError, match=wanted.replace("(", r"\(")):
        read(file)


@pytest.mark.parametrize(
    "data",
    [
        whole(b"\x8e" + struct.pack("<Q", 1 << 40) + b"abc"),
        whole(b"B" + struct.pack("<I", 0xFFFFFFFF)),
        whole(b"\x8b" + struct.pack("<i", 0x7FFFFFFF)),
        whole(b"\x8d" + struct.pack("<Q", (1 << 64) - 1)),
        whole(
            named("joblib.numpy_pickle:NumpyArrayWrapper"),
            b")\x81}(" + text("dtype") + named("numpy:dtype") + text("f8") + b"\x85R",
            text("shape") + b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85" + text("order") + text("C") + b"ub",
        ),
        b"L" + b"9" * 1_000_000 + b"L\n.",
    ],
    ids=["bytes", "bytes 4 GiB", "integer", "text", "array", "digits"],
)
def test_claims_of_size_are_not_believed(data: bytes, tmp_path: Path) -> None:
    import tracemalloc

    file = tmp_path / "km.bin"
    file.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="damaged|cut off"):
        read(file)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_a_compressed_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "MAX_DECOMPRESSED", 8 << 20)
    for compress in ("zlib", "gzip", "bz2", "lzma", "xz"):
        file = tmp_path / compress
        joblib.dump(np.zeros(4 << 20), file, compress=(compress, 3))
        assert file.stat().st_size < 1 << 20
        with pytest.raises(RefusedCheckpointError, match="more than 8388608 bytes"):
            read(file)


def test_objects_without_end_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from speechgpt.interop import pickles

    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 1000)
    (tmp_path / "many").write_bytes(whole(b"}0" * 1000, b"N"))
    with pytest.raises(RefusedCheckpointError, match="more than 1000 operations"):
        read(tmp_path / "many")
