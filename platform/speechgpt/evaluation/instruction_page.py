"""The page of the paper's evaluation: one HTML file that needs nothing else, with tables, plots and sound."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from speechgpt.evaluation import plots
from speechgpt.evaluation.instruction_following import MODEL, Row
from speechgpt.speech import audio

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
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": _figure, "interval": _interval, "sound": _sound}
    template = environment.from_string(
        resources.files(__package__).joinpath("templates", "instruction_following.html.j2").read_text("utf-8")
    )
    scores = {
        f"{form}, {name}": counted["score"]
        for form, systems in figures["forms"].items()
        for name, counted in systems.items()
    }
    return template.render(
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


def _sound(data: bytes) -> str:
    """A data URI that every browser plays."""
    return "data:audio/mpeg;base64," + base64.b64encode(audio.encode(audio.decode(data), "mp3")).decode()
