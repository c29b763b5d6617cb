"""What the engine vLLM owes; run by test_vllm.py in an environment that has it (`pytest tests/serve/vllm_proofs.py`).

Order matters in the end: the last tests stop vLLM's process.
"""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch

from serve.engine import LocalEngine, Request
from serve.prompting import Ask, Dictate, Prompt, Prompter, Read, Sampling, Task
from serve.vllm_engine import VllmEngine
from speechgpt import recipe
from speechgpt.language import answers
from speechgpt.language.batching import ContinuousBatch
from speechgpt.language.config import GenerationSection
from speechgpt.language.generation import GrammarProcessor, cut_token, grammar
from speechgpt.language.model import SpeechLanguageModel
from speechgpt.language.prompts import PromptFormat, Turn, answer_template
from speechgpt.language.wording import Wording
from speechgpt.runtime import bundle
from speechgpt.runtime.config import ServingSection

T = TypeVar("T")
GREEDY = GenerationSection(temperature=0, max_new_tokens=400, max_text_tokens=60)
ANYTHING = GenerationSection(temperature=1, top_k=0, top_p=1, max_new_tokens=150, max_text_tokens=40)
QUESTIONS = ("what is two plus three", "what color is the sky", "what does a cow say", "is seven more than four")
INSTRUCTION = (
    "You are an AI assistant who listens and speaks. You can understand and answer the user both by text and speech. "
    "Answer politely, and say so if you do not know an answer. "
)


@pytest.fixture(scope="module")
def nano() -> Path:
    return bundle.load("nano", "").directory


@pytest.fixture(scope="module")
def serving() -> ServingSection:
    return recipe.load("nano", ("serving.language.engine=vllm", "serving.language.batch=8")).serving


@pytest.fixture(scope="module")
def model(nano: Path) -> SpeechLanguageModel:
    model = SpeechLanguageModel.load(nano / "language", device="cpu")
    model.model.float()
    return model


@pytest.fixture(scope="module")
def light(model: SpeechLanguageModel) -> LocalEngine:
    return LocalEngine(ContinuousBatch(model, 8), 600)


