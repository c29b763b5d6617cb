"""`/v1/realtime`: who is let in, and the socket of a session."""

from collections.abc import Callable

from fastapi import FastAPI, WebSocket

from serve.errors import ApiError
from serve.realtime.places import Places
from serve.realtime.session import Session
from serve.service import Service
from speechgpt.runtime.config import ServingSection

SUBPROTOCOL = "realtime"


def add_route(app: FastAPI, service: Callable[[], Service], serving: ServingSection, places: Places) -> None:
    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        """Whoever may not come in is told so before the session opens: by ApiError, which `Guard` words."""
        current = service()
        model = socket.query_params.get("model")
        if not model:
            raise ApiError(
                400, "model: is required: /v1/realtime?model=…", code="missing_required_parameter", param="model"
            )
        current = current.answering_as(model)
        with places.place():
            offered = socket.scope.get("subprotocols", [])
            await socket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
            session = Session(current, serving, places.meters, socket.send_text)
            with places.told(session):
                ending = await session.run(lambda: _next(socket))
            if ending:
                await socket.close(ending.code, ending.reason)


async def _next(socket: WebSocket) -> str | bytes | None:
    """The client's next message; None when it is gone."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        return None
    return message.get("text") or message.get("bytes") or b""
