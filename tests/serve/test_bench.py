"""The arithmetic of `bench serve`, and one run of it against the gateway's application in this process."""

import asyncio
import io
import wave
from pathlib import Path

import httpx
import pytest
import typer
from starlette.testclient import TestClient
from typer.testing import CliRunner

from serve import bench
from serve.bench import Asked, BenchError, Listened, arrivals, in_time, listen, questions, summary, table, under
from serve.bench_plot import draw


def test_a_chunk_is_in_time_if_playback_still_has_sound() -> None:
    heard = Listened([(1.0, 0.5), (1.4, 0.2), (1.75, 1.0), (2.7, 1.0)])
    # The third comes 0.05 s late, so all after it is played 0.05 s later.
    assert in_time(heard) == [True, False, True]


def test_figures_are_of_the_answers_that_came() -> None:
    good = [Listened([(1.0, 1.0), (2.0, 3.0)]), Listened([(3.0, 1.0), (8.0, 1.0)])]
    facts = summary([*good, Listened(error="status 503")], 1.5)
    assert (facts["answers"], facts["errors"], facts["chunks_in_time"]) == (2, 1, 0.5)
    # One of the two is good, in the 8 seconds that both took.
    assert facts["goodput"] == 0.125 and summary(good[1:], 3.0)["goodput"] == 0.0
    assert summary([Listened([(1.0, 1.0), (2.0, 3.0)])], 1.0)["goodput"] == 0.5
    assert (
        facts["first_audio_p50"] == 2.0
        and facts["first_audio_p99"] == pytest.approx(2.98)
        and facts["real_time_factor"] == pytest.approx((0.5 + 4) / 2)
    )
    with pytest.raises(BenchError, match="503"):
        summary([Listened(error="status 503")], 1)
    lines = table({"alone": {"streamed": facts, "baseline": facts | {"chunks_in_time": None}}})
    assert len(lines) == 3 and "alone, streamed" in lines[1] and " - " in lines[2]


def test_arrivals_are_those_of_the_seed() -> None:
    moments = arrivals(2000, 4.0, 1)
    assert moments == arrivals(2000, 4.0, 1) != arrivals(2000, 4.0, 2)
    assert moments == sorted(moments) and moments[-1] == pytest.approx(500, rel=0.1)


def test_who_waits_in_the_queue_waits_for_the_answer() -> None:
    async def slow(asked: Asked) -> Listened:
        assert asked.text in "ab"
        await asyncio.sleep(0.1)
        return Listened([(0.1, 1.0)])

    async def both() -> tuple[list[Listened], list[Listened]]:
        told: list[int] = []
        ab = [Asked(text="a"), Asked(text="b")]
        return (
            await under(slow, ab, [0.0] * 4, True, told.append),
            await under(slow, ab, [0.0] * 4, False, told.append),
        )

    queued, together = asyncio.run(both())
    assert max(heard.first for heard in queued) > 0.35 and max(heard.first for heard in together) < 0.3


def test_it_hears_both_sides_of_a_service(http: TestClient, clip: bytes, tmp_path: Path) -> None:
    file = tmp_path / "question.wav"
    file.write_bytes(clip)

    async def hear(asked: Asked, streamed: bool, **changes: str) -> Listened:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(http.app), base_url="http://bundle")
        path, body = asked.request("tiny", streamed=streamed)
        return await listen(client, path, {**body, **changes})

    for asked in (Asked(text="two plus three is five"), Asked(file)):
        streamed, whole = asyncio.run(hear(asked, True)), asyncio.run(hear(asked, False))
        assert not streamed.error and not whole.error and len(whole.chunks) == 1
        assert streamed.sound == pytest.approx(whole.sound, abs=0.001) and whole.sound > 0.1
    refused = asyncio.run(hear(Asked(text="two"), False, response_format="ac3"))
    assert refused.error and "400" in refused.error


def test_a_wav_s_seconds() -> None:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 8000)
    assert bench._seconds(buffer.getvalue()) == 0.5


def test_the_questions_of_the_package_are_asked() -> None:
    found = questions()
    path, body = Asked(found[0], form="direct").request("nano", streamed=True)
    assert len(found) == 8 and path == "/v1/chat/completions" and body["stream"]
    assert body["reply_form"] == "direct"
    assert body["messages"][0]["content"][0]["input_audio"]["format"] == "opus"


def test_a_picture_of_both_sides(tmp_path: Path) -> None:
    ours = [Listened([(0.3, 0.4), (0.5, 1.0)]), Listened(error="status 503")]
    sides = {"streamed": ours, "baseline": [Listened([(2.0, 1.4)])]}
    draw({"one at a time": sides, "8 at once": sides}, tmp_path / "reports" / "serve.png")
    assert (tmp_path / "reports" / "serve.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "two", "--form", "direct"], "--form is of answers to questions"),
        (["--text", "two", "--question", __file__], "one of them"),
        (["--url", "http://127.0.0.1:1", "--set", "a=b"], "not for a --url"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], said: str) -> None:
    app = typer.Typer()
    app.command()(bench.main)
    done = CliRunner().invoke(app, options, env={"COLUMNS": "200"})
    assert done.exit_code == 2 and said in done.output