class Loop:
    """The one event loop that vLLM lives in."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(300)


@pytest.fixture(scope="module")
def loop() -> Loop:
    return Loop()


@pytest.fixture(scope="module")
def engine(nano: Path, serving: ServingSection) -> Iterator[VllmEngine]:
    engine = VllmEngine.load(nano / "language", None, Wording.load(nano / "language"), serving)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def _nobody_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        engine: VllmEngine = request.getfixturevalue("engine")
        # A dead one does not count any more; its replica is replaced.
        assert (engine.ongoing if engine._engine.errored else left(engine)) in (0, (0, 0)), "generated for nobody"


def left(engine: VllmEngine) -> tuple[int, int]:
    """Replies that we, and that vLLM thinks to be in the making."""
    return engine.ongoing, engine._engine.output_processor.get_num_unfinished_requests()


async def said(engine: VllmEngine | LocalEngine, wanted: Request) -> list[int]:
    return [token async for few in engine.tokens(wanted) for token in few]


async def all_said(engine: VllmEngine | LocalEngine, wanted: list[Request]) -> list[list[int]]:
    return await asyncio.gather(*(said(engine, request) for request in wanted))


@pytest.fixture(scope="module")
def questions(model: SpeechLanguageModel) -> list[tuple[int, ...]]:
    """The questions as the model itself would say them."""
    return [tuple(units) for units in model.speak(QUESTIONS, GREEDY)]


def tasks(questions: list[tuple[int, ...]], generation: GenerationSection) -> list[Task]:
    """One of each kind for each question: speech or text in, speech or text out, direct, dictation and reading."""
    sampling = Sampling(generation)
    made: list[Task] = []
    for text, units in zip(QUESTIONS, questions, strict=True):
        made += [Ask((Turn("user", units=units),), form, sampling) for form in ("chain", "text")]
        made += [Ask((Turn("user", text=text),), form, sampling) for form in ("chain", "text")]
        made += [Dictate(units, sampling), Read(text, sampling)]
    return made


def requests(
    wording: Wording, wanted: list[Task], *, seed: int = 0, seconds: float = 300, prefix: str | None = None
) -> list[Request]:
    if prefix is not None:
        wording = Wording(wording.vocabulary, PromptFormat(wording.prompts.dialect, prefix), wording.context)
    prompter = Prompter(wording, None, 0)  # type: ignore[arg-type]
    prompts = [prompter.prompt(task) for task in wanted]
    assert all(isinstance(prompt, Prompt) for prompt in prompts)
    return [Request(p.ids, p.kind, p.sampling.generation, seed, seconds) for p in prompts if isinstance(p, Prompt)]


def test_the_same_greedy_tokens_as_the_light_engine(
    engine: VllmEngine, light: LocalEngine, loop: Loop, model: SpeechLanguageModel, questions: list[tuple[int, ...]]
) -> None:
    asked = requests(model.wording, tasks(questions, GREEDY))
    expected = asyncio.run(all_said(light, asked))
    assert len(asked) == 24 and len({request.kind for request in asked}) == 6
    assert max(map(len, expected)) > 40
    assert loop.run(all_said(engine, asked)) == expected


def test_a_crowd_is_answered_as_each_alone(
    engine: VllmEngine, loop: Loop, model: SpeechLanguageModel, questions: list[tuple[int, ...]]
) -> None:
    for generation in (GREEDY, ANYTHING):
        asked = requests(model.wording, tasks(questions, generation)[:8])
        alone = [loop.run(said(engine, request)) for request in asked]
        assert loop.run(all_said(engine, asked)) == alone


def test_no_draw_breaks_the_grammar(
    engine: VllmEngine, loop: Loop, model: SpeechLanguageModel, questions: list[tuple[int, ...]]
) -> None:
    asked = [r for seed in range(4) for r in requests(model.wording, tasks(questions, ANYTHING), seed=seed)]
    drawn = loop.run(all_said(engine, asked))
    for request, reply in zip(asked, drawn, strict=True):
        regions = grammar(answer_template(model.prompts.dialect, request.kind), model.vocabulary)
        ends = {*regions.ending.tokens, cut_token(model.vocabulary)}
        rules = GrammarProcessor(
            regions,
            model.vocabulary,
            model.vocabulary.size,
            0,
            [ANYTHING.max_new_tokens + 1],
            ANYTHING.max_text_tokens,
        )
        for place, token in enumerate(reply):
            scores = rules(torch.tensor([reply[:place]], dtype=torch.long), torch.zeros(1, model.vocabulary.size))
            assert scores[0, token] == 0, (request.kind, reply[: place + 1])
        assert reply[-1] in ends or len(reply) == ANYTHING.max_new_tokens
        answer = answers.parse(reply, model.vocabulary, request.kind)
        assert answer.well_formed or answer.finish == "length"
    # The seed decides, and there is something to decide.
    half = len(asked) // 2
    assert loop.run(all_said(engine, asked[:half])) == drawn[:half] != drawn[half:]


def test_limits_of_a_request_are_its_own(
    engine: VllmEngine, loop: Loop, model: SpeechLanguageModel, questions: list[tuple[int, ...]]
) -> None:
    short = GenerationSection(temperature=0, max_new_tokens=7)
    terse = GenerationSection(temperature=0, max_text_tokens=2)
    [few] = requests(model.wording, [Read(QUESTIONS[0], Sampling(short))])
    [cut] = requests(model.wording, [Dictate(questions[0], Sampling(terse))])
    first, second = loop.run(all_said(engine, [few, cut]))
    assert len(first) == 7
    assert len(second) == 3 and second[-1] == cut_token(model.vocabulary)
    with pytest.raises(ValueError, match="context"):
        loop.run(said(engine, Request((5,) * 5000, "text", GREEDY, 0, 60)))


def test_an_instruction_is_read_once(engine: VllmEngine, loop: Loop, model: SpeechLanguageModel) -> None:
    asked = requests(model.wording, [Read(text, Sampling(GREEDY)) for text in QUESTIONS], prefix=INSTRUCTION)
    shared = os.path.commonprefix([request.ids for request in asked])
    assert len(shared) >= 32
    before = engine.reused
    for request in asked:
        loop.run(said(engine, request))
    # Whole blocks of 32 tokens, by every request but the first.
    assert engine.reused - before >= (len(asked) - 1) * (len(shared) // 32) * 32


def test_who_leaves_stops_the_generation_at_any_moment(
    engine: VllmEngine, loop: Loop, model: SpeechLanguageModel
) -> None:
    [long] = requests(model.wording, [Read(" ".join(QUESTIONS * 3), Sampling(ANYTHING))])

    async def close_after(count: int) -> None:
        async with aclosing(engine.tokens(long)) as tokens:
            while count and await anext(tokens, None):
                count -= 1
        assert left(engine) == (0, 0)

    async def cancel_after(count: int) -> None:
        heard = 0

        async def listen() -> None:
            nonlocal heard
            async for _ in closing(engine.tokens(long)):
                heard += 1

        task = asyncio.create_task(listen())
        while heard < count:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left(engine) == (0, 0)

    async def cancel_after_turns(turns: int) -> None:
        """However far it has come by then: not begun, on its way to vLLM, waiting."""
        task = asyncio.create_task(said(engine, long))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await until_left(engine)

    whole = loop.run(said(engine, long))
    for count in (0, 1, 2, 5, 20):
        loop.run(close_after(count))
        loop.run(cancel_after(count))
    for turns in range(12):
        loop.run(cancel_after_turns(turns))
    assert loop.run(said(engine, long)) == whole


async def closing(tokens: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """As `Prompter.unfold` takes them."""
    async with aclosing(tokens):
        async for few in tokens:
            yield few


async def until_left(engine: VllmEngine) -> None:
    async with asyncio.timeout(60):
        while left(engine) != (0, 0):
            await asyncio.sleep(0.01)


def test_a_late_reply_is_given_up(engine: VllmEngine, loop: Loop, model: SpeechLanguageModel) -> None:
    endless = GenerationSection(temperature=0, max_new_tokens=900)
    for seconds in (0.0, 0.02):
        [late] = requests(model.wording, [Read(" ".join(QUESTIONS * 8), Sampling(endless))], seconds=seconds)
        with pytest.raises(TimeoutError, match="in time"):
            loop.run(said(engine, late))


def test_a_silent_engine_is_unhealthy(engine: VllmEngine, loop: Loop, model: SpeechLanguageModel) -> None:
    """vLLM's processes are stopped, not ended, as if they hung."""
    engine.check()
    patient, engine._stuck_seconds = engine._stuck_seconds, 1.0
    [asked] = requests(model.wording, [Read(QUESTIONS[0], Sampling(GREEDY))])
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        process.suspend()
    try:
        waiting = asyncio.run_coroutine_threadsafe(said(engine, asked), loop._loop)
        until = time.monotonic() + 60
        with pytest.raises(RuntimeError, match="no token"):
            while time.monotonic() < until:
                engine.check()
                time.sleep(0.1)
    finally:
        for process in processes:
            process.resume()
        engine._stuck_seconds = patient
    assert waiting.result(120)
    engine.check()


