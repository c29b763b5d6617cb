"""Speech to units and back, and the independent recogniser that listens to all of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from speechgpt.evaluation.examination import Clip
from speechgpt.evaluation.quality import raters
from speechgpt.evaluation.recogniser import open_recogniser
from speechgpt.evaluation.unit_quality import unit_error_rate
from speechgpt.speech import audio
from speechgpt.speech.augment import noised
from speechgpt.speech.config import VoiceSection
from speechgpt.speech.encoder import SpeechEncoder
from speechgpt.speech.vocoder import Vocoder
from speechgpt.speech.voices import Voice


@dataclass(frozen=True)
class Utterance:
    """A clip before it is units: the bytes of its sound file, and what is known about it (see Clip)."""

    id: str
    group: str
    speaker: str
    text: str | None
    answer: str | None
    category: str
    sound: bytes


@dataclass(frozen=True)
class Listened:
    """By clip id: what the recogniser wrote down (nothing without one), and the FLAC bytes of what it heard."""

    words: dict[str, str]
    sounds: dict[str, bytes]
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    """By rater, the predicted opinion from 1 to 5 (see `quality`), where it was asked for."""


class Listener:
    """The encoder and vocoder of a bundle directory, with a recogniser (see `open_recogniser`)."""

    def __init__(self, bundle: str, recogniser: str) -> None:
        self._encoder = SpeechEncoder.load(Path(bundle, "encoder"), device="cpu")
        self._vocoder = Vocoder.load(Path(bundle, "vocoder"))
        self._recogniser = open_recogniser(recogniser)

    def encode(self, utterances: Sequence[Utterance], longest: float) -> tuple[list[Clip], list[str]]:
        """The clips as units, and for each that cannot be used what is wrong with it. longest: seconds."""
        waves, heard, unusable = [], [], []
        for each in utterances:
            try:
                waves.append(audio.decode(each.sound, max_seconds=longest))
                heard.append(each)
            except audio.AudioError as error:
                unusable.append(f"{each.id}: {error}")
        clips = [
            Clip(u.id, u.group, u.speaker, u.text, u.answer, u.category, tuple(int(unit) for unit in encoded.units))
            for u, encoded in zip(heard, self._encoder.encode(waves), strict=True)
        ]
        return clips, unusable

    def stability(self, sounds: Mapping[str, bytes], decibels: float, seed: int) -> dict[str, float]:
        """By clip id, edits for each unit that noise at a signal-to-noise ratio of `decibels` makes; 0 at best."""
        waves = {name: audio.decode(sound) for name, sound in sounds.items()}
        noisy = [
            noised(wave, decibels, np.random.default_rng((seed, place))).astype(np.float32)
            for place, wave in enumerate(waves.values())
        ]
        quiet, loud = self._encoder.encode(list(waves.values())), self._encoder.encode(noisy)
        return {
            name: unit_error_rate(before.units.tolist(), after.units.tolist())
            for name, before, after in zip(waves, quiet, loud, strict=True)
        }

    def originals(self, sounds: Mapping[str, bytes]) -> Listened:
        """What the recogniser makes of the clips themselves: the least that any resynthesis can be blamed for."""
        return self._listen({name: audio.decode(sound) for name, sound in sounds.items()})

    def spoken(self, units: Mapping[str, Sequence[int]], rated: bool = False) -> Listened:
        """Units through the vocoder, by clip id: resynthesis of a clip's own units, or a model's answer aloud."""
        names = list(units)
        waves = self._vocoder.synthesize([list(units[name]) for name in names]) if names else []
        return self._listen(dict(zip(names, waves, strict=True)), rated)

    def said(self, texts: Mapping[str, str], voice: VoiceSection, seed: int) -> Listened:
        """Texts in a synthetic voice, by clip id: what the model's own voice is measured by."""
        speaker = Voice(voice)
        return self._listen({name: speaker.say(text, seed) for name, text in texts.items()}, rated=True)

    def recogniser(self) -> str | None:
        """Name of the recogniser, None if there is none."""
        return None if self._recogniser is None else self._recogniser.name

    def _listen(self, waves: Mapping[str, np.ndarray], rated: bool = False) -> Listened:
        sounds = {name: audio.encode(wave, "flac") for name, wave in waves.items()}
        if self._recogniser is None:
            return Listened({}, sounds)
        words = dict(zip(waves, self._recogniser.transcribe(list(waves.values())), strict=True))
        if not rated:
            return Listened(words, sounds)
        heard = list(waves.values())
        quality = {name: dict(zip(waves, rater.rate(heard), strict=True)) for name, rater in raters().items()}
        return Listened(words, sounds, quality)
