"""TCP ports of this host's own address, passed on to the same ports of its loopback: `forward.py ADDRESS PORT …`.

What stands before servers that listen on loopback only; prints `ready` and stays.
"""

import asyncio
import sys
from contextlib import suppress


async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    sink.close()


async def forward(address: str, port: int) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(carry(reader, inner[1]), carry(inner[0], writer))

    await asyncio.start_server(accept, address, port)


async def main() -> None:
    for port in sys.argv[2:]:
        await forward(sys.argv[1], int(port))
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
