"""The page of the paper's evaluation: one HTML file that needs nothing else, with tables, plots and sound."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from speechgpt.evaluation import plots
from speechgpt.evaluation.instruction_following import MODEL, Row
from speechgpt.evaluation.pages import render_page

if TYPE_CHECKING:
    from rich.table import Table

FORMS = {
    "s2s": "speech in, speech out",
    "s2t": "speech in, text out",
    "t2s": "text in, speech out",
    "t2t": "text in, text out",
}
WAYS = {"s2s": "transcript, text, speech", "direct": "text, speech", "standard": "speech alone"}


@dataclass(frozen=True)
class Sample:
    """A spoken question and its spoken answer. Sounds are files in any format that `audio.decode` reads."""

    row: Row
    question: bytes
    answer: bytes | None


def render(figures: Mapping[str, Any], samples: Sequence[Sample], title: str) -> str:
    """The page of `reports/instruction_following.json`."""
    scores = {
        f"{form}, {name}": counted["score"]
        for form, systems in figures["forms"].items()
        for name, counted in systems.items()
    }
    return render_page(
        "instruction_following",
        {"figure": _figure, "interval": _interval},
        title=title,
        figures=figures,
        model=MODEL,
        forms=FORMS,
        ways=WAYS,
        samples=samples,
        score_plot=plots.bars(scores, "mean score, 1 to 5, 95 % interval"),
    )


def tables(figures: Mapping[str, Any]) -> "list[Table]":
    """What the terminal shows: the forms, and the ablation if there was one."""
    from rich.table import Table

    forms = Table("form", "system", "asked", "score", "95 % interval", "right", title=f"scores by {figures['judge']}")
    for form, systems in figures["forms"].items():
        for name, counted in systems.items():
            shown = (_figure(counted["score"]), _interval(counted["score"]), _figure(counted["right"]))
            forms.add_row(FORMS[form], name, str(counted["asked"]), *shown)
    if not figures["ablation"]:
        return [forms]
    ablation = Table("trained for", *WAYS.values(), title="spoken answers without and with words before them")
    for trained, ways in figures["ablation"].items():
        ablation.add_row(trained, *(_figure(ways[way] and ways[way]["score"]) for way in WAYS))
    return [forms, ablation]


def _figure(score: Mapping[str, Any] | None) -> str:
    return "–" if score is None else f"{score['value']:.2f}"


def _interval(score: Mapping[str, Any] | None) -> str:
    return f"{score['low']:.2f} to {score['high']:.2f}, n = {score['count']}" if score else "not measured"
