"""What the Serve controller of this cluster knows, as `serve status` shows it; Ray has no public call for it."""

from typing import Any


def details() -> dict[str, Any]:
    """As JSON (`ray.serve.schema.ServeInstanceDetails`). Blocks."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None, "Serve runs here"
    return client.get_serve_details()
