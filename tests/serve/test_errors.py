"""What a client is told when something between the deployments goes wrong."""

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from serve.errors import ApiError, from_serve


def test_a_full_queue_asks_for_patience() -> None:
    told = from_serve(BackPressureError(5, 5), retry_after=2.4)
    assert told is not None
    response = told.response()
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert told.body()["error"]["type"] == "rate_limit_error"


def test_a_dead_replica_is_worth_a_retry() -> None:
    told = from_serve(ActorDiedError(), retry_after=0.2)
    assert told is not None and told.status == 503
    assert told.response().headers["retry-after"] == "1"


def test_a_defect_is_not_explained_away() -> None:
    assert from_serve(KeyError("units"), retry_after=1) is None


@pytest.mark.parametrize(
    ("status", "type"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "invalid_request_error"),
        (503, "server_error"),
    ],
)
def test_types_follow_the_status(status: int, type: str) -> None:
    assert ApiError(status, "…").type == type
