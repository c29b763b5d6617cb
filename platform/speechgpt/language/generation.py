"""Decoding that can only give well-formed replies: a grammar over tokens, and sampling that batches do not change.

The grammar is read off the answer's template. Its single-token markers cut it into regions; a region holds text,
units or nothing, and ends with the next marker. Where tags are several tokens (published vocabulary), they are part of
a text.
"""

import re
from collections.abc import Iterable, Sequence
from string import Formatter
from typing import Any, Literal, NamedTuple

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from speechgpt.language.config import GenerationSection
from speechgpt.language.segments import END_OF_ANSWER, END_OF_SEQUENCE, TEXT_ANSWER, UNIT_ANSWER
from speechgpt.language.vocabulary import Vocabulary

_LONGEST_TAG = 12
"""Tokens that hold a tag spelt in pieces: one a letter, and some to spare."""


class Region(NamedTuple):
    """What may stand between two markers. `needed`: at least one token of it must."""

    content: Literal["text", "units", "nothing"]
    needed: bool


class Ending(NamedTuple):
    """What ends an answer: tokens, and tags that the vocabulary spells in ordinary tokens."""

    tokens: list[int]
    spelt: list[str]


class Grammar(NamedTuple):
    """Regions of an answer and the markers (token ids) between them; after the last region comes the ending."""

    regions: list[Region]
    markers: list[int]
    ending: Ending


def grammar(template: str, vocabulary: Vocabulary) -> Grammar:
    """The grammar of an answer template (`prompts.answer_template`)."""
    regions: list[Region] = []
    markers: list[int] = []
    content: Literal["text", "units", "nothing"] = "nothing"
    needed = False
    for part in _parts(template, vocabulary):
        match part:
            case "slot":
                content, needed = "text", True
            case "units":
                regions += [Region(content, needed), Region("units", True)]
                markers += [vocabulary.sosp, vocabulary.eosp]
                content, needed = "nothing", False
            case "words":
                content = "text"
            case int(marker):
                if marker in ending(vocabulary).tokens:
                    # The answer ends here; the full stop that templates put after it need not be generated.
                    break
                regions.append(Region(content, needed))
                markers.append(marker)
                content, needed = "nothing", False
    return Grammar([*regions, Region(content, needed)], markers, ending(vocabulary, template))


def _parts(template: str, vocabulary: Vocabulary) -> Iterable[Literal["slot", "units", "words"] | int]:
    for literal, slot, _, _ in Formatter().parse(template):
        for part in re.split("(" + "|".join(map(re.escape, vocabulary.marker_ids)) + ")", literal):
            if part in vocabulary.marker_ids:
                yield vocabulary.marker_ids[part]
            elif part.strip():
                yield "words"
        if slot:
            yield "units" if slot == "answer_units" else "slot"


def ending(vocabulary: Vocabulary, template: str = "") -> Ending:
    """Of the answers of a template; without one, of any."""
    tags = [END_OF_ANSWER, END_OF_SEQUENCE]
    if TEXT_ANSWER in template and UNIT_ANSWER not in template:
        # The published prompts do not say whether the answer is to be spoken. A model that has given the text that was
        # asked for, and begins to speak it, has answered.
        tags.append(UNIT_ANSWER)
    ids = vocabulary.marker_ids
    return Ending([vocabulary.eos, *(ids[tag] for tag in tags if tag in ids)], [tag for tag in tags if tag not in ids])


def cut_token(vocabulary: Vocabulary) -> int:
    """The token that stops a reply which has used up its budget: `<eoh>`, which no answer can hold."""
    return vocabulary.eoh


def allowed_tokens(grammar: Grammar, vocabulary: Vocabulary, rows: int) -> torch.Tensor:
    """What may come next, bool [2 regions, rows]: in each region at its start, and after at least one token of it."""
    content = {
        "text": _text_tokens(rows, vocabulary),
        "units": _only(rows, range(vocabulary.first_unit, vocabulary.first_unit + vocabulary.unit_count)),
        "nothing": _only(rows, []),
    }
    allowed = []
    for number, region in enumerate(grammar.regions):
        last = number == len(grammar.markers)
        after = _only(rows, grammar.ending.tokens if last else [grammar.markers[number]])
        inside = content[region.content]
        allowed += [inside if region.needed else inside | after, inside | after]
    return torch.stack(allowed)


