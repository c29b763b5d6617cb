"""The page of a data set of instruction rows: one HTML file that needs nothing else, with counts, plots and sound."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from speechgpt.evaluation import plots
from speechgpt.evaluation.pages import render_page
from speechgpt.language.prompts import Exchange, descriptions
from speechgpt.language.row_filter import is_personal, matches

_MEANINGS = {
    "units": "speech alone: stage 1 continues it",
    "text": "text question, text answer",
    "transcribe": "recognition: speech, and what it says",
    "speak": "speaking: text, and its speech",
    "s2s": "spoken question; transcript, text answer, spoken answer",
    "s2t": "spoken question; transcript, text answer",
    "t2s": "text question; text answer, spoken answer",
    "t2t": "text question; text answer, marked as such",
    "direct": "spoken question; text answer, spoken answer, no transcript",
    "standard": "spoken question; spoken answer, no text at all",
}


@dataclass(frozen=True)
class Sound:
    """Speech to listen to. data: a file in any format that `audio.decode` reads."""

    data: bytes
    source: Literal["recording", "vocoder"]


@dataclass(frozen=True)
class Example:
    """A row as it reads back. sounds: {units: what they sound like}, as far as that is known."""

    id: str
    kind: str
    category: str
    exchanges: Sequence[Exchange]
    bare_units: tuple[int, ...] = ()
    sounds: Mapping[tuple[int, ...], Sound] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetFacts:
    """What is counted.

    report: `instructions/report.json`. row_units, row_words: of each kind, units and words in each row [rows].
    seconds: of each clip. unit_counts: how often each unit of the codebook comes, merged [K]. wordings: of each
    cross-modal task, how many different ones the rows ask with. hidden: examples not shown for what they say.
    """

    title: str
    report: Mapping[str, Any]
    row_units: Mapping[str, np.ndarray]
    row_words: Mapping[str, np.ndarray]
    categories: Mapping[str, int]
    seconds: np.ndarray
    speakers: Mapping[str, int]
    unit_counts: np.ndarray
    wordings: Mapping[str, int]
    hidden: int = 0


def may_be_shown(exchanges: Sequence[Exchange]) -> bool:
    """Whether a row's texts pass the safety lists, whatever the recipe's filters kept: a page is handed around."""
    texts = [text for each in exchanges for text in (each.description, each.question, each.answer) if text]
    return not any(matches("harmful", text) or is_personal(text) for text in texts)


def render(facts: DatasetFacts, examples: Sequence[Example]) -> str:
    used = facts.unit_counts[facts.unit_counts > 0]
    with_units = {kind: values for kind, values in _in_order(facts.row_units).items() if values.any()}
    with_words = {kind: values for kind, values in _in_order(facts.row_words).items() if values.any()}
    return render_page(
        "dataset",
        {"count": _count, "brief": _brief},
        facts=facts,
        rows=_in_order(facts.report["rows"]),
        refused=sorted(facts.report["refused"].items(), key=lambda item: -item[1]),
        largest_category=max(facts.categories.values(), default=1),
        total=sum(facts.report["rows"].values()),
        total_refused=sum(facts.report["refused"].values()),
        meanings=_MEANINGS,
        hours=float(facts.seconds.sum()) / 3600,
        words={kind: _spread(values) for kind, values in facts.row_words.items()},
        units={kind: _spread(values) for kind, values in facts.row_units.items()},
        all_wordings={task: len(descriptions(task)) for task in ("transcribe", "speak")},
        dead=int((facts.unit_counts == 0).sum()),
        entropy=_entropy(used),
        unit_plot=plots.histograms(with_units, "units"),
        word_plot=plots.histograms(with_words, "words"),
        clip_plot=plots.histograms({"all clips": facts.seconds}, "seconds", "clips"),
        codebook_plot=plots.shares(facts.unit_counts, "units of the codebook, the most frequent first")
        if len(used)
        else "",
        examples=_by_kind(examples),
    )


def _in_order(by_kind: Mapping[str, Any]) -> dict[str, Any]:
    known = [kind for kind in _MEANINGS if kind in by_kind]
    return {kind: by_kind[kind] for kind in (*known, *sorted(set(by_kind) - set(known)))}


def _by_kind(examples: Sequence[Example]) -> dict[str, list[Example]]:
    grouped: dict[str, list[Example]] = {}
    for each in examples:
        grouped.setdefault(each.kind, []).append(each)
    return _in_order(grouped)


def _spread(values: np.ndarray) -> str:
    """Median, and the largest."""
    return f"{np.median(values):.0f}, up to {values.max():,}" if len(values) and values.any() else "–"


def _entropy(counts: np.ndarray) -> float:
    """Bits a unit, were each drawn by itself."""
    share = counts / max(counts.sum(), 1)
    return float(-(share * np.log2(share)).sum()) if len(counts) else 0.0


def _count(number: int) -> str:
    return f"{number:,}"


def _brief(units: Sequence[int]) -> str:
    """The first units of a sequence, as they are written."""
    return "".join(f"<{unit}>" for unit in units[:6]) + ("…" if len(units) > 6 else "")
