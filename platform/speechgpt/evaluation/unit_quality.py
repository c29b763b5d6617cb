"""How good discrete units are, before any language model: against phones, and against other speakers of the same words.

The measures are those of HuBERT (Hsu et al., 2021, section IV.F): phone purity, cluster purity and PNMI, the share of
the phones' uncertainty that knowing the unit removes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from rapidfuzz.distance import Levenshtein


@dataclass(frozen=True)
class Agreement:
    """Between units and phones, frame by frame; each is 1 at best."""

    phone_purity: float
    """Share of frames whose phone is the most common one of their unit."""
    cluster_purity: float
    """Share of frames whose unit is the most common one of their phone; falls as units get finer than phones."""
    pnmi: float


def agreement(units: Sequence[int], phones: Sequence[str]) -> Agreement:
    """units, phones: one of each a frame. Raises ValueError for none, or for different lengths."""
    if not len(units) or len(units) != len(phones):
        raise ValueError(f"{len(units)} units and {len(phones)} phones: one of each a frame is expected")
    names = {phone: index for index, phone in enumerate(sorted(set(phones)))}
    counts = np.zeros((max(units) + 1, len(names)), np.int64)
    np.add.at(counts, (np.asarray(units), np.array([names[phone] for phone in phones])), 1)
    joint = counts / len(units)  # whole counts, divided once: one phone alone has uncertainty 0, not almost 0
    of_unit, of_phone = counts.sum(1) / len(units), counts.sum(0) / len(units)
    there = joint > 0
    information = float((joint[there] * np.log(joint[there] / np.outer(of_unit, of_phone)[there])).sum())
    uncertainty = float(-(of_phone * np.log(of_phone)).sum())
    return Agreement(
        phone_purity=float(joint.max(1).sum()),
        cluster_purity=float(joint.max(0).sum()),
        pnmi=information / uncertainty if uncertainty > 0 else 1.0,
    )


def unit_error_rate(reference: Sequence[int], other: Sequence[int]) -> float:
    """Edits that turn one sequence of merged units into another, for each unit of the first."""
    return Levenshtein.distance(reference, other) / max(len(reference), 1)


def speaker_variance(clips: Mapping[tuple[str, str], Sequence[int]]) -> float | None:
    """Mean unit error rate between two speakers of the same text, over all pairs; 0 if units hold no speaker.

    clips: {(text, speaker): merged units}. None if no text has two speakers.
    """
    by_text: dict[str, list[Sequence[int]]] = {}
    for (text, _speaker), units in sorted(clips.items()):
        by_text.setdefault(text, []).append(units)
    rates = [unit_error_rate(a, b) for spoken in by_text.values() for a, b in combinations(spoken, 2)]
    return float(np.mean(rates)) if rates else None


def usage(units: Iterable[int], clusters: int) -> dict[str, float]:
    """Units that never occur, and the entropy of the others in bits (log2 K at most)."""
    counts = Counter(units)
    shares = np.array(list(counts.values())) / max(sum(counts.values()), 1)
    return {"dead": clusters - len(counts), "entropy_bits": float(-(shares * np.log2(shares)).sum())}
