"""Dynamic batching: requests that wait at the same time are worked on together."""

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ray import serve

from speechgpt.runtime.config import DeploymentSection

T = TypeVar("T")
R = TypeVar("R")


def batched(
    work: Callable[[list[T]], Coroutine[Any, Any, list[R]]], section: DeploymentSection
) -> Callable[[T], Coroutine[Any, Any, R]]:
    """`work` as a function of one item: called with up to `section.batch` items that came within its waiting time."""
    return serve.batch(max_batch_size=section.batch, batch_wait_timeout_s=section.batch_wait_seconds)(work)
