"""The report of an evaluation: one HTML file that needs nothing else, with tables, plots and sound."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speechgpt.evaluation import plots
from speechgpt.evaluation.examination import Clip
from speechgpt.evaluation.pages import render_page
from speechgpt.language.answers import Answer

_HEADLINES = {
    "recognition_wer": ("Recognition WER", "the model writes down a spoken question"),
    "answer_accuracy": ("Answer accuracy", "its text answer to a spoken question says the right words"),
    "original_wer": ("Original WER", "the independent recogniser on the recordings themselves"),
    "resynthesis_wer": ("Resynthesis WER", "the same, after speech → units → vocoder"),
    "spoken_answer_wer": ("Spoken-answer WER", "what is heard of its spoken answers, against its own text answers"),
    "format_validity": ("Format validity", "replies with exactly the parts asked for, each closed"),
}
_GROUPS = {
    "seen": "voices that training heard",
    "stranger": "held-out voices",
    "recording": "real recordings",
    "manifest": "the manifest",
}
_STAGE_COLUMNS = {
    "recognition_wer": "Recognition WER",
    "recognition_wer_strangers": "… held-out voices",
    "answer_accuracy": "Answers, spoken question",
    "answer_accuracy_strangers": "… held-out voices",
    "typed_answer_accuracy": "Answers, typed question",
    "unit_perplexity": "Unit perplexity",
}


@dataclass(frozen=True)
class Sample:
    """A dialogue to listen to. Sounds are files in any format that `audio.decode` reads; None was not made."""

    clip: Clip
    reply: Answer
    heard: str | None
    question: bytes
    resynthesis: bytes | None
    answer: bytes | None


def render(
    figures: Mapping[str, Any], samples: Sequence[Sample], title: str, curves: Mapping[str, Sequence[tuple[int, float]]]
) -> str:
    """The page. figures: as `scoring.figures` gives them, with `stages` in `detail`; curves: {stage: (step, loss)}."""
    detail = figures["detail"]
    categories = dict(sorted(detail["categories"].items(), key=lambda item: -(item[1] or {"value": -1})["value"]))
    return render_page(
        "report",
        {"figure": _figure, "interval": _interval},
        title=title,
        figures=figures,
        detail=detail,
        headlines=_HEADLINES,
        groups=_GROUPS,
        stage_columns=_STAGE_COLUMNS,
        samples=samples,
        loss_plot=plots.loss_curves(curves),
        category_plot=plots.bars(categories, "share of answers right, 95 % interval"),
    )


def _figure(score: Mapping[str, Any] | float | None) -> str:
    """0.123 · 12.3 · – (not measured)."""
    value = score["value"] if isinstance(score, Mapping) else score
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _interval(score: Mapping[str, Any] | None) -> str:
    return f"{_figure(score['low'])} to {_figure(score['high'])}, n = {score['count']}" if score else "not measured"
