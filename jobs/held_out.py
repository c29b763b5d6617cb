"""Rows that a stage does not learn from: what it is validated on, and what it is asked while it trains."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

    from speechgpt.language.prompts import Kind, PromptFormat
    from speechgpt.language.vocabulary import Vocabulary
    from speechgpt.training.config import StageSection

RETAINED = "retained_text_"
"""Prefix of the figures on held-out text rows, whatever the stage learns: what it costs the model's text."""
_TRAIN = "train"
_LARGEST_SHARE = 20
"""At most one row in so many is held out of a kind."""


class Question(NamedTuple):
    """A held-out prompt. Travels to the worker that asks it."""

    kind: "Kind"
    ids: list[int]
    shown: str
    """The row's own text, its answer included, for whoever compares."""


class HeldOut(NamedTuple):
    """What a stage's worker takes with it."""

    sets: "Mapping[str, pa.Table]"
    """Packed blocks by prefix of their figures, as `Validation` takes them."""
    questions: list[Question]


def divided(rows: "pa.Table", stage: "StageSection") -> "tuple[pa.Table, pa.Table]":
    """(rows to learn from, rows held out), from rows of any kind with `id, kind, split`.

    What is not of the split `train` is held out. Of a kind without such rows, the ids whose hashes come first are: the
    same in every stage, so that none learns what another is validated on. A held-out sentence may still be heard in
    another row, spoken by another voice; a split in the manifest keeps that out, too. Without `validate_every` nothing
    more than the split's is kept from training.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    mask = pc.not_equal(rows["split"], _TRAIN)
    if stage.validate_every:
        held, ids, kinds = mask.to_pylist(), rows["id"].to_pylist(), rows["kind"].to_pylist()
        has_its_own = {kind for kind, out in zip(kinds, held, strict=True) if out}
        of_kind: dict[str, list[tuple[str, int]]] = {}
        for place, (name, kind) in enumerate(zip(ids, kinds, strict=True)):
            if kind not in has_its_own:
                of_kind.setdefault(kind, []).append((hashlib.sha256(name.encode()).hexdigest(), place))
        for hashed in of_kind.values():
            for _, place in sorted(hashed)[: min(stage.validation_rows, len(hashed) // _LARGEST_SHARE)]:
                held[place] = True
        mask = pa.array(held, pa.bool_())
    return rows.filter(pc.invert(mask)), rows.filter(mask)


def prepared(held: "pa.Table", stage: "StageSection", directory: Path) -> HeldOut | None:
    """Held-out rows as blocks and questions for the model in `directory`; None if none is of the stage's kinds."""
    import pyarrow as pa

    from speechgpt.training import starting

    vocabulary, prompts = starting.interface(directory)
    learnt: set[str] = {kind for kind, weight in stage.mixture.items() if weight > 0}
    rows = held.sort_by("id").to_pylist()
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest()):
        by_kind.setdefault(row["kind"], []).append(row)
    by_kind = {kind: of_kind[: stage.validation_rows] for kind, of_kind in by_kind.items()}
    own = [row for kind, of_kind in sorted(by_kind.items()) if kind in learnt for row in of_kind]
    sets: dict[str, pa.Table] = {}
    for prefix, chosen in (("", own), (RETAINED, by_kind.get("text", []))):
        if table := _packed(chosen, vocabulary, stage):
            sets[prefix] = table
    return HeldOut(sets, _questions(by_kind, learnt, stage, vocabulary, prompts)) if "" in sets else None


def _packed(rows: list[dict[str, Any]], vocabulary: "Vocabulary", stage: "StageSection") -> "pa.Table | None":
    """Rows in order, as many a block as fit; those longer than a block are left out, as in training."""
    from speechgpt.training import blocks, packing
    from speechgpt.training.targets import encode

    filled: list[list[tuple[Any, Any]]] = []
    room = 0
    for row in rows:
        encoded = encode(vocabulary, row["prefix"], row["plain_text"], stage.loss_on, stage.unit_weight)
        length = len(encoded[0])
        if length > stage.block:
            continue
        if length > room:
            filled.append([])
            room = stage.block
        filled[-1].append(encoded)
        room -= length
    if not filled:
        return None
    packed = [packing.pack(part, stage.block, vocabulary.pad) for part in filled]
    return blocks.table(range(len(packed)), packed)


def _questions(
    by_kind: Mapping[str, list[dict[str, Any]]],
    learnt: set[str],
    stage: "StageSection",
    vocabulary: "Vocabulary",
    prompts: "PromptFormat",
) -> list[Question]:
    """Prompts of the stage's kinds in turn. Kinds without a question (bare units) and rows of no template have none."""
    from speechgpt.language.prompts import read_row

    found: list[Question] = []
    of_kind = [list(rows) for kind, rows in sorted(by_kind.items()) if kind in learnt]
    while len(found) < stage.answers and any(of_kind):
        for rows in of_kind:
            if not rows or len(found) == stage.answers:
                continue
            row = rows.pop(0)
            try:
                exchange = read_row(prompts.dialect, row["plain_text"])[0]
            except ValueError:
                continue
            ids = vocabulary.encode_prompt(prompts.ask(exchange, row["prefix"]))
            if len(ids) < stage.block:
                found.append(Question(exchange.kind, ids, row["plain_text"]))
    return found
