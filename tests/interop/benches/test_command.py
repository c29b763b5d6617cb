"""`speechgpt bench` against real fairseq, on a few clips: both sides agree, and what is told is what was measured."""

import json

import pytest
from typer.testing import CliRunner

from speechgpt.interop.benches.command import app
from speechgpt.speech import split_products


def bench(*words: str) -> dict:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def check(result: dict) -> None:
    conditions = result["conditions"]
    assert result["ratio"] == pytest.approx(result["figure"] / result["baseline"], rel=0.02)
    for precision, floor in conditions["floor"].items():
        if precision == "operations_a_second_of_speech":
            continue
        assert 0 < floor["seconds"] < floor["taken"], "nothing is faster than its arithmetic"
        assert sum(conditions["profile"][precision].values()) == pytest.approx(1, abs=0.02)


@pytest.mark.evidence
def test_encode() -> None:
    result = bench("encode", "--clips", "8")
    check(result)
    precisions = result["conditions"]["precisions"]
    assert set(precisions) == {"float32", "bfloat16", *(["bfloat16x3"] if split_products.available() else [])}
    for name in precisions.keys() - {"bfloat16"}:
        agreed = precisions[name]["agreement"]
        assert agreed["differing_where_centroids_are_apart"] == 0
        assert agreed["share"] > 0.99
    assert 0.5 < precisions["bfloat16"]["agreement"]["share"] < 1, "bfloat16 is measured, not assumed"


@pytest.mark.evidence
def test_vocoder() -> None:
    result = bench("vocoder", "--clips", "2")
    check(result)
    assert result["conditions"]["largest_difference"] < 1e-4
    streamed = result["conditions"]["streaming"]["float32"]
    assert 0 < streamed["first_sound"] < streamed["whole"] / 4


def test_without_fairseq_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from speechgpt.interop import fairseq_environment

    def missing() -> None:
        raise fairseq_environment.FairseqEnvironmentError("no compiler here")

    monkeypatch.setattr(fairseq_environment, "interpreter", missing)
    done = CliRunner().invoke(app, ["vocoder", "--clips", "1"])
    assert done.exit_code == 1
    assert "nothing is measured. no compiler here" in done.output
