"""Rows of a block, and attention that stays in them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from speechgpt.training.row_attention import NAME, fits, implementation, row_lengths


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 5))
def test_every_row_of_two_tokens_or_more_is_found(lengths: list[int], padding: int) -> None:
    positions = torch.cat([*(torch.arange(length) for length in lengths), torch.zeros(padding, dtype=torch.long)])
    found = row_lengths(positions[None])[0]
    assert sum(found) == len(positions)
    ends = list(torch.tensor(found).cumsum(0))
    for number, length in enumerate(lengths):
        end = sum(lengths[: number + 1])
        if length > 1:
            assert end in ends and found[ends.index(end)] == length


def test_padding_is_one_row_and_not_hundreds() -> None:
    assert row_lengths(torch.tensor([[0, 1, 2, 0, 0, 0, 0], [0, 0, 1, 0, 1, 2, 3]])) == [[3, 4], [1, 2, 4]]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (LlamaConfig(), True),
        (Qwen2Config(), True),
        (Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=1), False),
        (MistralConfig(sliding_window=4096), False),
        (MistralConfig(sliding_window=None), True),
    ],
)
def test_windows_are_left_to_transformers(config, wanted: bool) -> None:
    assert fits(config) is wanted
    assert (implementation(config) == NAME) is (wanted and not torch.cuda.is_available())
