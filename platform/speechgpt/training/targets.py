"""A SpeechInstruct row as tokens, with the weight that each has as a target of the loss."""

from typing import Literal

import numpy as np

from speechgpt.language.vocabulary import Vocabulary


def encode(
    vocabulary: Vocabulary, prefix: str, plain_text: str, loss_on: Literal["all", "reply"], unit_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (int32) and loss weights (float32) of one row, both [tokens].

    `all` masks the prefix alone; `reply` also what is not the assistant's turn, in rows that have turns. A unit weighs
    `unit_weight`, any other target 1.
    """
    row = vocabulary.encode_row(prefix, plain_text)
    ids = np.array(row.ids, dtype=np.int32)
    is_unit = (ids >= vocabulary.first_unit) & (ids < vocabulary.first_unit + vocabulary.unit_count)
    weights = np.where(is_unit, unit_weight, 1.0).astype(np.float32)
    weights[: row.masked] = 0
    if loss_on == "reply":
        weights[~_of_reply(ids, vocabulary.speechgpt, vocabulary.human)] = 0
    return ids, weights


def _of_reply(ids: np.ndarray, speechgpt: int, human: int) -> np.ndarray:
    """Where the assistant speaks: after each `[SpeechGPT]`, up to the next `[Human]`."""
    if speechgpt not in ids:
        return np.ones(len(ids), dtype=bool)
    # +1 where the assistant's turn begins, -1 where the user's does, each only if it is a change.
    speaker = np.zeros(len(ids), dtype=np.int8)
    speaker[ids == speechgpt], speaker[ids == human] = 1, -1
    turns = np.flatnonzero(speaker)
    current = speaker[turns[np.searchsorted(turns, np.arange(len(ids)), side="right") - 1]] == 1
    current[: turns[0]] = False
    return current & (ids != speechgpt)
