"""The paper's evaluation (SPEC 1.6, 7): what is asked of whom, and from answers and verdicts to figures. Pure."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from speechgpt.evaluation.config import InstructionFollowingSection
from speechgpt.evaluation.examination import Clip, UnitLoss
from speechgpt.evaluation.judge import Item, Verdict
from speechgpt.evaluation.metrics import Bootstrap, Score, exact_matches, perplexity, ratio, share
from speechgpt.language.answers import Answer
from speechgpt.language.prompts import Kind
from speechgpt.language.script import spread

MODEL, STANDARD_MODEL = "model", "standard-trained model"
CASCADES = {"own": "cascade", "recogniser": "cascade with a recogniser"}
SPOKEN: frozenset[Kind] = frozenset({"s2s", "t2s", "direct", "standard"})
"""Kinds whose answer is speech; its score is that of what a recogniser hears."""
ABLATION: tuple[Kind, ...] = ("s2s", "direct", "standard")
"""Ways to ask for a spoken answer, from the whole chain to none of it; the paper's two are the first and the last."""
RETAINED: tuple[Kind, ...] = ("text", "t2t")


class Asking(NamedTuple):
    """A system, and the way in which it is asked every question."""

    system: str
    kind: Kind

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.system.replace(' ', '-')}.{self.kind}"

    @property
    def spoken(self) -> bool:
        return self.kind in SPOKEN


