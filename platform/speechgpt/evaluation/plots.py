"""The report's plots, as SVG that stands inside the page."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOUR = "#2a6f97"
_SMOOTHING = 0.1
"""Share of a curve's points that its running mean is taken over."""
_SMALL = {"labelsize": 8}


def loss_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """One panel a stage: (step, loss) as logged, faint, and its running mean."""
    shown = {stage: points for stage, points in curves.items() if points}
    if not shown:
        return ""
    figure, panels = _panels(len(shown), width=2.6 * len(shown), height=2.2)
    for axes, (stage, points) in zip(panels, shown.items(), strict=True):
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        axes.plot(steps, losses, color=_COLOUR, alpha=0.3, linewidth=0.8)
        axes.plot(steps, _running_mean(losses), color=_COLOUR, linewidth=1.6)
        axes.set_title(stage, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
    panels[0].set_ylabel("loss, nats a token", fontsize=8)
    return _svg(figure)


def bars(scores: Mapping[str, Mapping[str, Any] | None], label: str) -> str:
    """A horizontal bar for each score, with its 95 % interval; what was not measured is left out."""
    shown = [(name, score) for name, score in scores.items() if score]
    if not shown:
        return ""
    figure, (axes,) = _panels(1, width=5.2, height=0.5 + 0.26 * len(shown))
    values = [score["value"] for _, score in shown]
    spans = [
        [score["value"] - score["low"] for _, score in shown],
        [score["high"] - score["value"] for _, score in shown],
    ]
    # A percentile interval of a few utterances may lie beside its value; a bar cannot be drawn backwards.
    errors = [[max(0.0, length) for length in side] for side in spans]
    axes.barh(
        range(len(shown)), values, xerr=errors, color=_COLOUR, height=0.65, error_kw={"linewidth": 1, "ecolor": "#444"}
    )
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(label, fontsize=8)
    return _svg(figure)


def histograms(values: Mapping[str, np.ndarray], label: str, unit: str = "rows") -> str:
    """One panel for each name: how often each value comes, the rarest hundredth of large ones left out to the right."""
    shown = {name: numbers for name, numbers in values.items() if len(numbers)}
    if not shown:
        return ""
    columns = min(len(shown), 4)
    figure, panels = _panels(columns, 2.5 * columns, 2.1 * -(-len(shown) // columns), -(-len(shown) // columns))
    for axes, (name, numbers) in zip(panels, shown.items(), strict=False):
        most = float(np.quantile(numbers, 0.99))
        axes.hist(np.minimum(numbers, most), bins=24, color=_COLOUR)
        axes.axvline(float(np.median(numbers)), color="#444", linewidth=1, linestyle=":")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.locator_params(axis="both", nbins=4)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    panels[0].set_ylabel(unit, fontsize=8)
    return _svg(figure)


def shares(counts: np.ndarray, label: str) -> str:
    """How unevenly things are used: the count of each, from the most used to the least."""
    figure, (axes,) = _panels(1, width=5.2, height=2.2)
    axes.fill_between(range(1, len(counts) + 1), np.sort(counts)[::-1], color=_COLOUR, step="mid", linewidth=0)
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("times", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0.5, len(counts) + 0.5)
    return _svg(figure)


def _running_mean(values: Sequence[float]) -> list[float]:
    reach = max(1, round(len(values) * _SMOOTHING / 2))
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _panels(count: int, width: float, height: float, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, count, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(**_SMALL)
    return figure, panels


def _svg(figure: "Figure") -> str:
    import matplotlib

    buffer = io.StringIO()
    # Fixed ids and no date: the same figures give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "speechgpt"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]
