"""A replica hears that it is to go, from a real controller, while it still has a request to finish."""

import asyncio
import time
from typing import Any

import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeInstanceDetails

from serve.realtime.places import is_ending, told_to_stop


def asking(cpus: float) -> Any:
    """A deployment that can be asked whether it is to go. cpus: others make it another version."""

    # In here, so that it travels as code: replicas cannot import tests.
    @serve.deployment(name="Asked", graceful_shutdown_timeout_s=300, ray_actor_options={"num_cpus": cpus})
    class Asked:
        waiting = False

        async def told(self) -> bool:
            return await asyncio.to_thread(told_to_stop)

        async def is_waiting(self) -> bool:
            return self.waiting

        async def until_told(self) -> bool:
            self.waiting = True
            for _ in range(600):
                if await self.told():
                    return True
                await asyncio.sleep(0.2)
            return False

    return Asked.bind()  # type: ignore[attr-defined]


@pytest.mark.ray
@pytest.mark.parametrize("end", ["deleted", "replaced"])
def test_a_replica_that_is_to_go_is_told_so_while_it_has_a_request(ray_cluster: None, end: str) -> None:
    serve.start(proxy_location="Disabled")
    try:
        running = serve.run(asking(0), name="asked", route_prefix=None)
        assert not running.told.remote().result(timeout_s=60)
        client = _get_global_client()
        assert client is not None
        application = ServeInstanceDetails(**client.get_serve_details()).applications["asked"]
        assert not is_ending(application, "Asked", "unknown") and not is_ending(application, "Other", "unknown")
        answer = running.until_told.remote()
        while not running.is_waiting.remote().result(timeout_s=60):
            time.sleep(0.1)
        if end == "deleted":
            serve.delete("asked", _blocking=False)
        else:
            serve.run(asking(0.01), name="asked", route_prefix=None)
        assert answer.result(timeout_s=200)
    finally:
        serve.shutdown()


def test_a_controller_that_does_not_know_the_application_ends_nobody() -> None:
    assert not is_ending(None, "Asked", "unknown")
