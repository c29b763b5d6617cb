"""A text vocabulary grown by units and control markers, in the published order (SPEC 0, 2.3).

Text is cut at control markers here, not by the tokenizer: white space beside a marker falls away and every stretch of
text between markers begins as a text of its own does. That is how transformers 4.33, which the published weights were
trained with, reads `[Human]: …`, and it does not change with the installed version.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from speechgpt.language.segments import (
    END_OF_ANSWER,
    END_OF_HUMAN,
    END_OF_SEQUENCE,
    HUMAN,
    RELEASED_MARKERS,
    SPEECH_END,
    SPEECH_START,
    SPEECHGPT,
    TAG_MARKERS,
    TEXT_ANSWER,
    TEXT_QUESTION,
    UNIT_ANSWER,
    Plain,
    Segment,
    Speech,
    Template,
)

Markers = Literal["released", "whole"]
FILE = "unit_vocabulary.json"


class VocabularyError(ValueError):
    """A tokenizer whose tokens are not the units and markers that were promised."""


class Piece(NamedTuple):
    """A stretch of decoded tokens: ordinary text, one control marker, or a run of units."""

    kind: Literal["text", "marker", "units"]
    text: str = ""
    units: tuple[int, ...] = ()


class EncodedRow(NamedTuple):
    """A training row. `masked` counts the leading tokens (beginning of sequence and prefix) that carry no loss."""

    ids: list[int]
    masked: int


class Vocabulary:
    """Token ids of text, units and markers.

    `merged` says that units were collapsed over repeats, so that no unit can follow itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, unit_count: int, merged: bool = True) -> None:
        known = tokenizer.get_vocab()
        wanted = [*(f"<{unit}>" for unit in range(unit_count)), *RELEASED_MARKERS]
        if missing := [token for token in wanted if token not in known]:
            raise VocabularyError(
                f"the tokenizer has no token {missing[0]!r} (nor {len(missing) - 1} more): "
                f"grow it by {unit_count} units first (Vocabulary.grow)"
            )
        self.tokenizer = tokenizer
        self.unit_count = unit_count
        self.merged = merged
        self.first_unit = known["<0>"]
        if any(known[f"<{unit}>"] != self.first_unit + unit for unit in range(unit_count)):
            raise VocabularyError("the unit tokens <0>, <1>, … do not follow one another in the vocabulary")
        self.markers: Markers = "whole" if all(marker in known for marker in TAG_MARKERS) else "released"
        names = RELEASED_MARKERS + (TAG_MARKERS if self.markers == "whole" else ())
        self.marker_ids = {marker: known[marker] for marker in names}
        """Id of each marker that is one token here."""
        self._marker_of = {number: marker for marker, number in self.marker_ids.items()}
        self._control = re.compile("|".join(map(re.escape, names)) + r"|<(?:0|[1-9]\d*)>")
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int = _required(tokenizer, "eos_token_id")
        self.pad: int = _required(tokenizer, "pad_token_id")

    @classmethod
    def grow(
        cls, tokenizer: PreTrainedTokenizerBase, unit_count: int, markers: Markers, merged: bool = True
    ) -> "Vocabulary":
        """Add `<0>`…`<K-1>`, then the published markers, then (for `whole`) our four, as ordinary tokens.

        A tokenizer without padding gets the published choice, the unknown token, else end of sequence; it pads on the
        left. Raises VocabularyError when the base vocabulary already has one of these tokens elsewhere.
        """
        if unit_count < 1:
            raise VocabularyError(f"a codebook of {unit_count} units: at least one is needed")
        first = len(tokenizer)
        tokens = [*(f"<{unit}>" for unit in range(unit_count)), *RELEASED_MARKERS]
        tokens += TAG_MARKERS if markers == "whole" else ()
        known = tokenizer.get_vocab()
        if taken := [token for token in tokens if token in known]:
            raise VocabularyError(
                f"the base vocabulary already has {taken[0]!r} as token {known[taken[0]]}: it has grown before, "
                "or uses our notation for something else"
            )
        # transformers 4.33 stripped on both sides; so told, the exported tokenizer alone reads a row as we do.
        tokenizer.add_tokens([AddedToken(token, lstrip=True, rstrip=True, normalized=False) for token in tokens])
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.padding_side = "left"
        vocabulary = cls(tokenizer, unit_count, merged)
        if vocabulary.first_unit != first:
            raise VocabularyError(f"<0> became token {vocabulary.first_unit} instead of {first}")
        return vocabulary

    @property
    def size(self) -> int:
        """Tokens, all additions included."""
        return len(self.tokenizer)

    def padded_size(self, multiple: int) -> int:
        """Rows of an embedding that is a multiple of `multiple` high."""
        return -(-self.size // multiple) * multiple

    sosp = property(lambda self: self.marker_ids[SPEECH_START])
    eosp = property(lambda self: self.marker_ids[SPEECH_END])
    human = property(lambda self: self.marker_ids[HUMAN])
    speechgpt = property(lambda self: self.marker_ids[SPEECHGPT])
    eoh = property(lambda self: self.marker_ids[END_OF_HUMAN])
    eos_marker = property(lambda self: self.marker_ids[END_OF_SEQUENCE])
    eoa = property(lambda self: self.marker_ids.get(END_OF_ANSWER))
    tq = property(lambda self: self.marker_ids.get(TEXT_QUESTION))
    ta = property(lambda self: self.marker_ids.get(TEXT_ANSWER))
    ua = property(lambda self: self.marker_ids.get(UNIT_ANSWER))

    def encode(self, text: str) -> list[int]:
        """Ids of trusted text: markers and `<n>` in it become control tokens. Nothing is put before or after."""
        return self.encode_segments([Template(text)])

    def encode_segments(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of a prompt; equal to `encode` of the same segments written as one string."""
        stretches: list[str | int] = []
        for segment in segments:
            match segment:
                case Speech(units):
                    stretches += [self.sosp, *self.unit_ids(units), self.eosp]
                case Plain(text):
                    _extend(stretches, text)
                case Template(text):
                    for stretch in self._cut(text):
                        _extend(stretches, stretch)
        ids: list[int] = []
        for place, stretch in enumerate(stretches):
            if isinstance(stretch, int):
                ids.append(stretch)
                continue
            # Text neighbours are joined, so whatever stands beside a text is a control token.
            stretch = stretch.lstrip() if place > 0 else stretch
            stretch = stretch.rstrip() if place < len(stretches) - 1 else stretch
            ids += self.encode_plain(stretch)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of untrusted text: no marker, unit or special token spelt in it becomes one."""
        if not text:
            return []
        # JSON can carry half a surrogate pair, which no tokenizer takes.
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = self._plain_ids(text)
        if not (self.control_ids - {self.tokenizer.unk_token_id}).isdisjoint(ids):
            # Some base vocabularies hold the spelling of a special token as a piece; letter by letter none can appear.
            ids = [number for letter in text for number in self._plain_ids(letter)]
        return ids

    def encode_row(self, prefix: str, plain_text: str, end: bool = True) -> EncodedRow:
        """Ids of a SpeechInstruct row: beginning of sequence, prefix, text and (if `end`) end of sequence.

        The prefix alone carries no loss (SPEC 1.5). Raises ValueError when text after a prefix starts without a marker:
        its first letters would join the prefix's last token.
        """
        if prefix and not self._control.match(plain_text):
            raise ValueError(f"a row's text must start with a marker, not with {plain_text[:20]!r}")
        start = [] if self.bos is None else [self.bos]
        start += self.encode_segments([Template(prefix.rstrip())])
        return EncodedRow([*start, *self.encode(plain_text), *([self.eos] if end else [])], len(start))

    def encode_prompt(self, segments: Sequence[Segment]) -> list[int]:
        """Ids of a prompt, beginning of sequence included: the first ids of every row that goes on from it.

        White space at the prompt's end is dropped, because in a row it belongs to the answer's first token.
        """
        *front, last = segments
        if isinstance(last, Template):
            last = Template(last.text.rstrip())
        return ([] if self.bos is None else [self.bos]) + self.encode_segments([*front, last])

    def unit_ids(self, units: Iterable[int]) -> list[int]:
        """Token ids of units. Raises ValueError for a unit outside the codebook."""
        ids = []
        for unit in units:
            if not 0 <= unit < self.unit_count:
                raise ValueError(f"unit <{unit}> is outside the codebook of {self.unit_count} units")
            ids.append(self.first_unit + int(unit))
        return ids

    def is_unit(self, token: int) -> bool:
        return self.first_unit <= token < self.first_unit + self.unit_count

    def units(self, ids: Iterable[int]) -> list[int]:
        """The units among token ids."""
        return [token - self.first_unit for token in ids if self.is_unit(token)]

    def pieces(self, ids: Iterable[int]) -> list[Piece]:
        """Token ids as text, markers and runs of units; the base's special tokens (end of sequence…) are left out."""
        pieces: list[Piece] = []
        text: list[int] = []
        units: list[int] = []

        def close() -> None:
            if units:
                pieces.append(Piece("units", units=tuple(units)))
            if text and (decoded := self._decode_text(text)):
                pieces.append(Piece("text", decoded))
            units.clear()
            text.clear()

        for token in ids:
            if self.is_unit(token):
                if text:
                    close()
                units.append(token - self.first_unit)
            elif marker := self._marker_of.get(token):
                close()
                pieces.append(Piece("marker", marker))
            elif token not in self._special:
                if units:
                    close()
                text.append(token)
        close()
        return pieces

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids as a string: units and markers stand side by side, text is set off by one space."""
        written = ""
        before: Piece | None = None
        for piece in self.pieces(ids):
            beside_text = before is not None and "text" in (before.kind, piece.kind)
            written += " " if beside_text else ""
            written += piece.text or "".join(f"<{unit}>" for unit in piece.units)
            before = piece
        return written

    def split(self, text: str) -> list[Piece]:
        """Trusted text as `pieces` would give it back, without going through tokens."""
        pieces: list[Piece] = []
        for stretch in self._cut(text):
            if isinstance(stretch, str):
                if stretch.strip():
                    pieces.append(Piece("text", stretch.strip()))
            elif self.is_unit(stretch):
                earlier = pieces.pop().units if pieces and pieces[-1].kind == "units" else ()
                pieces.append(Piece("units", units=(*earlier, stretch - self.first_unit)))
            else:
                pieces.append(Piece("marker", self._marker_of[stretch]))
        return pieces

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer, and the unit vocabulary beside it, into a model's directory."""
        self.tokenizer.save_pretrained(str(directory))
        facts = {"units": self.unit_count, "markers": self.markers, "merged": self.merged}
        Path(directory, FILE).write_text(json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> "Vocabulary":
        """Read what `save` wrote; a published model, which has no such file, is counted by its tokens."""
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        tokenizer.padding_side = "left"
        file = Path(directory, FILE)
        if not file.is_file():
            known = tokenizer.get_vocab()
            count = 0
            while f"<{count}>" in known:
                count += 1
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
            return cls(tokenizer, count)
        facts = json.loads(file.read_text())
        vocabulary = cls(tokenizer, facts["units"], facts["merged"])
        if vocabulary.markers != facts["markers"]:
            raise VocabularyError(f"{file} says markers {facts['markers']!r}, the tokenizer has {vocabulary.markers!r}")
        return vocabulary

    def _cut(self, text: str) -> Iterator[str | int]:
        """Trusted text as stretches of plain text and the ids of the control tokens between them."""
        place = 0
        for match in self._control.finditer(text):
            if match.start() > place:
                yield text[place : match.start()]
            token = match.group()
            yield self.marker_ids[token] if token in self.marker_ids else self.unit_ids([int(token[1:-1])])[0]
            place = match.end()
        if place < len(text):
            yield text[place:]

    def _decode_text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)).strip()

    def _plain_ids(self, text: str) -> list[int]:
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=False).ids
        # A tokenizer in Python finds added tokens before it calls this, its own rule for ordinary text.
        tokenizer: Any = self.tokenizer
        return tokenizer.convert_tokens_to_ids(tokenizer._tokenize(text))

    @cached_property
    def _backend(self) -> Tokenizer | None:
        """The tokenizer's own rules without any added token, or None for one that is written in Python."""
        if not self.tokenizer.is_fast:
            return None
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        rules["added_tokens"] = []
        rules["truncation"] = rules["padding"] = None
        return Tokenizer.from_str(json.dumps(rules))

    @cached_property
    def _special(self) -> frozenset[int]:
        """Special tokens of the base vocabulary; the unknown token stands for real text and is not one of them."""
        return frozenset(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Every token that is not text: units, markers, and the special and added tokens of the base."""
        return frozenset(self.tokenizer.all_special_ids) | frozenset(self.tokenizer.added_tokens_decoder)


def _extend(stretches: list[str | int], stretch: str | int) -> None:
    """Append, joining text to the text before it."""
    if isinstance(stretch, str) and stretches and isinstance(earlier := stretches[-1], str):
        stretches[-1] = earlier + stretch
    elif stretch != "":
        stretches.append(stretch)


def _required(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    number = getattr(tokenizer, name)
    if number is None:
        raise VocabularyError(f"the tokenizer has no {name}")
    return number
