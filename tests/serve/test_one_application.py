"""`serve run serve.app:build`: what Ray's own users type."""

from pathlib import Path

import httpx
import pytest
from live_service import until
from load import chat

from serve.promotion import PromotionError

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_gateway_and_bundle_in_one(tiny_bundle: Path, ray_cluster: None) -> None:
    from ray import serve

    from serve.app import Arguments, build
    from serve.records import gateway_application
    from serve.rollout import ServedCluster

    serve.start(http_options={"port": 8123})
    try:
        serve.run(build(Arguments(bundle=str(tiny_bundle), recipe="tiny")), name="mine")
        url = "http://127.0.0.1:8123"
        assert until(lambda: httpx.get(f"{url}/readyz").status_code == 200, 60)
        ask = chat("tiny", spoken=True, stream=True)
        reply = httpx.post(url + ask.path, json=ask.body, timeout=60)
        assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n")
        assert gateway_application() == "mine"
        with pytest.raises(PromotionError, match="mine has gateway and bundle in one"):
            ServedCluster("mine", None, 1)
        assert httpx.post(url + ask.path, json=ask.body, timeout=60).status_code == 200
    finally:
        serve.shutdown()