class Spoken(Protocol):
    """Anything that says a question."""

    @property
    def id(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def text(self) -> str | None: ...


Question = TypeVar("Question", bound=Spoken)


@dataclass(frozen=True)
class Row:
    """One question to one system in one way, and what became of it.

    heard: what the recogniser wrote of the spoken answer; None if there is none to hear, or nobody to hear it.
    score: of `heard` where the answer is speech, else of `text`; text_score: of `text`, where there is to be one.
    why, text_why: why there is no score: as in `Verdict`, or `unheard`, for want of a recogniser.
    """

    system: str
    kind: str
    id: str
    group: str
    speaker: str
    category: str
    question: str | None
    right: str | None
    transcript: str | None
    text: str | None
    heard: str | None
    units: int
    well_formed: bool
    finish: str
    score: int | None
    why: str
    text_score: int | None
    text_why: str


def chosen(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """`count` of them, none asked twice: of each question, the one in the voice that the seed draws."""
    of_text: dict[str, Question] = {}
    for each in sorted(questions, key=lambda q: hashlib.sha256(f"{seed}:{q.id}".encode()).digest()):
        of_text.setdefault(each.text or each.id, each)
    return spread(list(of_text.values()), count, seed)


def askings(section: InstructionFollowingSection) -> list[Asking]:
    """All that a run asks, each once."""
    found = [Asking(MODEL, form) for form in section.forms]
    for place, ears in enumerate(section.cascade):
        # Without ears all cascades are one, and without ears and voice it is the model itself.
        kinds: tuple[Kind, ...] = ("s2s", "s2t") if place else ("s2s", "s2t", "t2s")
        found += [Asking(CASCADES[ears], kind) for kind in kinds if kind in section.forms]
    if section.ablation:
        found += [asking for kind in ABLATION if (asking := Asking(MODEL, kind)) not in found]
        if section.standard:
            found += [Asking(STANDARD_MODEL, kind) for kind in ABLATION if kind != "direct"]
    return found


def askable(clips: Sequence[Clip], asking: Asking) -> list[Clip]:
    """Those that have what it is asked with: a typed question needs words."""
    return [clip for clip in clips if clip.text or asking.kind not in ("t2s", "t2t")]


def items(clip: Clip, asking: Asking, answer: Answer, heard: str | None) -> tuple[Item | None, Item | None]:
    """What is judged of one answer: (what the form gives, its text if the form gives speech with one)."""
    text = Item(clip.text, answer.text or "", clip.answer, answer.well_formed)
    if not asking.spoken:
        return text, None
    return None if heard is None else text._replace(reply=heard), None if asking.kind == "standard" else text


def aloud(heard: Mapping[str, str] | None, clip: str) -> str | None:
    """What was heard of the answer to a clip: nothing, if nothing was said; None, if nobody listened."""
    return None if heard is None else heard.get(clip, "")


def rows(
    asking: Asking,
    clips: Sequence[Clip],
    answers: Mapping[str, Answer],
    heard: Mapping[str, str] | None,
    verdict: Callable[[Item], Verdict],
) -> list[Row]:
    """A row for each clip. heard: by clip id, what a recogniser wrote of the spoken answers; None: there is none."""
    made = []
    for clip in clips:
        answer = answers[clip.id]
        judged, also = items(clip, asking, answer, aloud(heard, clip.id))
        main = verdict(judged) if judged else None
        text = verdict(also) if also else None
        made.append(
            Row(
                system=asking.system,
                kind=asking.kind,
                id=clip.id,
                group=clip.group,
                speaker=clip.speaker,
                category=clip.category,
                question=clip.text,
                right=clip.answer,
                transcript=answer.transcript,
                text=answer.text,
                heard=heard.get(clip.id) if heard is not None and asking.spoken else None,
                units=len(answer.units or ()),
                well_formed=answer.well_formed,
                finish=answer.finish,
                score=main.score if main else None,
                why=main.why if main else "unheard",
                text_score=text.score if text else None,
                text_why=text.why if text else "",
            )
        )
    return made


def tally(rows: Sequence[Row], bootstrap: Bootstrap) -> dict[str, Any]:
    """What one system made of one way to be asked; `scored` and the three reasons for no score add up to `asked`."""
    known = [row for row in rows if row.right is not None and (row.kind not in SPOKEN or row.why != "unheard")]
    said = [(row.heard or "") if row.kind in SPOKEN else row.text for row in known]
    scores = [row.score for row in rows if row.score is not None]
    texts = [row.text_score for row in rows if row.text_score is not None]
    why = Counter(row.why for row in rows if row.score is None)
    return {
        "asked": len(rows),
        "scored": len(scores),
        "unreadable": why["unreadable"],
        "unknown": why["unknown"],
        "unheard": why["unheard"],
        "score": _plain(_mean(scores, bootstrap)),
        "text_score": _plain(_mean(texts, bootstrap)),
        "right": _plain(share(exact_matches([row.right or "" for row in known], said), bootstrap)),
        "well_formed": _plain(share([row.well_formed for row in rows], bootstrap)),
        "given": {str(score): scores.count(score) for score in range(1, 6)},
    }


def advantage(rows: Sequence[Row], others: Sequence[Row], bootstrap: Bootstrap) -> dict[str, Any] | None:
    """How much higher the first score, on the questions that both have a score for."""
    theirs = {row.id: row.score for row in others if row.score is not None}
    return _plain(
        _mean(
            [row.score - theirs[row.id] for row in rows if row.score is not None and row.id in theirs],
            bootstrap,
        )
    )


def figures(rows: Sequence[Row], section: InstructionFollowingSection, bootstrap: Bootstrap) -> dict[str, Any]:
    """`forms` (the model and its cascades, by form), `ablation` and `by_category`, from all rows of a run."""
    of: dict[Asking, list[Row]] = {}
    for row in rows:
        of.setdefault(Asking(row.system, row.kind), []).append(row)  # type: ignore[arg-type]
    forms: dict[str, Any] = {}
    for form in section.forms:
        systems = [name for name in (MODEL, *CASCADES.values()) if Asking(name, form) in of]
        forms[form] = {name: tally(of[Asking(name, form)], bootstrap) for name in systems}
        for name in systems[1:]:
            ours, theirs = of[Asking(MODEL, form)], of[Asking(name, form)]
            forms[form][name]["model_is_better_by"] = advantage(ours, theirs, bootstrap)
    return {
        "rows": len(rows),
        "forms": forms,
        "ablation": _ablation(of, bootstrap) if section.ablation else None,
        "categories": {form: _categories(of.get(Asking(MODEL, form), []), bootstrap) for form in section.forms},
    }


def _ablation(of: Mapping[Asking, Sequence[Row]], bootstrap: Bootstrap) -> dict[str, Any]:
    """{trained for: {asked for: its tally}}; null where it was not measured."""
    return {
        trained: {
            kind: tally(of[asking], bootstrap) if (asking := Asking(who, kind)) in of else None for kind in ABLATION
        }
        for trained, who in (("chain", MODEL), ("standard", STANDARD_MODEL))
    }


def _categories(rows: Sequence[Row], bootstrap: Bootstrap) -> dict[str, Any]:
    by: dict[str, list[int]] = {}
    for row in rows:
        if row.score is not None:
            by.setdefault(row.category, []).append(row.score)
    return {name: _plain(_mean(scores, bootstrap)) for name, scores in sorted(by.items())}


def retention(
    clips: Sequence[Clip],
    losses: Mapping[str, Sequence[UnitLoss]],
    replies: Mapping[str, Sequence[str | None]],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """What a model knows in text alone, by the kind of row it is asked with: perplexity of the right answers' tokens,
    and the share of its own answers that are right. losses, replies: for each clip, in order."""
    right = [clip.answer or "" for clip in clips]
    return {
        kind: {
            "asked": len(clips),
            "perplexity": _plain(
                perplexity([loss.nats for loss in losses[kind]], [loss.tokens for loss in losses[kind]], bootstrap)
            ),
            "right": _plain(share(exact_matches(right, replies[kind]), bootstrap)),
        }
        for kind in RETAINED
    }


def headlines(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that a table of runs shows, from the whole of a report; null where nothing could be measured."""
    recognised = figures["task_recognition"]
    return {
        "questions": figures["questions"],
        "rows": figures["rows"],
        "score": _values(figures["forms"], "score"),
        "right": _values(figures["forms"], "right"),
        "ablation": _values(figures["ablation"] or {}, "score"),
        "task_recognition": _value(recognised["all"]) if recognised else None,
        "retention": {measure: _values(figures["retention"] or {}, measure) for measure in ("right", "perplexity")},
    }


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as they are written, in a fixed order."""
    return [asdict(row) for row in sorted(rows, key=lambda row: (row.system, row.kind, row.id))]


def _values(measured: Mapping[str, Mapping[str, Any]], measure: str) -> dict[str, dict[str, float | None]]:
    """One measure out of figures two levels down."""
    return {
        name: {key: found and _value(found[measure]) for key, found in inner.items()}
        for name, inner in measured.items()
    }


def _value(score: Mapping[str, Any] | None) -> float | None:
    return None if score is None else score["value"]


def _mean(values: Sequence[float], bootstrap: Bootstrap) -> Score | None:
    return ratio(values, [1.0] * len(values), bootstrap)


def _plain(score: Score | None) -> dict[str, Any] | None:
    return None if score is None else score.figures()
