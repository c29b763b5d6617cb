"""A crowd for which there is no room is refused at the door, and nobody else is."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.edge import BUNDLE_HEADER, Edge
from serve.errors import ApiError
from serve.surge import Surge


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_refusal_holds_until_something_ends() -> None:
    clock = Clock()
    surge = Surge(clock)
    assert surge.refusal() is None
    surge.ended()
    surge.refused("3")
    assert [surge.refusal(), surge.refusal()] == ["3", "3"]
    surge.ended()
    surge.ended()
    assert [surge.refusal() for _ in range(3)] == [None, None, "3"], "as many may try as have ended"
    surge.refused(None)
    clock.now += 0.2
    assert surge.refusal() == "1"


def test_a_few_look_whether_there_is_room_and_twice_as_many_each_time() -> None:
    clock = Clock()
    surge = Surge(clock)
    surge.refused("3")
    tries = []
    for _ in range(6):
        clock.now += 0.25
        tries.append([surge.refusal() for _ in range(20)].count(None))
    assert tries == [1, 2, 4, 8, 16, 20], "and at last everybody"
    surge.refused("3")
    clock.now += 0.25
    assert [surge.refusal(), surge.refusal()] == [None, "3"]
    surge.refused("3")
    clock.now += 3600
    assert [surge.refusal() for _ in range(1000)] == [None] * 1000, "nothing is known any more"


class Service:
    """Room for two POSTs, each as long as `done` is not set; the others are refused as the gateway does."""

    def __init__(self) -> None:
        self.inside = self.asked = 0
        self.done = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        status, error = 200, None
        if scope["path"].startswith("/limited"):
            error = ApiError(429, "Your key's own limit.", code="rate_limit_exceeded", retry_after=9)
        elif scope["path"].startswith("/wrong"):
            error = ApiError(400, "This is no JSON.", code="invalid_json")
        elif scope["path"].endswith("/chat/completions") and self.inside == 2:
            error = ApiError(429, "The service is at capacity; try again shortly.", code="at_capacity", retry_after=3)
        if error:
            status = error.status
            await error.response()(scope, receive, lambda message: self._stamped(message, send))
            return
        self.inside += 1
        try:
            if scope["method"] == "POST":
                await self.done.wait()
            await self._stamped({"type": "http.response.start", "status": status, "headers": []}, send)
            await send({"type": "http.response.body", "body": b"{}"})
        finally:
            self.inside -= 1

    @staticmethod
    async def _stamped(message: Message, send: Send) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (BUNDLE_HEADER.encode(), b"digest")]}
        await send(message)


async def ask(edge: Edge, path: str = "/v1/chat/completions", method: str = "POST") -> tuple[int, dict[bytes, bytes]]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "headers": []}
    await edge(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"])


async def full(rejected: Callable[[int], None] = lambda status: None) -> tuple[Service, Edge, list[asyncio.Task[Any]]]:
    """A service without room, what stands before it, and the two requests that it has taken."""
    service = Service()
    edge = Edge(service, rejected=rejected)
    inside = [asyncio.create_task(ask(edge)) for _ in range(2)]
    await asyncio.sleep(0.01)
    return service, edge, inside


def test_the_gateway_is_asked_once_and_again_when_there_is_room() -> None:
    counted: list[int] = []

    async def crowd() -> None:
        service, edge, inside = await full(counted.append)
        replies = [await ask(edge) for _ in range(20)]
        assert {status for status, _ in replies} == {429}
        assert {headers[b"retry-after"] for _, headers in replies} == {b"3"}
        assert service.asked == 3, "two that had room and one that had none"
        assert counted == [429] * 19, "the gateway knows of the first"
        assert (await ask(edge, "/v1/models", "GET"))[0] == 200, "what needs no room is answered"
        assert (await ask(edge))[0] == 429 and service.asked == 4
        service.done.set()
        assert [status for status, _ in await asyncio.gather(*inside)] == [200, 200]
        assert (await ask(edge))[0] == 200

    asyncio.run(crowd())


def test_of_a_crowd_as_many_get_in_as_there_are_places() -> None:
    async def crowd() -> None:
        service, edge, inside = await full()
        assert (await ask(edge))[0] == 429 and service.asked == 3
        service.done.set()
        await asyncio.gather(*inside)
        service.done.clear()
        everybody = [asyncio.create_task(ask(edge)) for _ in range(20)]
        await asyncio.sleep(0.01)
        assert service.asked == 5, "nobody was asked to refuse"
        service.done.set()
        assert sorted(status for status, _ in await asyncio.gather(*everybody)) == [200] * 2 + [429] * 18

    asyncio.run(crowd())


@pytest.mark.parametrize("path", ["/limited/chat/completions", "/wrong/chat/completions"])
def test_the_refusals_of_one_client_shut_nobody_else_out(path: str) -> None:
    async def both() -> None:
        service = Service()
        service.done.set()
        edge = Edge(service)
        assert (await ask(edge, path))[0] in (429, 400)
        assert (await ask(edge))[0] == 200

    asyncio.run(both())


def test_a_part_that_is_full_shuts_nobody_out_of_others() -> None:
    async def both() -> None:
        service, edge, inside = await full()
        assert [(await ask(edge))[0] for _ in range(2)] == [429, 429] and service.asked == 3
        service.done.set()
        assert (await ask(edge, "/v1/audio/speech"))[0] == 200
        await asyncio.gather(*inside)

    asyncio.run(both())


def test_what_ends_badly_makes_no_room() -> None:
    async def crowd() -> None:
        service, edge, inside = await full()
        late = asyncio.create_task(ask(edge, "/wrong/chat/completions"))
        await asyncio.sleep(0)
        assert (await ask(edge))[0] == 429
        await late
        asked = service.asked
        assert (await ask(edge))[0] == 429 and service.asked == asked
        service.done.set()
        await asyncio.gather(*inside)

    asyncio.run(crowd())
