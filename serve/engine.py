"""What generates tokens for a language model replica: one small interface, so that engines can be exchanged."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from serve.errors import described
from serve.worker import give_back_memory, give_way
from speechgpt.language.config import GenerationSection

if TYPE_CHECKING:
    from speechgpt.language.batching import ContinuousBatch, Sampled
    from speechgpt.language.prompts import Kind

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Request:
    """ids: the prompt's tokens. kind: decides the grammar of the reply. seconds: it is given up after so long.
    adapter: of the bundle's named ones; "" takes its own, if it has one."""

    ids: tuple[int, ...]
    kind: "Kind"
    generation: GenerationSection
    seed: int
    seconds: float
    adapter: str = ""


class Engine(Protocol):
    def tokens(self, request: Request) -> AsyncGenerator[list[int], None]:
        """Tokens as they are sampled, several where they came faster than they were taken; ends with the reply.

        Closing it stops the generation at the next step. Raises TimeoutError when the request's time is over.
        """
        ...

    @property
    def ongoing(self) -> int:
        """Replies that are generated or wait for it."""
        ...

    def check(self) -> None:
        """Raises RuntimeError when a step hangs."""
        ...


@dataclass
class _Listener:
    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[tuple[int, bool] | BaseException]"
    until: float

    def tell(self, news: "tuple[int, bool] | BaseException") -> None:
        # The loop of a request that was cancelled may be gone.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, news)


class LocalEngine:
    """A ContinuousBatch in a thread, which lives while there is something to generate.

    A step that takes longer than `stuck_seconds` makes the replica unhealthy, and Serve replaces it.
    """

    def __init__(self, batch: "ContinuousBatch", stuck_seconds: float) -> None:
        self._batch = batch
        self._stuck_seconds = stuck_seconds
        self._lock = threading.Lock()
        # The batch belongs to the thread; others leave it orders.
        self._orders: list[Callable[[], None]] = []
        self._running = False
        self._listeners: dict[int, _Listener] = {}
        self._step_began: float | None = None

    async def tokens(self, request: Request) -> AsyncGenerator[list[int], None]:
        queue: asyncio.Queue[tuple[int, bool] | BaseException] = asyncio.Queue()
        listener = _Listener(asyncio.get_running_loop(), queue, time.monotonic() + request.seconds)
        ticket: list[int] = []

        def join() -> None:
            try:
                asked = (request.ids, request.kind, request.generation, request.seed, request.adapter)
                ticket.append(self._batch.add(*asked))
            except ValueError as error:
                listener.tell(error)
            else:
                self._listeners[ticket[0]] = listener

        def leave() -> None:
            if ticket:
                self._batch.drop(ticket[0])
                self._listeners.pop(ticket[0], None)

        self._order(join)
        try:
            ended = False
            while not ended:
                news = [await queue.get()]
                while not queue.empty():
                    news.append(queue.get_nowait())
                few = []
                for item in news:
                    if isinstance(item, BaseException):
                        raise item
                    few.append(item[0])
                    ended = item[1]
                yield few
        finally:
            self._order(leave)

    @property
    def ongoing(self) -> int:
        return self._batch.active + self._batch.waiting

    def check(self) -> None:
        began = self._step_began
        if began is not None and time.monotonic() - began > self._stuck_seconds:
            raise RuntimeError(f"a generation step has been running for more than {self._stuck_seconds:g} s")

    def _order(self, order: Callable[[], None]) -> None:
        with self._lock:
            self._orders.append(order)
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="generation", daemon=True).start()

    def _work(self) -> None:
        give_way()
        give_back_memory()
        while True:
            with self._lock:
                orders, self._orders = self._orders, []
                if not orders and not self._listeners:
                    self._running = False
                    return
            for order in orders:
                order()
            self._give_up_late()
            self._step_began = time.monotonic()
            try:
                sampled = self._batch.step()
            except Exception as error:  # noqa: BLE001 - logged in words of our own
                # Whatever is wrong with a pass is wrong for everyone in it; the next requests get a new chance.
                logger.error("a generation step failed: %s", described(error))
                self._fail(RuntimeError(f"generation failed: {type(error).__name__}"))
                continue
            finally:
                self._step_began = None
            self._deliver(sampled)

    def _deliver(self, sampled: "list[Sampled]") -> None:
        for ticket, token, ended in sampled:
            listener = self._listeners.pop(ticket, None) if ended else self._listeners.get(ticket)
            if listener:
                listener.tell((token, ended))

    def _give_up_late(self) -> None:
        now = time.monotonic()
        for ticket in [ticket for ticket, listener in self._listeners.items() if listener.until < now]:
            self._batch.drop(ticket)
            self._listeners.pop(ticket).tell(TimeoutError("the reply was not generated in time"))

    def _fail(self, error: BaseException) -> None:
        for ticket in list(self._listeners):
            self._batch.drop(ticket)
            self._listeners.pop(ticket).tell(error)
