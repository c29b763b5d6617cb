"""What a service asks of the language model, and what comes back; plain Python, to run inside and outside Serve."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from speechgpt.language.config import GenerationSection, ReplyForm

if TYPE_CHECKING:
    from speechgpt.language.console import Part
    from speechgpt.language.model import SpeechLanguageModel
    from speechgpt.language.prompts import Kind, Turn
    from speechgpt.language.segments import Segment

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens drawn. seed: None where the client left it open."""

    generation: GenerationSection
    seed: int | None = None


@dataclass(frozen=True)
class Ask:
    """A dialogue whose last turn is to be answered; earlier turns have their text."""

    dialogue: "tuple[Turn, ...]"
    form: ReplyForm
    sampling: Sampling


@dataclass(frozen=True)
class Dictate:
    """Units to be written down."""

    units: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Read:
    """Text to be said, as units."""

    text: str
    sampling: Sampling


@dataclass(frozen=True)
class Typed:
    """A line of the published console (see `speechgpt.language.console`)."""

    parts: "tuple[Part, ...]"
    sampling: Sampling


Task = Ask | Dictate | Read | Typed


@dataclass(frozen=True)
class Prompt:
    """A task that fits the model. The counts are tokens; units are tokens, too."""

    segments: "tuple[Segment, ...]"
    kind: "Kind"
    sampling: Sampling
    text_tokens: int
    audio_tokens: int

    @property
    def group(self) -> tuple[str, str, int | None]:
        """Prompts of one group are generated in one batch."""
        generation = self.sampling.generation
        return self.kind, generation.model_dump_json(), self.sampling.seed if generation.temperature else None


@dataclass(frozen=True)
class TooLong:
    """A task that leaves no room for an answer: its tokens, and the model's context.

    A value, not an exception: it is the client's fault and no failure of the replica.
    """

    tokens: int
    context: int


@dataclass(frozen=True)
class Reply:
    """An answer (see `speechgpt.language.answers.Answer`), and what it cost in tokens."""

    transcript: str | None
    text: str | None
    units: list[int]
    well_formed: bool
    finish: Literal["stop", "length"]
    prompt_text_tokens: int
    prompt_audio_tokens: int
    text_tokens: int
    audio_tokens: int


class Prompter:
    """A bundle's language model, as tasks and replies."""

    def __init__(self, model: "SpeechLanguageModel") -> None:
        self._model = model

    @classmethod
    def load(cls, bundle: Path) -> "Prompter":
        from speechgpt.language.model import SpeechLanguageModel

        adapter = bundle / "adapter"
        return cls(SpeechLanguageModel.load(bundle / "language", adapter if adapter.is_dir() else None))

    @property
    def unit_count(self) -> int:
        return self._model.vocabulary.unit_count

    def prompt(self, task: Task) -> Prompt | TooLong:
        from speechgpt.language import console
        from speechgpt.language.prompts import kind_of

        prompts = self._model.prompts
        kind: Kind
        match task:
            case Ask(dialogue, form, sampling):
                segments, kind = prompts.dialogue(dialogue, form), kind_of(dialogue[-1], form)
            case Dictate(units, sampling):
                segments, kind = prompts.transcription(units), "transcribe"
            case Read(text, sampling):
                segments, kind = prompts.speaking(text), "speak"
            case Typed(parts, sampling) if self._model.vocabulary.markers == "released":
                segments, kind = console.published_prompt(prompts.prefix, parts), console.task(parts)
            case Typed(parts, sampling):
                segments, kind = console.taught_prompt(prompts, parts)
        ids = self._model.vocabulary.encode_prompt(segments)
        context = self._model.model.config.max_position_embeddings
        if len(ids) >= context:
            return TooLong(len(ids), context)
        heard = len(self._model.vocabulary.units(ids))
        return Prompt(tuple(segments), kind, sampling, len(ids) - heard, heard)

    def generate(self, prompts: Sequence[Prompt]) -> list[Reply]:
        """One batch for each group of equal kind and sampling."""
        return in_groups(prompts, lambda prompt: prompt.group, self._generate)

    def _generate(self, prompts: list[Prompt]) -> list[Reply]:
        kind, sampling = prompts[0].kind, prompts[0].sampling
        seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
        answers = self._model.reply([prompt.segments for prompt in prompts], kind, sampling.generation, seed)
        count = self._model.vocabulary.encode_plain
        return [
            Reply(
                answer.transcript,
                answer.text,
                answer.units or [],
                answer.well_formed,
                answer.finish,
                prompt.text_tokens,
                prompt.audio_tokens,
                text_tokens=len(count(answer.transcript or "")) + len(count(answer.text or "")),
                audio_tokens=len(answer.units or []),
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def in_groups(items: Sequence[T], key: Callable[[T], object], work: Callable[[list[T]], Sequence[R]]) -> list[R]:
    """`work` on each group of items of equal key; results in the order of the items."""
    results: dict[int, R] = {}
    keys = [key(item) for item in items]
    for wanted in dict.fromkeys(keys):
        chosen = [i for i, found in enumerate(keys) if found == wanted]
        results.update(zip(chosen, work([items[i] for i in chosen]), strict=True))
    return [results[i] for i in range(len(items))]
