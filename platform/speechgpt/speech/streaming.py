"""Units to speech while the units still come: sample for sample what the whole would have been (SPEC 4.3, 4.4)."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from speechgpt.speech.generators import IstftGenerator
from speechgpt.speech.stream_generators import HifiGanStream, IstftStream
from speechgpt.speech.vocoder import Vocoder, VocoderError

_PIECE = 100
"""Frames that go through the generator at a time, however many are given: memory is that of two seconds of speech."""


class VocoderStream:
    """One clip. The joined pieces equal `Vocoder.synthesize` of all its units to 1e-5, whatever the pieces.

    Nothing is computed twice: each layer keeps the few samples that it needs again, so memory and the work for a unit
    do not depend on how much was spoken. Sound follows its units by as many frames as it depends on (21 for the
    published CodeHiFiGAN), and by two more units where durations are predicted. speed: how many times as fast as
    predicted the units are spoken.
    """

    def __init__(self, vocoder: Vocoder, speaker: int | None = None, speed: float = 1.0) -> None:
        self._vocoder = vocoder
        self._speed, self._spoken = speed, 0
        model = vocoder.model
        with torch.inference_mode():
            self._predictor = None if model.dur_predictor is None else vocoder.duration_layers().stream()
            self._generator = (
                IstftStream(model.generator)
                if isinstance(model.generator, IstftGenerator)
                else HifiGanStream(vocoder.frozen())
            )
            self._voice = vocoder.voice(speaker)
        self._rounding = vocoder.rounding()
        self._waiting = torch.zeros(0, dtype=torch.long)
        self._predicts: bool | None = None
        self._began = self._finished = False

    @torch.inference_mode()
    def push(self, units: Sequence[int], durations: Sequence[int] | None = None) -> np.ndarray:
        """Give the next merged units, and their frames unless these are to be predicted; get the sound that is certain.

        Returns float32 [samples] at 16 kHz, possibly none. Raises VocoderError for a unit outside the codebook, for
        durations that do not fit or come only sometimes, and after `finish`.
        """
        if self._finished:
            raise VocoderError("this stream is finished; the next clip needs one of its own")
        codes = self._vocoder.checked(units)
        if durations is not None and len(durations) != len(codes):
            raise VocoderError(f"{len(codes)} units came with {len(durations)} durations")
        predicts = durations is None and self._predictor is not None
        if not len(codes):
            return np.zeros(0, np.float32)
        if self._predicts not in (None, predicts):
            raise VocoderError("a stream has durations for all of its units or for none")
        self._predicts = predicts
        return self._speak(codes, durations, last=False)

    @torch.inference_mode()
    def finish(self) -> np.ndarray:
        """Say that no unit follows; get the rest of the sound, float32 [samples]."""
        if self._finished:
            raise VocoderError("this stream is finished already")
        self._finished = True
        if self._predicts is None:
            return np.zeros(0, np.float32)
        return self._speak(torch.zeros(0, dtype=torch.long), None, last=True)

    def _speak(self, codes: Tensor, durations: Sequence[int] | None, last: bool) -> np.ndarray:
        frames = self._frames(codes, durations, last)
        pieces = []
        for piece in frames.split(_PIECE):
            embedded = self._vocoder.embedded(piece[None]).transpose(1, 2)
            pieces.append(self._made(embedded, last=False))
        if last and self._began:
            pieces.append(self._made(self._vocoder.embedded(frames[:0][None]).transpose(1, 2), last=True))
        return torch.cat(pieces).numpy() if pieces else np.zeros(0, np.float32)

    def _made(self, frames: Tensor, last: bool) -> Tensor:
        self._began = self._began or frames.shape[2] > 0
        if self._voice is not None:
            frames = torch.cat([frames, self._voice[None, :, None].expand(-1, -1, frames.shape[2])], dim=1)
        return self._generator.push(frames, last).cpu()

    def _frames(self, codes: Tensor, durations: Sequence[int] | None, last: bool) -> Tensor:
        """One unit a frame, of the units whose durations are known by now."""
        if durations is not None:
            return codes.repeat_interleave(torch.as_tensor(np.asarray(durations), dtype=torch.long))
        if not self._predicts or self._predictor is None:
            return codes
        self._waiting = torch.cat([self._waiting, codes])
        [predicted] = self._predictor.push(self._vocoder.embedded(codes[None]).transpose(1, 2), last)
        frames = self._rounding.push(predicted)
        known, self._waiting = self._waiting[: len(frames)], self._waiting[len(frames) :].clone()
        return known.repeat_interleave(self._hurried(frames))

    def _hurried(self, frames: Tensor) -> Tensor:
        """The units' ends are rounded, not their lengths, so that no error adds up over a clip."""
        if self._speed == 1 or not len(frames):
            return frames
        ends = frames.cumsum(0) + self._spoken
        at_speed = torch.round(torch.cat([ends.new_tensor([self._spoken]), ends]).double() / self._speed).long()
        self._spoken = int(ends[-1])
        return at_speed.diff()


def stream(vocoder: Vocoder, units: Iterable[Sequence[int]], speaker: int | None = None) -> Iterator[np.ndarray]:
    """The sound of merged units that come in pieces, float32 [samples] each; pieces without sound yet are left out."""
    voice = VocoderStream(vocoder, speaker)
    for piece in units:
        if len(sound := voice.push(piece)):
            yield sound
    if len(sound := voice.finish()):
        yield sound
