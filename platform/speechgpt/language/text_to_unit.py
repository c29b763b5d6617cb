"""Text to the units of speech, without any sound between: an encoder-decoder of transformers (SPEC 1.2, 2.2).

The authors made the spoken side of their instructions so. A model directory has transformers' files,
`text_to_unit.json` (which token each unit is, and the form that text comes in) and the text's own tokens:
`tokenizer.json`, or for a model of fairseq's `spm.model` and `pieces.json`.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from speechgpt.language.config import TextForm
from speechgpt.language.normaliser import words

FACTS = "text_to_unit.json"
_SPM, _PIECES = "spm.model", "pieces.json"
_LEAST, _PER_LETTER = 40, 8
"""Units that a text may become: at 29 a second and 15 letters a second there are about two to a letter."""


class TextToUnitError(RuntimeError):
    """A directory that holds no such model; the message says what is missing."""


class TextTokens(Protocol):
    """Text as a model's tokens."""

    def encode(self, text: str) -> list[int]:
        """Without the end of sequence."""

    def save(self, directory: Path) -> None: ...


@dataclass(frozen=True)
class TokenizerText:
    """A fast tokenizer of transformers'."""

    tokenizer: PreTrainedTokenizerFast

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def save(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)


class SentencePieceText:
    """SentencePiece pieces looked up in fairseq's dictionary, which numbers them its own way."""

    def __init__(self, file: Path, ids: Mapping[str, int], unknown: int) -> None:
        import sentencepiece

        self._file, self._ids, self._unknown = file, dict(ids), unknown
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(piece, self._unknown) for piece in self._processor.encode(text, out_type=str)]

    def save(self, directory: Path) -> None:
        shutil.copy(self._file, directory / _SPM)
        pieces = {"unknown": self._unknown, "ids": self._ids}
        (directory / _PIECES).write_text(json.dumps(pieces, ensure_ascii=False, indent=0))


@dataclass(frozen=True)
class TextToUnit:
    """The model with its two alphabets. unit_ids: the token of each unit, in order."""

    model: Any
    text: TextTokens
    unit_ids: tuple[int, ...]
    form: TextForm

    @classmethod
    def load(cls, directory: str | Path, device: str = "cpu") -> "TextToUnit":
        """Raises TextToUnitError for a directory that holds something else."""
        folder = Path(directory)
        try:
            facts = json.loads((folder / FACTS).read_text())
        except FileNotFoundError:
            raise TextToUnitError(
                f"{folder}: no {FACTS}: a directory that train-text-to-unit or `speechgpt convert` wrote is expected"
            ) from None
        text: TextTokens
        if (folder / _SPM).is_file():
            pieces = json.loads((folder / _PIECES).read_text())
            text = SentencePieceText(folder / _SPM, pieces["ids"], pieces["unknown"])
        else:
            text = TokenizerText(PreTrainedTokenizerFast.from_pretrained(folder))
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval().to(device)
        # Some classes come with lengths and beams of their own.
        model.generation_config = GenerationConfig()
        return cls(model, text, tuple(facts["unit_ids"]), facts["form"])

    def save(self, directory: str | Path) -> None:
        folder = Path(directory)
        self.model.save_pretrained(folder)
        self.text.save(folder)
        (folder / FACTS).write_text(json.dumps({"form": self.form, "unit_ids": list(self.unit_ids)}) + "\n")

    def source(self, text: str) -> list[int]:
        """Token ids of a text, with the end that the encoder expects."""
        said = " ".join(words(text)) if self.form == "spoken" else text.strip()
        return [*self.text.encode(said), self.model.config.eos_token_id]

    def target(self, units: Sequence[int]) -> list[int]:
        """Token ids of merged units, with the end that the decoder is to write."""
        return [*(self.unit_ids[unit] for unit in units), self.model.config.eos_token_id]

    def write(
        self, texts: Sequence[str], beams: int = 1, max_units: int = 1000, batch: int = 16
    ) -> list[tuple[int, ...]]:
        """Merged units of each text, in their order; empty for one that did not come to an end, or has no words.

        The same texts give the same units, alone or among others but for ties within floating-point tolerance.
        """
        sources = [self.source(text) for text in texts]
        found: list[tuple[int, ...]] = [()] * len(texts)
        longest = self.model.config.max_position_embeddings - 1
        # Those without words have an end alone; a longer source has no positions.
        order = [i for i in range(len(texts)) if 1 < len(sources[i]) <= longest]
        order.sort(key=lambda i: (len(sources[i]), i))
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            limits = [min(max_units, longest - 1, _LEAST + _PER_LETTER * len(texts[i])) for i in chosen]
            written = self._written([sources[i] for i in chosen], beams, max(limits))
            for place, limit, units in zip(chosen, limits, written, strict=True):
                # Its own limit, whatever stands beside it in the batch.
                found[place] = units if len(units) <= limit else ()
        return found

    def _written(self, sources: Sequence[Sequence[int]], beams: int, limit: int) -> list[tuple[int, ...]]:
        config = self.model.config
        ids, mask = padded(sources, config.pad_token_id)
        settings = GenerationConfig(
            num_beams=beams,
            do_sample=False,
            max_new_tokens=limit + 1,
            decoder_start_token_id=config.decoder_start_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
        )
        grammar = _UnitsAlone(self.unit_ids, config.eos_token_id, self._size())
        with torch.inference_mode():
            written = self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([grammar]),
            )
        unit_of = {token: unit for unit, token in enumerate(self.unit_ids)}
        return [_ended(row[1:], config.eos_token_id, unit_of) for row in written.tolist()]

    def _size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]


class _UnitsAlone(LogitsProcessor):
    """Only units, none twice in a row (they are merged), and an end that is not at once."""

    def __init__(self, unit_ids: Sequence[int], end: int, size: int) -> None:
        self._forbidden = torch.full((size,), -torch.inf)
        self._forbidden[[*unit_ids, end]] = 0
        self._end = end

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        allowed = scores + self._forbidden.to(scores.device)
        # The first step's last token is the decoder's start, which may be the end's token.
        allowed.scatter_(1, input_ids[:, -1:], -torch.inf)
        if input_ids.shape[1] == 1:
            allowed[:, self._end] = -torch.inf
        return cast("torch.FloatTensor", allowed)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as [rows, longest], padded on the right, and the mask of what is not padding."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = 1
    return ids, mask


def _ended(tokens: Sequence[int], end: int, unit_of: Mapping[int, int]) -> tuple[int, ...]:
    if end not in tokens:
        return ()
    return tuple(unit_of[token] for token in tokens[: tokens.index(end)])