def test_a_dead_engine_fails_its_replies_and_its_replica(
    engine: VllmEngine, loop: Loop, model: SpeechLanguageModel
) -> None:
    [asked] = requests(model.wording, [Read(" ".join(QUESTIONS * 3), Sampling(GREEDY))])

    async def killed() -> None:
        async for _ in closing(engine.tokens(asked)):
            for process in psutil.Process().children(recursive=True):
                if process.is_running() and "python" in process.name().lower() or "VLLM" in process.name():
                    process.send_signal(signal.SIGKILL)

    with pytest.raises(RuntimeError, match="generation failed"):
        loop.run(killed())
    with pytest.raises(RuntimeError, match="ended"):
        engine.check()
    with pytest.raises(RuntimeError, match="generation failed"):
        loop.run(said(engine, asked))


def test_an_adapter_changes_both_engines_alike(nano: Path, serving: ServingSection, loop: Loop, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base: Any = SpeechLanguageModel.load(nano / "language", device="cpu")
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base.model, settings).save_pretrained(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    model = SpeechLanguageModel.load(nano / "language", tmp_path / "adapter", device="cpu")
    model.model.float()
    asked = requests(model.wording, [Read(text, Sampling(GREEDY)) for text in QUESTIONS])
    expected = asyncio.run(all_said(LocalEngine(ContinuousBatch(model, 8), 600), asked))
    engine = VllmEngine.load(nano / "language", tmp_path / "adapter", model.wording, serving)
    try:
        assert loop.run(all_said(engine, asked)) == expected
    finally:
        engine.close()
