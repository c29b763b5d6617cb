"""Continuous batching: replies of several requests from shared forward passes, each joining and leaving as it comes.

transformers' own continuous batching takes one set of logits processors for all requests and draws from one random
state; a reply here has a grammar, sampling and seed of its own. So the loop is ours and everything in it is theirs:
the model's forward pass, the cache's interface, the warpers.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from speechgpt.language import step_graph
from speechgpt.language.config import GenerationSection
from speechgpt.language.generation import Decoder, Grammar, allowed_tokens, choose, grammar
from speechgpt.language.model import SpeechLanguageModel, seed_of
from speechgpt.language.prompts import Kind, answer_template
from speechgpt.language.segments import Template
from speechgpt.language.step_graph import mask_of, traced, write
from speechgpt.speech.packed_products import exchange_linears

_OWN, _NONE = "default", "__base__"
"""PEFT's words for the adapter that a model was loaded with, and for none."""
_GROWTH = 256
"""Positions by which the cache grows."""
_SMALL = 100_000_000
"""Parameters of a model whose products are as fast with its weights as they lie."""


class Sampled(NamedTuple):
    """One new token of one reply. ended: it was the reply's last."""

    ticket: int
    token: int
    ended: bool


@dataclass
class _Row:
    """A reply that has a row of the cache. length: positions of it that are filled. adapter: that it is made with."""

    ticket: int
    decoder: Decoder
    length: int
    adapter: str


