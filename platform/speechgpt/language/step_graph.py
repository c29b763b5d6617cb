"""One token more for several replies, as a graph that runs without Python.

Of a small model's step on a CPU, half and more is transformers' Python around its layers. `torch.jit.trace` is
deprecated, but the only one of PyTorch's ways that helps here: the graph of `torch.export`, run from Python, gains a
tenth, and `torch.compile` is slower than no graph at 350 positions (nano, one core of an EPYC; traced, a step takes
half the time for one reply, three quarters for eight; of a model of 135 M eight tenths). So a graph is used only
where it gives the model's own numbers to the last bit, which is tried, and the model itself everywhere else.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

logger = logging.getLogger(__name__)

_TRIED = ((1, 2), (2, 31), (3, 64), (5, 300), (8, 77))
"""Rows and positions with which a graph is tried, as far as the model's context goes."""

LARGEST = 1_000_000_000
"""Parameters of a model that is worth it: a larger one's step takes so long that Python's part does not count, and so
would trying a graph."""


class Step(nn.Module):
    """The model's next token, from the last one of each reply and what was before."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, at: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Logits [rows, vocabulary]. ids, at: token and its position, each [rows, 1]. keys, values: of each layer,
        [rows, heads, positions, size]; what the token adds is written into them, at its position."""
        layers = [_Layer(*states, at) for states in zip(keys, values, strict=True)]
        seen = torch.arange(keys[0].shape[2], device=at.device) <= at
        made = self.model(
            input_ids=ids,
            position_ids=at,
            attention_mask=mask_of(seen[:, None, None], keys[0].dtype),
            past_key_values=Cache(layers=list(layers)),
            use_cache=True,
            logits_to_keep=1,
        )
        return made.logits[:, -1]


@torch.no_grad()
def traced(model: Any, shapes: Sequence[torch.Size], context: int) -> Any | None:
    """`Step` of a model on a CPU as a graph, or None where none gives what the model gives.

    shapes: of keys and values of each layer, [..., heads, positions, size]; of context: positions that there may be.
    """
    step = Step(model).eval()
    random = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().weight.shape[0]
    dtype = model.dtype

    def example(count: int, positions: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        ids = torch.randint(rows, (count, 1), generator=random)
        at = torch.randint(positions, (count, 1), generator=random)
        at[0] = positions - 1
        keys, values = (
            [torch.randn(count, heads, positions, size, generator=random).to(dtype) for *_, heads, _, size in shapes]
            for _ in range(2)
        )
        return ids, at, keys, values

    try:
        with _quietly():
            graph = torch.jit.freeze(torch.jit.trace(step, example(3, min(70, context)), check_trace=False))
        for count, positions in _TRIED:
            ids, at, keys, values = example(count, min(positions, context))
            own = [state.clone() for state in keys], [state.clone() for state in values]
            same = torch.equal(graph(ids, at, keys, values), step(ids, at, *own))
            if not (same and all(map(torch.equal, [*keys, *values], [*own[0], *own[1]]))):
                raise ValueError(f"another result for {count} rows of {positions} positions")
    except Exception as error:  # noqa: BLE001 - a model of any kind may have no such graph, and does well without
        logger.info("the model is run without a graph: %s", str(error).partition("\n")[0])
        return None
    return graph


@contextmanager
def _quietly() -> Iterator[None]:
    """Tracing warns of itself, and reads every property of the model, some of which warn."""
    speaker = logging.getLogger("transformers.modeling_utils")
    level = speaker.level
    speaker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        speaker.setLevel(level)


class _Layer(CacheLayerMixin):
    """Keys and values that lie elsewhere, all of them to be read."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._at = keys, values, at
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is missing."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        write(self.keys, self.values, self._at, key_states, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_max_length(self) -> int:
        return -1


def mask_of(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What transformers adds to the attention's scores, from which of them count: of the same shape."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def write(keys: Tensor, values: Tensor, at: Tensor, key_states: Tensor, value_states: Tensor) -> None:
    """Into keys and values [rows, heads, positions, size], what a pass made of its tokens [rows, heads, tokens, size].
    at: their positions [rows, tokens]."""
    places = at[:, None, :, None].expand_as(key_states)
    keys.scatter_(2, places, key_states)
    values.scatter_(2, places, value_states)
