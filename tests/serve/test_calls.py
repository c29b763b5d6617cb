"""What nobody waits for any more ends."""

import asyncio

import pytest

from serve.calls import answered, together


class Response:
    """A handle call that never returns."""

    cancelled = False

    def __await__(self):
        return asyncio.sleep(60).__await__()

    def cancel(self):
        self.cancelled = True


def test_a_call_ends_with_whoever_waits_for_it():
    async def given_up() -> bool:
        response = Response()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await answered(response)
        return response.cancelled

    assert asyncio.run(given_up())


def test_the_first_failure_ends_the_others_and_is_told_as_it_is():
    ended = []

    async def work(seconds: float) -> float:
        try:
            await asyncio.sleep(seconds)
        finally:
            ended.append(seconds)
        if seconds:
            raise ValueError(str(seconds))
        return seconds

    assert asyncio.run(together(work(0), work(0))) == [0, 0]
    with pytest.raises(ValueError, match="0.01"):
        asyncio.run(together(work(60), together(work(0.01), work(0))))
    assert sorted(ended) == [0, 0, 0, 0.01, 60]
