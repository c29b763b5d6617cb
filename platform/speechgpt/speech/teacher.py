"""Frame features of a stronger (Whisper), simpler (MFCC) or earlier (HuBERT) listener, at the encoder's frame rate."""

import functools
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from speechgpt.speech.audio import FRAME, SAMPLE_RATE
from speechgpt.speech.config import TeacherSection
from speechgpt.speech.hubert import UNIT_CONFIG, HubertFeatures, frame_count


class Teacher(Protocol):
    def frames(self, wave: np.ndarray) -> np.ndarray:
        """wave: float32 [samples] at 16 kHz. Returns float32 [frame_count(samples), dimensions]."""


def open_teacher(section: TeacherSection, device: str | None = None) -> Teacher:
    """device: of a HuBERT; the others compute on CPUs."""
    match section.kind:
        case "whisper":
            return WhisperTeacher(section.path)
        case "hubert":
            return HubertTeacher(section.path, device)
    return MfccTeacher()


def check(section: TeacherSection) -> None:
    """Raises ModuleNotFoundError, with what to install, or FileNotFoundError if the teacher cannot be opened here."""
    from speechgpt.speech.whisper import packaged_whisper

    if section.kind == "whisper":
        if find_spec("faster_whisper") is None:
            raise ModuleNotFoundError("faster_whisper is not installed: pip install 'speechgpt-ray[judge]'")
        directory = Path(section.path) if section.path else packaged_whisper("base")
        if not (directory / "model.bin").is_file():
            raise FileNotFoundError(f"{directory} is not a CTranslate2 Whisper directory (with a model.bin)")
    if section.kind == "hubert" and not Path(section.path, UNIT_CONFIG).is_file():
        raise FileNotFoundError(f"encoder.training.teacher.path {section.path!r}: not an encoder (with {UNIT_CONFIG})")


class WhisperTeacher:
    """Last layer of a Whisper encoder, run by CTranslate2 on the clip alone instead of 30 s: 50 frames a second."""

    _PADDING = SAMPLE_RATE * 3 // 10

    def __init__(self, path: str | os.PathLike = "") -> None:
        import ctranslate2
        from faster_whisper.feature_extractor import FeatureExtractor

        from speechgpt.speech.whisper import packaged_whisper

        self._storage: Any = ctranslate2.StorageView
        self._mel = FeatureExtractor()
        model_path = str(path or packaged_whisper("base"))
        self._model = ctranslate2.models.Whisper(model_path, device="cpu", compute_type="int8", intra_threads=1)

    def frames(self, wave: np.ndarray) -> np.ndarray:
        count = frame_count(len(wave))
        padded = np.pad(wave, (0, self._PADDING + (-(len(wave) + self._PADDING)) % FRAME))
        mel = self._mel(padded, padding=0)[:, : len(padded) // (FRAME // 2)]
        output = self._model.encode(self._storage.from_array(np.ascontiguousarray(mel[None], np.float32)), to_cpu=True)
        return np.array(output, dtype=np.float32)[0, :count]


class MfccTeacher:
    """13 MFCCs with first and second differences, normalised over the clip: as in HuBERT's own first iteration."""

    def frames(self, wave: np.ndarray) -> np.ndarray:
        from scipy.fft import dct
        from transformers.audio_utils import spectrogram

        count = frame_count(len(wave))
        log_mel = spectrogram(
            wave,
            np.hanning(400),
            400,
            FRAME,
            fft_length=512,
            power=2.0,
            center=False,
            mel_filters=_mel_filters(),
            log_mel="log",
        )
        cepstra = dct(log_mel[:, :count], axis=0, norm="ortho")[:13].T
        slope = np.gradient(cepstra, axis=0) if count > 1 else np.zeros_like(cepstra)
        curve = np.gradient(slope, axis=0) if count > 1 else slope
        stacked = np.concatenate([cepstra, slope, curve], axis=1)
        return ((stacked - stacked.mean(0)) / (stacked.std(0) + 1e-3)).astype(np.float32)


class HubertTeacher:
    """An encoder directory's own frames: HuBERT's second iteration learns from the first."""

    def __init__(self, directory: str | os.PathLike, device: str | None = None) -> None:
        self._features = HubertFeatures.load(directory, device=device)

    def frames(self, wave: np.ndarray) -> np.ndarray:
        return self._features([wave])[0].numpy()


@functools.cache
def _mel_filters() -> np.ndarray:
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(257, 40, 40.0, 7800.0, SAMPLE_RATE, norm="slaney", mel_scale="htk")
