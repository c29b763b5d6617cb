"""Streaming calls between deployments."""

from collections.abc import AsyncGenerator
from typing import Any


async def streamed(response: Any) -> AsyncGenerator[Any, None]:
    """What a streaming handle call yields. Ending before it does, however that comes, ends the call over there too."""
    whole = False
    try:
        async for piece in response:
            yield piece
        whole = True
    finally:
        if not whole:
            response.cancel()
