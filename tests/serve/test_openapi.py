"""Whatever fits /openapi.json, and much that does not, gets an answer that /openapi.json describes."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from starlette.testclient import TestClient

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


OPERATIONS = [
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/audio/speech"),
    ("POST", "/v1/audio/transcriptions"),
]
"""Without /metrics, which asks Ray's nodes; there are none here."""
KNOWN = {"model": "tiny", "voice": "alloy"}


@pytest.fixture(scope="session")
def described(http: TestClient) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", http.app)


def test_no_operation_is_left_out(described: Any) -> None:
    found = {(operation.ok().method.upper(), operation.ok().path) for operation in described.get_all_operations()}
    assert found == {*OPERATIONS, ("GET", "/metrics")}


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (method, path, mode)
        for method, path in OPERATIONS
        for mode in GenerationMode
        # What has no body and takes any path cannot be asked for wrongly.
        if method == "POST" or mode == GenerationMode.POSITIVE
    ],
)
def test_answers_are_as_described(described: Any, method: str, path: str, mode: GenerationMode) -> None:
    """Requests that fit the description, and requests that do not."""

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(described[path][method].as_strategy(generation_mode=mode))
    def holds(case: Any) -> None:
        # What no description can say: which model and voice there are. Others are refused before anything is done.
        for name, value in KNOWN.items():
            if isinstance(case.body, dict) and isinstance(case.body.get(name), str):
                case.body[name] = value
        case.call_and_validate(checks=CHECKS)

    holds()