class ContinuousBatch:
    """Replies in the making. Each is what `SpeechLanguageModel.reply` gives for its prompt alone, whoever else is here.

    Not thread-safe: one thread adds, drops and steps. slots: replies that are worked on at a time; more wait in order.
    adapters: LoRA directories by the name under which a reply may ask for one in place of the model's own; all of them
    are kept in memory. quick: on CPUs, a model without adapters to choose from that is not very large steps without
    Python (`step_graph`), and the weights of one that is not very small are laid out anew for products
    (`packed_products`), in the model itself.
    """

    def __init__(
        self,
        model: SpeechLanguageModel,
        slots: int,
        adapters: Mapping[str, Path] | None = None,
        *,
        quick: bool = False,
    ) -> None:
        self._model, self._slots = model, slots
        # transformers looks for them among all parameters each time.
        self._device, self._dtype = model.model.device, model.model.dtype
        self._adapted = {"": _OWN if isinstance(model.model, PeftModel) else _NONE}
        for name, directory in (adapters or {}).items():
            self._load(name, directory)
        self._wants_graph = False
        self._graph: Any = None
        if quick and self._device.type == "cpu":
            size = sum(weight.numel() for weight in model.model.parameters())
            self._wants_graph = len(self._adapted) == 1 and size <= step_graph.LARGEST
            if size > _SMALL:
                exchange_linears(model.model)
        self._rows: list[_Row] = []
        self._waiting: deque[tuple[int, list[int], Decoder, str]] = deque()
        self._tickets = 0
        self._cache = _RowCache(_layers(model.model), slots)
        self._grammar = cache(self._make_grammar)
        vocabulary, prefix = model.vocabulary, model.prompts.prefix
        # Every prompt begins with these tokens; what the layers make of them is computed once.
        start = [] if vocabulary.bos is None else [vocabulary.bos]
        self._prefix = start + (vocabulary.encode_segments([Template(prefix.rstrip())]) if prefix else [])
        self._prefix_states: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @property
    def active(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(
        self, prompt: Sequence[int], kind: Kind, generation: GenerationSection, seed: int, adapter: str = ""
    ) -> int:
        """Queue a prompt; returns the ticket under which its tokens come.

        adapter: a named one, or the model's own. Raises ValueError if the prompt fills the context, or for an adapter
        that is not here.
        """
        ids = list(prompt)
        if adapter not in self._adapted:
            raise ValueError(f"there is no adapter {adapter!r}")
        if len(ids) >= self._model.context:
            raise ValueError(f"the prompt has {len(ids)} tokens, the model's context {self._model.context}")
        rules, allowed = self._grammar(kind)
        budget = min(generation.max_new_tokens, self._model.context - len(ids))
        decoder = Decoder(rules, allowed, self._model.vocabulary, generation, budget, seed_of(ids, seed))
        self._tickets += 1
        self._waiting.append((self._tickets, ids, decoder, adapter))
        return self._tickets

    @torch.inference_mode()
    def drop(self, ticket: int) -> None:
        """Work no more on a reply; one that has ended or is unknown is no mistake."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != ticket)
        for place, row in enumerate(self._rows):
            if row.ticket == ticket:
                self._remove(place)
                return

    @torch.inference_mode()
    def step(self) -> list[Sampled]:
        """One more token of each active reply, and the first of the one that has waited longest if there is room.

        One prompt a step: the replies that are being heard already do not halt for a crowd of new ones.
        """
        sampled = self._decode() if self._rows else []
        if self._waiting and len(self._rows) < self._slots:
            sampled.append(self._admit(*self._waiting.popleft()))
        for place in reversed(range(len(self._rows))):
            if self._rows[place].decoder.ended:
                self._remove(place)
        return sampled

    def _decode(self) -> list[Sampled]:
        rows = self._rows
        at = torch.tensor([[row.length] for row in rows], device=self._device)
        longest = max(row.length for row in rows) + 1
        last = torch.tensor([[row.decoder.tokens[-1]] for row in rows], device=self._device)
        if self._wants_graph:
            self._graph = traced(self._model.model, self._cache.shapes, self._model.context)
            self._wants_graph = False
        if self._graph is not None:
            logits = self._graph(last, at, *self._cache.views(len(rows), longest)).float()
        else:
            self._cache.look_at(slice(0, len(rows)), at, longest)
            seen = torch.arange(longest, device=self._device) <= at
            logits = self._forward(last, at, seen[:, None, None], [row.adapter for row in rows])
        for row in rows:
            row.length += 1
        return self._choose(rows, logits)

    def _admit(self, ticket: int, ids: list[int], decoder: Decoder, adapter: str) -> Sampled:
        place = len(self._rows)
        start = self._reuse_prefix(place, ids, adapter)
        logits = self._prefill(place, ids[start:], start, adapter)
        row = _Row(ticket, decoder, len(ids), adapter)
        self._rows.append(row)
        return self._choose([row], logits)[0]

    def _prefill(self, place: int, ids: list[int], start: int, adapter: str) -> Tensor:
        at = torch.arange(start, start + len(ids), device=self._device)
        self._cache.look_at(slice(place, place + 1), at[None], start + len(ids))
        seen = torch.arange(start + len(ids), device=self._device) <= at[:, None]
        return self._forward(torch.tensor([ids], device=self._device), at[None], seen[None, None], [adapter])

    def _reuse_prefix(self, place: int, ids: list[int], adapter: str) -> int:
        """Tokens of the prompt that the row now holds already."""
        count = len(self._prefix)
        if count < 2 or len(ids) <= count or ids[:count] != self._prefix:
            return 0
        if (states := self._prefix_states.get(adapter)) is not None:
            self._cache.copy_in(place, states)
        else:
            self._prefill(place, self._prefix, 0, adapter)
            self._prefix_states[adapter] = self._cache.copy_out(place, count)
        return count

    def _load(self, name: str, directory: Path) -> None:
        """Raises ValueError for an adapter that cannot share a forward pass with others."""
        config = PeftConfig.from_pretrained(str(directory))
        if getattr(config, "modules_to_save", None) or getattr(config, "use_dora", False):
            raise ValueError(
                f"adapter {name}: only plain LoRA can be mixed with others, without modules_to_save or DoRA"
            )
        if isinstance(self._model.model, PeftModel):
            self._model.model.load_adapter(str(directory), adapter_name=name)
        else:
            model: Any = PeftModel.from_pretrained(self._model.model, str(directory), adapter_name=name)
            self._model.model = model.eval()
        self._adapted[name] = name

    def _forward(self, ids: Tensor, at: Tensor, seen: Tensor, adapters: list[str]) -> Tensor:
        """Logits after the last token of each row: [rows, vocabulary]. seen: bool [rows, 1, tokens, positions].
        adapters: of each row."""
        model: Any = self._model.model
        mixed = {"adapter_names": [self._adapted[name] for name in adapters]} if len(self._adapted) > 1 else {}
        made = model(
            input_ids=ids,
            position_ids=at,
            attention_mask=mask_of(seen, self._dtype),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **mixed,
        )
        return made.logits[:, -1].float()

    def _choose(self, rows: Sequence[_Row], scores: Tensor) -> list[Sampled]:
        choose([row.decoder for row in rows], scores)
        return [Sampled(row.ticket, row.decoder.tokens[-1], row.decoder.ended) for row in rows]

    def _remove(self, place: int) -> None:
        # Active rows stay the first ones, so that a forward pass reads them as they lie.
        last = len(self._rows) - 1
        if place < last:
            self._cache.move(last, place, self._rows[last].length)
            self._rows[place] = self._rows[last]
        del self._rows[last]
        if not self._rows:
            self._cache.let_go()

    def _make_grammar(self, kind: Kind) -> tuple[Grammar, Tensor]:
        vocabulary = self._model.vocabulary
        rules = grammar(answer_template(self._model.prompts.dialect, kind), vocabulary)
        rows = self._model.model.get_output_embeddings().weight.shape[0]
        return rules, allowed_tokens(rules, vocabulary, rows).to(self._device)


def _layers(model: Any) -> int:
    return model.config.get_text_config().num_hidden_layers


class _RowCache(Cache):
    """Keys and values of each reply in a row of its own, its token n at position n. It grows with the longest, until
    there is none."""

    def __init__(self, layers: int, slots: int) -> None:
        self._own = [_RowLayer(slots) for _ in range(layers)]
        super().__init__(layers=list(self._own))

    def look_at(self, rows: slice, at: Tensor, longest: int) -> None:
        """Where the next forward pass writes (positions `at` [rows, tokens] of the rows) and how far it reads."""
        for layer in self._own:
            layer.rows, layer.at, layer.longest = rows, at, longest

    @property
    def shapes(self) -> list[torch.Size]:
        """Of each layer's keys: [slots, heads, positions, size]."""
        return [layer.keys.shape for layer in self._own]

    def views(self, rows: int, longest: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of the first rows and positions, layer by layer, to be read and written where they lie."""
        for layer in self._own:
            layer.room_for(longest)
        keys = [layer.keys[:rows, :, :longest] for layer in self._own]
        return keys, [layer.values[:rows, :, :longest] for layer in self._own]

    def copy_out(self, row: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first positions of a row, layer by layer."""
        return [(layer.keys[row, :, :count].clone(), layer.values[row, :, :count].clone()) for layer in self._own]

    def copy_in(self, row: int, states: list[tuple[Tensor, Tensor]]) -> None:
        for layer, (keys, values) in zip(self._own, states, strict=True):
            layer.room_for(keys.shape[1])
            layer.keys[row, :, : keys.shape[1]] = keys
            layer.values[row, :, : keys.shape[1]] = values

    def let_go(self) -> None:
        """Give back what the longest reply took, however many are to come that are shorter."""
        for layer in self._own:
            layer.lazy_initialization(layer.keys, layer.values)

    def move(self, source: int, target: int, count: int) -> None:
        for layer in self._own:
            layer.keys[target, :, :count] = layer.keys[source, :, :count]
            layer.values[target, :, :count] = layer.values[source, :, :count]


class _RowLayer(CacheLayerMixin):
    keys: Tensor
    values: Tensor

    def __init__(self, slots: int) -> None:
        super().__init__()
        self._slots = slots
        self.rows, self.longest = slice(0, 0), 0
        self.at = torch.zeros(0, 0, dtype=torch.long)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(self._slots, states.shape[1], 0, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def room_for(self, count: int) -> None:
        missing = count - self.keys.shape[2]
        if missing > 0:
            more = -(-missing // _GROWTH) * _GROWTH
            self.keys, self.values = (
                torch.nn.functional.pad(states, (0, 0, 0, more)) for states in (self.keys, self.values)
            )

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [rows, heads, tokens, size], of the rows and positions that were named before."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.room_for(self.longest)
        keys, values = self.keys[self.rows, :, : self.longest], self.values[self.rows, :, : self.longest]
        write(keys, values, self.at, key_states, value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.longest, 0

    def get_seq_length(self) -> int:
        return self.longest - self.at.shape[1]

    def get_max_length(self) -> int:
        return -1
