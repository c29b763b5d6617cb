"""Clients that HTTP libraries would not be: they stop in the middle, vanish, or send without end."""

import asyncio
import contextlib
import json
import random
import select
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CHUNK = b"10000\r\n" + b"x" * 65_536 + b"\r\n"


def request(path: str, body: bytes, kind: str = "application/json", *, key: str = "unused", length: int = -1) -> bytes:
    """A POST as it goes over the wire. length: what it says of its body, if that is not the truth."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body) if length < 0 else length}\r\n\r\n"
    )
    return head.encode() + body


def as_json(path: str, body: dict[str, Any]) -> bytes:
    return request(path, json.dumps(body).encode())


def as_form(path: str, fields: dict[str, str], clip: bytes) -> bytes:
    edge = "edge-of-a-part"
    parts = [f'--{edge}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    parts.append(f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n')
    body = "".join(parts).encode() + clip + f"\r\n--{edge}--\r\n".encode()
    return request(path, body, f"multipart/form-data; boundary={edge}")


def first_line(url: str, data: bytes, seconds: float = 60) -> str:
    """The status line of the reply to `data`, which may be less than a whole request."""
    with socket.create_connection(_address(url), timeout=seconds) as connection:
        connection.sendall(data)
        return connection.recv(4096).split(b"\r\n")[0].decode()


def endless_body(url: str, path: str, most: int, seconds: float = 60) -> tuple[str, int]:
    """Send chunks until there is a reply. Gives its status line and the bytes that had gone, at most `most`."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    sent, reply = 0, b""
    with socket.create_connection(_address(url), timeout=seconds) as connection:
        connection.sendall(head.encode())
        while not reply and sent < most:
            readable, writable, _ = select.select([connection], [connection], [], seconds)
            if readable:
                reply = connection.recv(4096)
                if not reply:
                    break
            elif writable:
                sent += connection.send(CHUNK)
    return reply.split(b"\r\n")[0].decode(), sent


@dataclass(frozen=True)
class Vanishing:
    """One client: what it would send, how much of that it sends, and how much of the reply it waits for.

    sent: share of the request's bytes. read: bytes of the reply; 0 is gone at once, after `patience` seconds.
    """

    request: bytes
    sent: float
    read: int
    patience: float

    async def run(self, url: str) -> None:
        reader, writer = await asyncio.open_connection(*_address(url))
        try:
            writer.write(self.request[: int(len(self.request) * self.sent)])
            await writer.drain()
            await asyncio.sleep(self.patience)
            left = self.read
            while left > 0 and (data := await reader.read(left)):
                left -= len(data)
        except ConnectionError:
            pass
        finally:
            # Without a goodbye: whatever is unread makes this a reset.
            writer.transport.abort()


def moments(requests: list[bytes], count: int, seed: int) -> list[Vanishing]:
    """`count` clients, each at a moment of its own: within the request, right after it, or within the reply."""
    dice, clients = random.Random(seed), []
    for number in range(count):
        whole = requests[number % len(requests)]
        match dice.choice(("head", "body", "after", "soon", "reply", "reply")):
            case "head":
                sent, read, patience = dice.uniform(0, whole.index(b"\r\n\r\n") / len(whole)), 0, 0.0
            case "body":
                sent, read, patience = dice.uniform(whole.index(b"\r\n\r\n") / len(whole), 0.999), 0, 0.0
            case "after":
                sent, read, patience = 1.0, 0, 0.0
            case "soon":
                sent, read, patience = 1.0, 0, dice.uniform(0, 0.5)
            case _:
                sent, read, patience = 1.0, int(2 ** dice.uniform(0, 14)), 0.0
        clients.append(Vanishing(whole, sent, read, patience))
    return clients


def vanish(url: str, clients: list[Vanishing], at_once: int, seconds: float = 30) -> None:
    """Let them come, `at_once` at a time. No client waits for a reply longer than `seconds`."""

    async def all_of_them() -> None:
        turn = asyncio.Semaphore(at_once)

        async def one(client: Vanishing) -> None:
            async with turn:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(client.run(url), seconds)

        await asyncio.gather(*map(one, clients))

    asyncio.run(all_of_them())


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return str(parts.hostname), int(parts.port or 80)
