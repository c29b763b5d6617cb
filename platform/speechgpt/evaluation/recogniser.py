"""An independent recogniser: it had no part in training what it judges.

Whisper pads every clip to 30 s, which is most of its cost on short clips. The encoder also takes less; below about
10 s of padding it begins to repeat itself, so clips are cut to the longest of their batch but never under 15 s, and
the reply is capped in tokens by the clip's length.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from speechgpt.speech.audio import SAMPLE_RATE

_SHORTEST_WINDOW = 15.0
_LONGEST_WINDOW = 30.0
_LEAD_IN = 0.2
"""Seconds of silence before a clip: Whisper tends to lose a first word that starts at once."""
_TAIL = 1.0
_TOKENS_PER_SECOND = 7
"""Fast English is about 5 words a second, 1.3 tokens a word."""
_MEL_HOP = 160
_BATCH = 8


class Recogniser(Protocol):
    """Anything that writes down what it hears."""

    name: str

    def transcribe(self, waves: Sequence[np.ndarray]) -> list[str]:
        """What is said in each wave (float32 [samples], 16 kHz mono, at most 30 s); "" for silence or nothing."""
        ...


def open_recogniser(source: str, threads: int = 1, language: str = "en") -> Recogniser | None:
    """`whisper-tiny` or `whisper-base` as packaged, a CTranslate2 Whisper directory, or `none`.

    language: of what is said, by its ISO 639-1 code. Raises FileNotFoundError, naming the recipe's key, if it is none
    of these or its package is missing, and ValueError for a language that it does not know.
    """
    if source == "none":
        return None
    return WhisperRecogniser(find(source), name=Path(source).name, threads=threads, language=language)


def find(source: str) -> Path:
    """The directory of a recogniser. Raises as `open_recogniser` does."""
    from speechgpt.speech.whisper import packaged_whisper

    if find_spec("faster_whisper") is None:
        raise ModuleNotFoundError("faster_whisper is not installed: pip install 'speechgpt-ray[judge]'")
    if source.startswith("whisper-"):
        return packaged_whisper(source.removeprefix("whisper-"))
    if not (Path(source) / "model.bin").is_file():
        raise FileNotFoundError(
            f"evaluation.recogniser: {source!r} is neither whisper-tiny, whisper-base nor a CTranslate2 Whisper "
            "directory (with a model.bin); `none` leaves the judged metrics out"
        )
    return Path(source)


class WhisperRecogniser:
    """A CTranslate2 Whisper, greedy, in batches of clips of about equal length."""

    def __init__(self, directory: Path, name: str, threads: int = 1, language: str = "en") -> None:
        from faster_whisper import WhisperModel
        from faster_whisper.tokenizer import Tokenizer

        self.name = name
        self._whisper = WhisperModel(str(directory), device="auto", compute_type="int8", cpu_threads=threads)
        known = self._whisper.supported_languages
        if language not in known:
            raise ValueError(f"{name} does not know the language {language!r}, but {', '.join(known)}")
        self._tokenizer = Tokenizer(
            self._whisper.hf_tokenizer, self._whisper.model.is_multilingual, task="transcribe", language=language
        )
        self._prompt = self._whisper.get_prompt(self._tokenizer, [], without_timestamps=True)

    def transcribe(self, waves: Sequence[np.ndarray]) -> list[str]:
        texts = [""] * len(waves)
        audible = [i for i, wave in enumerate(waves) if wave.size and np.abs(wave).max() > 1e-4]
        by_length = sorted(audible, key=lambda i: len(waves[i]))
        for start in range(0, len(by_length), _BATCH):
            batch = by_length[start : start + _BATCH]
            for index, text in zip(batch, self._batch([waves[i] for i in batch]), strict=True):
                texts[index] = text
        return texts

    def _batch(self, waves: list[np.ndarray]) -> list[str]:
        import ctranslate2

        longest = max(len(wave) for wave in waves) / SAMPLE_RATE
        window = min(_LONGEST_WINDOW, max(_SHORTEST_WINDOW, longest + _LEAD_IN + _TAIL))
        samples = int(window * SAMPLE_RATE) // (2 * _MEL_HOP) * (2 * _MEL_HOP)
        lead = int(_LEAD_IN * SAMPLE_RATE)
        padded = np.zeros((len(waves), samples), dtype=np.float32)
        for row, wave in zip(padded, waves, strict=True):
            kept = min(len(wave), samples - lead)
            row[lead : lead + kept] = wave[:kept]
        features = [self._whisper.feature_extractor(row)[:, : samples // _MEL_HOP] for row in padded]
        stacked = np.ascontiguousarray(np.stack(features), dtype=np.float32)
        encoded = self._whisper.model.encode(ctranslate2.StorageView.from_array(stacked))
        results = self._whisper.model.generate(
            encoded,
            [self._prompt] * len(waves),
            beam_size=1,
            max_length=min(448, len(self._prompt) + int(longest * _TOKENS_PER_SECOND) + 12),
            suppress_blank=True,
        )
        return [self._tokenizer.decode(result.sequences_ids[0]).strip() for result in results]