class GrammarProcessor(LogitsProcessor):
    """Masks every token that the grammar does not allow next.

    Works from the generated tokens alone (those after `prompt_length`), so that batches and left padding need no care.

    rows: height of the model's output, which padding may make larger than the vocabulary.
    budgets: tokens that each reply of the batch may have, [batch].
    max_text_tokens: tokens outside speech that a reply may have.
    A reply that has used up either gets the cut token.
    """

    def __init__(
        self,
        grammar: Grammar,
        vocabulary: Vocabulary,
        rows: int,
        prompt_length: int,
        budgets: Sequence[int],
        max_text_tokens: int,
    ) -> None:
        self._prompt_length = prompt_length
        self._max_text_tokens = max_text_tokens
        self._merged = vocabulary.merged and vocabulary.unit_count > 1
        self._first_unit, self._end_unit = vocabulary.first_unit, vocabulary.first_unit + vocabulary.unit_count
        self._budgets = torch.tensor(budgets)
        self._markers = torch.tensor(grammar.markers, dtype=torch.long)
        self._is_text = torch.tensor([region.content == "text" for region in grammar.regions])
        self._cut = _only(rows, [cut_token(vocabulary)])
        self._allowed = allowed_tokens(grammar, vocabulary, rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [batch, length], scores [batch, rows] -> scores with -inf where a token is not allowed."""
        self._to(scores.device)
        generated = input_ids[:, self._prompt_length :]
        is_marker = torch.isin(generated, self._markers)
        is_unit = (generated >= self._first_unit) & (generated < self._end_unit)
        region = is_marker.sum(1)
        begun = ~is_marker[:, -1] if generated.shape[1] else torch.zeros_like(region, dtype=torch.bool)
        # Replies that have ended go on as padding; whatever is allowed them is thrown away.
        allowed = self._allowed[2 * region + begun]
        spent = self._is_text[region] & ((~is_unit).sum(1) >= self._max_text_tokens)
        spent |= self._budgets <= generated.shape[1]
        scores = scores.masked_fill(~torch.where(spent[:, None], self._cut, allowed), -torch.inf)
        if self._merged and generated.shape[1]:
            # Merged units have no adjacent duplicates; the duration predictor says how long each one lasts.
            speaking = (is_unit[:, -1] & ~spent).nonzero().squeeze(1)
            scores[speaking, generated[speaking, -1]] = -torch.inf
        return scores

    def _to(self, device: torch.device) -> None:
        if self._allowed.device != device:
            for name in ("_allowed", "_cut", "_is_text", "_markers", "_budgets"):
                setattr(self, name, getattr(self, name).to(device))


class GumbelSampler(LogitsProcessor):
    """Turns the most likely token into a sampled one, from each reply's own random numbers.

    The largest of log p + Gumbel noise is a draw from p (Gumbel 1954), so that greedy search samples, and a reply does
    not depend on what else is in its batch. Comes after the warpers.

    part: the columns of the model's output [replies, rows] that the scores are, if they are not all of it. A token's
    noise does not depend on them.
    """

    def __init__(
        self, generators: Sequence[torch.Generator], part: torch.Tensor | None = None, rows: int | None = None
    ) -> None:
        self._generators, self._part, self._rows = generators, part, rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chances = scores.new_empty(len(scores), self._rows or scores.shape[1], dtype=torch.float32)
        for row, generator in zip(chances, self._generators, strict=True):
            row.uniform_(generator=generator)
        if self._part is not None:
            chances = chances[:, self._part]
        # 0 would shut out a token that may be the only one.
        noise = -(-chances.clamp_(min=torch.finfo(torch.float32).tiny).log()).log()
        return scores.float() + noise


class SpeltEnd(StoppingCriteria):
    """Stops a reply that has spelt one of the tags in ordinary tokens, as the published weights do."""

    def __init__(self, vocabulary: Vocabulary, spelt: Sequence[str], prompt_length: int) -> None:
        self._vocabulary, self._spelt = vocabulary, spelt
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        tails = input_ids[:, max(self._prompt_length, input_ids.shape[1] - _LONGEST_TAG) :].tolist()
        return torch.tensor(
            [spells_end(tail, self._vocabulary, self._spelt) for tail in tails], device=input_ids.device
        )


def spells_end(generated: Sequence[int], vocabulary: Vocabulary, spelt: Sequence[str]) -> bool:
    """Whether the last tokens spell one of these tags."""
    if not spelt or not generated or vocabulary.is_unit(generated[-1]):
        return False
    said = vocabulary.decode(generated[-_LONGEST_TAG:])
    return any(tag in said for tag in spelt)


def sampling(generation: GenerationSection, seeds: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """Warpers and sampler for one batch; none at temperature 0, which is greedy."""
    if generation.temperature == 0:
        return LogitsProcessorList()
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    return LogitsProcessorList([*warpers(generation), GumbelSampler(generators)])


def warpers(generation: GenerationSection) -> list[LogitsProcessor]:
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(float(generation.temperature))]
    if generation.top_k:
        processors.append(TopKLogitsWarper(generation.top_k))
    if generation.top_p < 1:
        processors.append(TopPLogitsWarper(generation.top_p))
    return processors


class Walk:
    """How far a reply has come in its grammar, and so what may come next.

    max_text_tokens: tokens outside speech that the reply may have.
    """

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, max_text_tokens: int) -> None:
        self._grammar, self._vocabulary, self._max_text_tokens = grammar, vocabulary, max_text_tokens
        self._merged = vocabulary.merged and vocabulary.unit_count > 1
        self._region = self._words = 0
        self._begun = False
        self._last: int | None = None

    def take(self, token: int) -> None:
        is_marker = token in self._grammar.markers
        self._region += is_marker
        self._begun = not is_marker
        is_unit = self._vocabulary.is_unit(token)
        self._words += not is_unit
        self._last = token if is_unit else None

    @property
    def state(self) -> int:
        """The row of `allowed_tokens` that holds now."""
        return 2 * self._region + self._begun

    @property
    def spent(self) -> bool:
        """Whether its text has become too long: only the cut token may come."""
        return self._grammar.regions[self._region].content == "text" and self._words >= self._max_text_tokens

    @property
    def repeated(self) -> int | None:
        """The unit that may not come again: merged units have no adjacent duplicates."""
        return self._last if self._merged else None


class Decoder:
    """One reply, token by token: what `GrammarProcessor`, `sampling` and the stops do to a batch of `generate`.

    Replies of different kinds, settings and ages can so share a forward pass. allowed: `allowed_tokens` of the grammar.
    budget: tokens that the reply may have.
    """

    def __init__(
        self,
        grammar: Grammar,
        allowed: torch.Tensor,
        vocabulary: Vocabulary,
        generation: GenerationSection,
        budget: int,
        seed: int,
    ) -> None:
        self.tokens: list[int] = []
        self.ended = False
        self.generation = generation
        self.generator = torch.Generator(allowed.device).manual_seed(seed)
        self._allowed, self._vocabulary, self._budget = allowed, vocabulary, budget
        self._walk = Walk(grammar, vocabulary, generation.max_text_tokens)
        self._ends, self._spelt = {*grammar.ending.tokens, cut_token(vocabulary)}, grammar.ending.spelt

    @property
    def spent(self) -> bool:
        """Whether nothing but the cut token may come."""
        return self._walk.spent

    def mask(self, scores: torch.Tensor) -> None:
        """-inf, in place, for what may not come next. scores: [rows]."""
        scores.masked_fill_(~self._allowed[self._walk.state], -torch.inf)
        if (unit := self._walk.repeated) is not None:
            scores[unit] = -torch.inf

    def take(self, token: int) -> None:
        self.tokens.append(token)
        self._walk.take(token)
        spelt = spells_end(self.tokens, self._vocabulary, self._spelt)
        self.ended = token in self._ends or spelt or len(self.tokens) >= self._budget

    def cut(self) -> None:
        self.take(cut_token(self._vocabulary))


def choose(decoders: Sequence[Decoder], scores: torch.Tensor) -> None:
    """Each takes its next token, from the model's logits for it: [decoders, rows], which are changed.

    Replies of the same settings are warped together, and each draws from its own random numbers, so that it gets what
    it would get alone. Raises ArithmeticError for a NaN among the logits.
    """
    groups: dict[tuple[float, int, float], list[int]] = {}
    for place, decoder in enumerate(decoders):
        if decoder.spent:
            decoder.cut()
            continue
        decoder.mask(scores[place])
        generation = decoder.generation
        groups.setdefault((generation.temperature, generation.top_k, generation.top_p), []).append(place)
    for places in groups.values():
        group = [decoders[place] for place in places]
        chosen = scores[places]
        part = None
        if group[0].generation.temperature:
            part = _candidates(chosen, group[0].generation.top_k)
            sampler = GumbelSampler([one.generator for one in group], part, chosen.shape[1])
            chosen = chosen[:, part]
            # The warpers look at the scores only.
            none: Any = None
            for processor in (*warpers(group[0].generation), sampler):
                chosen = processor(none, chosen)
        tokens = chosen.argmax(1, keepdim=True)
        if chosen.gather(1, tokens).isnan().any():
            raise ArithmeticError("the model's scores are not numbers")
        if part is not None:
            tokens = part[tokens]
        for decoder, token in zip(group, tokens[:, 0].tolist(), strict=True):
            decoder.take(token)


def _candidates(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The columns, ascending, of [replies, rows] in which anything is possible; a vocabulary is a hundred times as
    large, and the warpers sort it. NaNs are among them."""
    impossible = scores == -torch.inf
    if top_k:
        least = scores.topk(min(top_k, scores.shape[1])).values[:, -1:]
        impossible |= scores < least
    return (~impossible).any(0).nonzero()[:, 0]


def _text_tokens(rows: int, vocabulary: Vocabulary) -> torch.Tensor:
    """Ordinary text: not a unit, marker or special token, nor a row that only pads the embedding. bool [rows]."""
    text = torch.zeros(rows, dtype=torch.bool)
    text[: vocabulary.size] = True
    text[list(vocabulary.control_ids)] = False
    return text


def _only(rows: int, ids: Iterable[int]) -> torch.Tensor:
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[list(ids)] = True
    return mask
