"""The engine in this process: tokens as they come, and none for those who went away, came too late, or broke it."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serve.bench import questions
from serve.engine import LocalEngine, Request
from serve.prompting import Ask, Prompt, Prompter, Read, Reply, Sampling, Task, Units, Words
from serve.voice import Manner, Sound, first_piece, voiced
from speechgpt.language.batching import ContinuousBatch
from speechgpt.language.config import GenerationSection
from speechgpt.language.model import SpeechLanguageModel
from speechgpt.language.prompts import Turn
from speechgpt.recipe import Recipe
from speechgpt.runtime import bundle
from speechgpt.speech.audio import decode
from speechgpt.speech.streaming import VocoderStream

GREEDY = GenerationSection(temperature=0, max_new_tokens=80, max_text_tokens=30)
SPOKEN = Ask((Turn("user", units=(1, 2, 3, 4, 5, 6)),), "chain", Sampling(GREEDY))


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> SpeechLanguageModel:
    return SpeechLanguageModel.load(tiny_bundle / "language", device="cpu")


@pytest.fixture
def prompter(model: SpeechLanguageModel, tiny: Recipe) -> Prompter:
    return Prompter.of(model, tiny.serving)


@pytest.fixture
def engine(model: SpeechLanguageModel) -> Iterator[LocalEngine]:
    engine = LocalEngine(ContinuousBatch(model, 2), 60)
    yield engine
    until = time.monotonic() + 10
    while engine.ongoing and time.monotonic() < until:
        time.sleep(0.01)
    assert engine.ongoing == 0, "something is still generated for nobody"


def request(prompter: Prompter, task: Task = SPOKEN, seconds: float = 60) -> Request:
    prompt = prompter.prompt(task)
    assert isinstance(prompt, Prompt)
    return Request(prompt.ids, prompt.kind, prompt.sampling.generation, 0, seconds)


async def said(engine: LocalEngine, wanted: Request) -> list[int]:
    return [token async for few in engine.tokens(wanted) for token in few]


def test_more_than_fit_are_answered_as_alone(engine: LocalEngine, prompter: Prompter) -> None:
    alone = asyncio.run(said(engine, request(prompter)))

    async def crowd() -> list[list[int]]:
        return await asyncio.gather(*(said(engine, request(prompter)) for _ in range(5)))

    assert len(alone) > 20 and asyncio.run(crowd()) == [alone] * 5


def test_who_leaves_frees_the_engine(engine: LocalEngine, prompter: Prompter) -> None:
    async def leave_early() -> list[int]:
        async for few in engine.tokens(request(prompter)):
            return few
        raise AssertionError

    async def cancelled() -> None:
        begun = asyncio.Event()

        async def listening() -> None:
            async for _ in engine.tokens(request(prompter)):
                begun.set()

        task = asyncio.create_task(listening())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert asyncio.run(leave_early())
    asyncio.run(cancelled())


def test_a_late_reply_is_given_up(engine: LocalEngine, prompter: Prompter) -> None:
    with pytest.raises(TimeoutError, match="in time"):
        asyncio.run(said(engine, request(prompter, seconds=0.0)))


def test_a_prompt_that_does_not_fit_is_its_own_failure(engine: LocalEngine, prompter: Prompter) -> None:
    wrong = Request((5,) * 600, "text", GREEDY, 0, 60)
    with pytest.raises(ValueError, match="context"):
        asyncio.run(said(engine, wrong))
    assert asyncio.run(said(engine, request(prompter)))


def test_after_a_broken_step_the_next_reply_is_whole(
    engine: LocalEngine, prompter: Prompter, model: SpeechLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = asyncio.run(said(engine, request(prompter)))

    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(model.model, "forward", out_of_memory)
        with pytest.raises(RuntimeError, match="MemoryError"):
            asyncio.run(said(engine, request(prompter)))
    assert asyncio.run(said(engine, request(prompter))) == whole


def test_a_reply_unfolds_into_itself(prompter: Prompter) -> None:
    async def pieces(task: Task) -> list[object]:
        return [piece async for piece in prompter.unfold(task)]

    for task in (SPOKEN, Read("two plus three is five", Sampling(GREEDY))):
        *before, whole = asyncio.run(pieces(task))
        assert isinstance(whole, Reply) and whole.units
        assert [u for piece in before if isinstance(piece, Units) for u in piece.units] == whole.units
        for field in ("transcript", "text"):
            words = [piece.text for piece in before if isinstance(piece, Words) and piece.field == field]
            assert "".join(words) == (getattr(whole, field) or "")


@pytest.mark.parametrize("format", ["pcm", "mp3"])
def test_pieces_tell_all_seconds_that_were_made(format: str) -> None:
    """Whatever the format keeps back."""
    from speechgpt.speech.vocoder import Vocoder

    vocoder = Vocoder.load(bundle.load("nano", "").directory / "vocoder")
    units = np.random.default_rng(0).integers(0, vocoder.units, 150).tolist()

    async def reply() -> object:
        for start, end in ((0, 3), (3, 40), (40, 150)):
            yield Units(units[start:end])
        yield Reply("", "", units, True, "stop", 0, 0, 0, 0)

    async def heard() -> float:
        pieces = voiced(reply(), vocoder, Manner(format, 24_000), asyncio.to_thread)  # type: ignore[arg-type]
        return sum([piece.seconds async for piece in pieces if isinstance(piece, Sound)])

    assert asyncio.run(heard()) == pytest.approx(len(vocoder.synthesize([units])[0]) / 16_000)


def test_the_first_piece_is_about_as_long_as_the_first_sound_takes() -> None:
    """Of replies at every pace: most sound with it (slow ones with fewer units, quick ones with more), none with half
    of it."""
    from speechgpt.speech.encoder import SpeechEncoder
    from speechgpt.speech.vocoder import Vocoder

    directory = bundle.load("nano", "").directory
    vocoder = Vocoder.load(directory / "vocoder")
    waves = [decode(question) for question in questions()]
    first = first_piece(vocoder)
    replies = [heard.units.tolist() for heard in SpeechEncoder.load(directory / "encoder").encode(waves)]

    def sounding(count: int) -> int:
        return sum(len(VocoderStream(vocoder).push(units[:count])) > 0 for units in replies)

    assert sounding(first // 2) == 0 and sounding(first) > len(replies) / 2


def test_a_listener_who_goes_away_stops_the_generation(prompter: Prompter, tiny_bundle: Path) -> None:
    from speechgpt.speech.vocoder import Vocoder

    vocoder = Vocoder.load(tiny_bundle / "vocoder")
    stopped = False

    async def endless() -> object:
        nonlocal stopped
        try:
            while True:
                yield Units([1, 2, 3, 4] * 10)
        finally:
            stopped = True

    async def listen() -> None:
        pieces = voiced(endless(), vocoder, Manner("pcm", 24_000), asyncio.to_thread)  # type: ignore[arg-type]
        async for piece in pieces:
            assert isinstance(piece, Sound) and piece.data
            break
        await pieces.aclose()  # type: ignore[attr-defined]

    asyncio.run(listen())
    assert stopped
