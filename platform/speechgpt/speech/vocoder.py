"""The unit vocoder: merged units to speech, with predicted durations, one clip or a batch (SPEC 4)."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from speechgpt.speech.audio import FRAME
from speechgpt.speech.config import GeneratorSection
from speechgpt.speech.durations import DurationPredictor, Durations, Rounding, durations
from speechgpt.speech.frozen_hifigan import LONGEST, FrozenHifiGan
from speechgpt.speech.generators import HifiGanGenerator, IstftGenerator, Sound, version
from speechgpt.speech.packed_products import Precision, multiplies_bfloat16
from speechgpt.speech.stream_generators import HifiGanStream

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_BATCH_FRAMES = 4000
"""Frames, padding included, in one forward pass."""


class VocoderError(ValueError):
    """A vocoder directory or a unit sequence that cannot be used."""


class CentroidEmbedding(nn.Module):
    """Unit embeddings as a function of the centroids, so that one vocoder serves any codebook of its encoder."""

    def __init__(self, dimensions: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(dimensions), nn.Linear(dimensions, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, centroids: Tensor) -> Tensor:
        """[K, dimensions] -> [K, channels]."""
        return self.layers(centroids)


class UnitVocoder(nn.Module):
    """Embedding table, duration predictor, optional speaker embedding, generator."""

    def __init__(self, section: GeneratorSection, units: int, centroid_dimensions: int = 0) -> None:
        super().__init__()
        self.section, self.units, self.centroid_dimensions = section, units, centroid_dimensions
        self.dict = nn.Embedding(units, section.embedding_dim)
        self.dur_predictor = DurationPredictor(section.embedding_dim) if section.durations else None
        self.spkr = nn.Embedding(section.speakers, section.embedding_dim) if section.speakers else None
        self.from_centroids = (
            CentroidEmbedding(centroid_dimensions, section.embedding_dim) if centroid_dimensions else None
        )
        self.generator = HifiGanGenerator(section) if section.head == "hifigan" else IstftGenerator(section)

    def listen_anew(self, dimensions: int) -> None:
        """Forget the encoder, for one whose frames have so many dimensions."""
        self.centroid_dimensions = dimensions
        self.from_centroids = CentroidEmbedding(dimensions, self.section.embedding_dim)

    def forward(
        self,
        frames: Tensor,
        mask: Tensor | None = None,
        speaker: Tensor | None = None,
        pitch: Tensor | None = None,
    ) -> Sound:
        """frames: embedded units, one a frame, [clips, T, embedding_dim]; mask: [clips, 1, T]; pitch: Hz [clips, T]."""
        x = self.conditioned(frames, speaker)
        return self.generator(x if mask is None else x * mask, mask, pitch)

    def conditioned(self, frames: Tensor, speaker: Tensor | None) -> Tensor:
        """What the generator takes, [clips, model_in_dim, T]."""
        x = frames.transpose(1, 2)
        if self.spkr is None:
            return x
        voice = self.spkr(torch.zeros(len(x), dtype=torch.long, device=x.device) if speaker is None else speaker)
        return torch.cat([x, voice[:, :, None].expand(-1, -1, x.shape[2])], dim=1)


class Vocoder:
    """A vocoder directory of a bundle: `config.json` and `model.safetensors` (weight norm folded).

    precision: `bfloat16` lets a HiFi-GAN on a CPU that has instructions for it compute in it: several times as fast,
    and to about 1 % of the sound's level the same; durations and lengths do not change.
    """

    def __init__(self, model: UnitVocoder, precision: Precision = "float32") -> None:
        self.model = model.eval()
        if precision != "float32" and (model.section.head != "hifigan" or self._device.type != "cpu"):
            raise VocoderError(f"precision {precision}: only a HiFi-GAN on a CPU has it; leave it at float32")
        if precision != "float32" and not multiplies_bfloat16():
            raise VocoderError(f"precision {precision}: this processor has no instructions for it; leave it at float32")
        self.precision = precision
        self._frozen: tuple[tuple, FrozenHifiGan] | None = None
        self._durations: tuple[tuple, Durations] | None = None

    @classmethod
    def load(
        cls, directory: str | os.PathLike, precision: Precision = "float32", device: str | None = None
    ) -> "Vocoder":
        """device: without one a GPU if there is one."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(directory)
        try:
            config = json.loads((directory / CONFIG).read_text())
            weights = load_file(directory / WEIGHTS)
            section = GeneratorSection.model_validate(config["generator"])
            model = UnitVocoder(section, config["num_embeddings"], config["centroid_dimensions"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise VocoderError(f"{directory}: not a vocoder: {error}") from None
        fold_weight_norm(model)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise VocoderError(f"{directory}: {WEIGHTS} does not match {CONFIG}: {error}") from None
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), precision)

    def save(self, directory: str | os.PathLike) -> None:
        from safetensors.torch import save_file

        fold_weight_norm(self.model)
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "model_type": "unit-vocoder",
            "num_embeddings": self.units,
            "centroid_dimensions": self.model.centroid_dimensions,
            "sampling_rate": 16000,
            "code_hop_size": FRAME,
            "generator": self.model.section.model_dump(mode="json"),
        }
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, directory / WEIGHTS)

    @property
    def units(self) -> int:
        return self.model.units

    @property
    def _device(self) -> torch.device:
        return self.model.dict.weight.device

    @torch.no_grad()
    def fit_codebook(self, centroids: Tensor) -> None:
        """Make the embedding table for another codebook of the same encoder. centroids: [K, D]."""
        if self.model.from_centroids is None:
            raise VocoderError("this vocoder was trained for one codebook and cannot be fitted to another")
        table = self.model.from_centroids(centroids.to(self._device))
        self.model.dict = nn.Embedding.from_pretrained(table.clone(), freeze=False)
        self.model.units = len(centroids)

    def frozen(self) -> FrozenHifiGan:
        """The HiFi-GAN for inference, made anew when a weight has changed. Raises VocoderError for another head."""
        generator = self.model.generator
        if not isinstance(generator, HifiGanGenerator):
            raise VocoderError(f"a vocoder with the head {self.model.section.head} has no HiFi-GAN")
        key = version(generator)
        if self._frozen is None or self._frozen[0] != key:
            self._frozen = key, FrozenHifiGan(generator, getattr(torch, self.precision))
        return self._frozen[1]

    def duration_layers(self) -> Durations:
        """The duration predictor for inference, made anew when a weight has changed.

        Raises VocoderError where the vocoder has none.
        """
        predictor = self.model.dur_predictor
        if predictor is None:
            raise VocoderError(
                "this vocoder does not predict durations; give them, or synthesize units of one frame each"
            )
        key = version(predictor)
        if self._durations is None or self._durations[0] != key:
            self._durations = key, durations(predictor)
        return self._durations[1]

    @torch.inference_mode()
    def durations(self, units: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Predicted frames of each merged unit: clamp(round(exp(y) - 1), min 1), or see `GeneratorSection.rounding`.

        int64 arrays.

        Raises VocoderError for a unit outside the codebook, or if this vocoder does not predict durations.
        """
        layers = self.duration_layers()
        return [self._durations_of(self.checked(clip), layers) for clip in units]

    def _durations_of(self, codes: Tensor, layers: Durations) -> np.ndarray:
        [predicted] = layers.stream().push(self.embedded(codes[None]).transpose(1, 2), last=True)
        return self.rounding().push(predicted).numpy()

    def rounding(self) -> Rounding:
        """Of one clip's durations."""
        return Rounding(self.model.section.rounding == "running")

    @torch.inference_mode()
    def synthesize(
        self,
        units: Sequence[Sequence[int]],
        speaker: int | None = None,
        durations: Sequence[Sequence[int]] | None = None,
    ) -> list[np.ndarray]:
        """Speech of each sequence of merged units: float32 [samples] at 16 kHz, 320 a frame; empty for no units.

        durations: frames of each unit; when not given they are predicted, and by a vocoder that cannot, each unit is
        one frame. Raises VocoderError for a unit outside the codebook or another number of durations than units.
        """
        sound = [np.zeros(0, np.float32) for _ in units]
        codes = [self.checked(u) for u in units]
        spoken = [i for i, c in enumerate(codes) if len(c)]
        if durations is not None:
            frames = {i: _lasting(codes[i], durations[i]) for i in spoken}
        elif self.model.dur_predictor is None:
            frames = {i: codes[i] for i in spoken}
        else:
            predicted = self.durations([units[i] for i in spoken]) if spoken else []
            frames = {i: _lasting(codes[i], d) for i, d in zip(spoken, predicted, strict=True)}
        frames = {i: f for i, f in frames.items() if len(f)}
        if not frames:
            return sound
        if self.model.section.head == "hifigan" and self._device.type == "cpu":
            # A CPU is busy with one clip; a batch would only add padding and masks.
            voice = torch.tensor([self._speaker(speaker)])
            for i, codes_of_frames in frames.items():
                given = self.model.conditioned(self.embedded(codes_of_frames[None]), voice)
                frozen = self.frozen()
                whole = frozen(given[0]) if given.shape[2] <= LONGEST else HifiGanStream(frozen).whole(given)
                sound[i] = whole.numpy()
            return sound
        batch: list[int] = []
        for index in sorted(frames, key=lambda i: (-len(frames[i]), i)):
            if batch and len(frames[batch[0]]) * (len(batch) + 1) > _BATCH_FRAMES:
                self._batch(batch, frames, speaker, sound)
                batch = []
            batch.append(index)
        self._batch(batch, frames, speaker, sound)
        return sound

    def _batch(self, batch: list[int], frames: dict[int, Tensor], speaker: int | None, sound: list[np.ndarray]) -> None:
        lengths = [len(frames[i]) for i in batch]
        padded = torch.stack([F.pad(frames[i], (0, max(lengths) - len(frames[i]))) for i in batch])
        mask = None
        if min(lengths) < max(lengths):
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])[:, None].float()
        voices = torch.full((len(batch),), self._speaker(speaker), device=self._device)
        waves = self.model(self.embedded(padded), None if mask is None else mask.to(self._device), voices).samples.cpu()
        for index, wave, length in zip(batch, waves, lengths, strict=True):
            sound[index] = wave[: length * FRAME].numpy().copy()

    def checked(self, units: Sequence[int]) -> Tensor:
        """The units as int64 [n]. Raises VocoderError for one outside the codebook."""
        codes = torch.as_tensor(np.asarray(units), dtype=torch.long)
        if len(codes) and (int(codes.min()) < 0 or int(codes.max()) >= self.units):
            wrong = int(codes.min()) if int(codes.min()) < 0 else int(codes.max())
            raise VocoderError(f"unit {wrong} is outside the vocoder's {self.units} units")
        return codes

    def embedded(self, codes: Tensor) -> Tensor:
        """[clips, n] -> [clips, n, embedding_dim], where the vocoder lies."""
        return self.model.dict(codes.to(self._device))

    def voice(self, speaker: int | None) -> Tensor | None:
        """The speaker's embedding [embedding_dim], the first one's by default; None from a vocoder of one voice."""
        return None if self.model.spkr is None else self.model.spkr.weight[self._speaker(speaker)]

    def _speaker(self, speaker: int | None) -> int:
        count = self.model.section.speakers
        if speaker is not None and not 0 <= speaker < max(1, count):
            raise VocoderError(f"speaker {speaker}: this vocoder has {count or 'one voice and no'} speakers")
        return speaker or 0


def _lasting(codes: Tensor, durations: Sequence[int] | np.ndarray) -> Tensor:
    """One unit a frame. codes: [n]; durations: frames of each."""
    frames = torch.as_tensor(np.asarray(durations), dtype=torch.long)
    if len(frames) != len(codes):
        raise VocoderError(f"{len(codes)} units came with {len(frames)} durations")
    return codes.repeat_interleave(frames)


def fold_weight_norm(model: nn.Module) -> None:
    """Replace every weight-normalised weight by its value: the same sound, with less work."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
