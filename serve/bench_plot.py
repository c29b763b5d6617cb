"""The picture of `bench serve`: how long people wait for the first sound, and whether it goes on without a gap."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.bench import Heard

_COLOURS = {"streamed": "#2a6f97", "baseline": "#c08552"}


def draw(heard: "Heard", file: Path) -> None:
    """A column a load: above, the share of answers that have begun by when; below, sound that has come by when, and
    how it is played."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(heard), 6.4), layout="constrained")
    grid = figure.subplots(2, len(heard), squeeze=False)
    for (load, sides), (begins, comes) in zip(heard.items(), grid.T, strict=True):
        for side, answers in sides.items():
            good = [answer for answer in answers if not answer.error]
            first = np.sort([answer.first for answer in good])
            begins.step(
                first, np.arange(1, len(first) + 1) / len(first), where="post", label=side, color=_COLOURS[side]
            )
            for answer in good:
                # What comes whole is a line upwards.
                when, sound = zip((answer.first, 0.0), *answer.chunks, strict=True)
                comes.step(when, np.cumsum(sound), where="post", color=_COLOURS[side], linewidth=0.8, alpha=0.6)
        longest = max(answer.sound for answer in sides["streamed"] if not answer.error)
        start = np.median([answer.first for answer in sides["streamed"] if not answer.error])
        comes.plot([start, start + longest], [0, longest], color="0.6", linestyle=":", label="as it is played")
        begins.set(title=load, xlabel="seconds to the first sound", ylim=(0, 1.05), xlim=(0, None))
        comes.set(xlabel="seconds since it was asked for", xlim=(0, None), ylim=(0, None))
    grid[0][0].set_ylabel("share of answers")
    grid[1][0].set_ylabel("seconds of sound that have come")
    grid[0][0].legend(loc="lower right")
    grid[1][0].legend(loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
