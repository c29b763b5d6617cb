"""Which row comes next: the mixture of a stage as one endless, seeded sequence."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from speechgpt.training.config import RowKind

BY_CATEGORY: frozenset[RowKind] = frozenset({"text", "s2s", "s2t", "t2s", "t2t", "direct", "standard"})
"""Kinds whose categories are drawn evenly: a small category (capitals) is learnt as well as a large one (sums)."""


def draw(kinds: Sequence[str], categories: Sequence[str], mixture: Mapping[RowKind, float], seed: int) -> Iterator[int]:
    """Yield row numbers for ever.

    kinds, categories: one entry a row. A row's kind is drawn with probability proportional to `mixture`; the kind's
    categories take turns; within a category every row comes once, in a new random order, before any comes again.
    The sequence depends on nothing but the arguments.

    Raises ValueError when the mixture asks for a kind that no row has.
    """
    wanted = [kind for kind, weight in mixture.items() if weight > 0]
    if not wanted:
        raise ValueError("mixture: every weight is zero; give at least one kind of row a positive weight")
    members: dict[str, dict[str, list[int]]] = {kind: {} for kind in wanted}
    for number, (kind, category) in enumerate(zip(kinds, categories, strict=True)):
        if kind in members:
            members[kind].setdefault(category if kind in BY_CATEGORY else "", []).append(number)
    if missing := [kind for kind in wanted if not members[kind]]:
        raise ValueError(f"mixture: no rows of kind {missing}; there are rows of kind {sorted(set(kinds))}")
    weights = np.array([mixture[kind] for kind in wanted], dtype=float)
    seeds = np.random.SeedSequence(seed)
    of_kind = {kind: _turns(members[kind], seeds.spawn(1)[0]) for kind in wanted}
    choice = np.random.default_rng(seeds)
    while True:
        for kind in choice.choice(len(wanted), size=1024, p=weights / weights.sum()):
            yield next(of_kind[wanted[kind]])


def _turns(members: Mapping[str, list[int]], seeds: np.random.SeedSequence) -> Iterator[int]:
    """The categories take turns, in a new order each round."""
    rng = np.random.default_rng(seeds)
    queues = [_epochs(members[category], np.random.default_rng(seeds.spawn(1)[0])) for category in sorted(members)]
    while True:
        for category in rng.permutation(len(queues)):
            yield next(queues[category])


def _epochs(rows: Sequence[int], rng: np.random.Generator) -> Iterator[int]:
    while True:
        for position in rng.permutation(len(rows)):
            yield rows[position]
