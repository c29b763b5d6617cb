"""Calls between deployments: what nobody waits for any more ends over there, too."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def answered(response: Any) -> Any:
    """What a handle call returns. Serve itself cancels it only with the request on whose behalf it was made, and a
    session outlasts many."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def together(*works: Coroutine[Any, Any, T]) -> list[T]:
    """What each gives. Raises what the first to fail raised; the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


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
