"""What all gateway replicas share: a named actor that outlives replicas and bundle changes, and ends with the service.

Ray keeps a node as long as an actor lives on it, so one that stayed behind would hold a machine for nothing.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from serve.errors import ApiError, from_serve

T = TypeVar("T")

NAMESPACE = "speechgpt"
_SERVE_NAMESPACE, _REPLICA = "serve", "SERVE_REPLICA::"
_CHECK_SECONDS, _CHECKS = 30.0, 4
"""An update may take the last replica away before it brings the next: only what is gone for so long has ended."""

_PATIENCE_SECONDS = 5.0
"""How long a request waits for the actor, which may just be coming up again."""
_START_SECONDS = 60.0


def shared(kind: type, name: str, *arguments: Any, check_seconds: float = _CHECK_SECONDS) -> Any:
    """The cluster's one actor of a class; made with these arguments where there is none.

    It takes no CPU, comes up again elsewhere when its node is lost (empty), and ends when no replica of Serve has been
    there for `check_seconds` four times over.
    """
    import ray

    class Shared(kind):
        def __init__(self) -> None:
            super().__init__(*arguments)
            threading.Thread(target=_end_with_the_service, args=(name, check_seconds), daemon=True).start()

    Shared.__name__ = Shared.__qualname__ = kind.__name__
    options: dict[str, Any] = {"name": name, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
    # Else it waits 30 s and more for a call that was cancelled on its way, with a client who went, and all others wait
    # with it (Ray issue 65785). Calls that are under way at the same time may change places.
    options["allow_out_of_order_execution"] = True
    return ray.remote(Shared).options(**options, num_cpus=0, max_restarts=-1).remote()


async def started(actor: Any) -> None:
    """Waits for the actor's process, which on a busy node comes later than a request would wait for it; not for ever:
    much of the service works without it."""
    from ray.exceptions import RayError

    with contextlib.suppress(TimeoutError, RayError):
        async with asyncio.timeout(_START_SECONDS):
            await actor.__ray_ready__.remote()


async def told(answer: Awaitable[T], what: str) -> T:
    """What the actor answers. Raises ApiError 503, worth a retry, if it does not. what: it was to do."""
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            return await answer
    except TimeoutError:
        raise ApiError(503, f"The service cannot {what}; try again shortly.", retry_after=1) from None
    except Exception as error:
        if fault := from_serve(error, 1):
            raise fault from error
        raise


def _end_with_the_service(name: str, check_seconds: float) -> None:
    """In the actor's own process."""
    import ray

    missed = 0
    while missed < _CHECKS:
        time.sleep(check_seconds)
        missed = 0 if _served() else missed + 1
    ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)


def _served() -> bool:
    """Whether there is a replica of Serve, as far as is known: while the head is away nothing is."""
    from ray.util import list_named_actors

    try:
        living = list_named_actors(all_namespaces=True)
    except Exception:  # noqa: BLE001  Ray has no class for a head that does not answer
        return True
    return any(each["namespace"] == _SERVE_NAMESPACE and each["name"].startswith(_REPLICA) for each in living)
