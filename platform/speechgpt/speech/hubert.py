"""HuBERT features through transformers, one clip or a padded batch, with the same result."""

import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import HubertConfig, HubertModel

from speechgpt.speech import split_products
from speechgpt.speech.audio import FRAME, MIN_SAMPLES, SAMPLE_RATE
from speechgpt.speech.frozen_hubert import FrozenFrontEnd, FrozenPositions
from speechgpt.speech.packed_products import PackedLinear, exchange_linears

Precision = Literal["float32", "bfloat16x3", "bfloat16"]
UNIT_CONFIG = "unit_config.json"


def precisions() -> list[Precision]:
    """Those that can be had on this processor, fast or not."""
    return ["float32", *(["bfloat16x3"] if split_products.available() else []), "bfloat16"]  # type: ignore[list-item]


def frame_count(samples: int) -> int:
    """F(N) = floor((N - 400) / 320) + 1 frames (SPEC 3.2)."""
    return (samples - MIN_SAMPLES) // FRAME + 1


Read = Callable[[torch.Tensor], torch.Tensor]
"""What is made of one clip's frames, float32 [frames, dimensions], where the model lies."""


class ClipStatistics(NamedTuple):
    """What the front end takes from a whole clip, for stretches of it that are encoded apart.

    mean, deviation: of its samples (0 and 1 without normalisation). channels: mean and variance of each channel after
    the first convolution, float32 [channels] each, if that has a group norm; None takes each stretch's own.
    """

    mean: float = 0.0
    deviation: float = 1.0
    channels: tuple[torch.Tensor, torch.Tensor] | None = None

    def normalised(self, stretch: np.ndarray) -> torch.Tensor:
        return (torch.from_numpy(stretch) - self.mean) / self.deviation


class HubertFeatures:
    """The output of one transformer layer of a HuBERT, for clips of any length.

    layer is 1-based and means the block's own output, as fairseq's `output_layer` does; -1 is the last. Later layers
    are dropped. normalize: each clip to zero mean and unit variance first (HuBERT Large's front end; Base has False).
    """

    def __init__(self, model: HubertModel, layer: int, normalize: bool) -> None:
        count = len(model.encoder.layers)
        layer = count if layer == -1 else layer
        if not 1 <= layer <= count:
            raise ValueError(f"encoder.layer {layer}: the model has layers 1 to {count}")
        self.layer = layer
        self.normalize = normalize
        self.precision: Precision = "float32"
        self.model = model.eval()
        self.model.encoder.layers = self.model.encoder.layers[:layer]
        self.model.encoder.layers[-1].register_forward_hook(self._keep)
        self._output: torch.Tensor
        self._front_end: FrozenFrontEnd | None = None
        first = self.model.feature_extractor.conv_layers[0]
        self._group_norm: MaskedGroupNorm | None = None
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            self._group_norm = first.layer_norm = MaskedGroupNorm(
                first.layer_norm, model.config.conv_kernel[0], model.config.conv_stride[0]
            )

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        precision: Precision = "float32",
        frozen: bool = True,
        device: str | None = None,
    ) -> "HubertFeatures":
        """Read a Hugging Face directory with its `unit_config.json` ({"layer": …}).

        device: without one a GPU if there is one. Units are those of the device, so what runs where Ray puts it says.

        On a CPU it is made fast (`freeze`), unless gradients are wanted (`frozen=False`). In bfloat16 it computes on
        GPUs, too. Raises ValueError for a precision that is not to be had.
        """
        directory = Path(directory)
        layer = json.loads((directory / UNIT_CONFIG).read_text())["layer"]
        normalize = json.loads((directory / "preprocessor_config.json").read_text())["do_normalize"]
        model = HubertModel.from_pretrained(directory, attn_implementation="sdpa", local_files_only=True)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        features = cls(nn.Module.to(model, device), layer, normalize)
        if device == "cpu" and frozen:
            features.freeze(precision)
        elif precision == "bfloat16x3" or (precision == "bfloat16" and device == "cpu"):
            raise ValueError(f"precision {precision} is for frozen models on CPUs; leave it at float32")
        else:
            features.precision = precision
        return features

    def freeze(self, precision: Precision = "float32") -> None:
        """Keep the weights as they are, and compute on a CPU with less work from here on; `forward` is no longer there.

        bfloat16x3 is float32 whose matrix products are made of bfloat16 ones (`split_products`), which needs Intel AMX.
        In bfloat16 a few units in a hundred become others: measure it on your own (`speechgpt bench encode`).
        """
        split = precision == "bfloat16x3"
        if split and not split_products.available():
            raise ValueError("precision bfloat16x3: this processor or PyTorch lacks AMX or oneMKL; take float32")
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._front_end = FrozenFrontEnd(self.model.feature_extractor.conv_layers, dtype, split)
        positions = self.model.encoder.pos_conv_embed
        if getattr(positions, "batch_norm", None) is None:
            self.model.encoder.pos_conv_embed = FrozenPositions(positions)
        nn.Module.to(self.model.feature_projection, dtype)
        nn.Module.to(self.model.encoder, dtype)
        exchange_linears(self.model, split_products.SplitLinear if split else PackedLinear)
        if dtype == torch.bfloat16:
            # PyTorch's fused attention of a CPU is slower in bfloat16 than in float32, and than plain products.
            self.model.set_attn_implementation("eager")
        self.precision = precision

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dimensions(self) -> int:
        return self.model.config.hidden_size

    @property
    def first_convolution(self) -> nn.Conv1d | None:
        """The convolution before the group norm; None for a front end without one, in which all is local."""
        return self.model.feature_extractor.conv_layers[0].conv if self._group_norm else None

    @torch.inference_mode()
    def __call__(self, waves: list[np.ndarray], read: Read | None = None) -> list[torch.Tensor]:
        """waves: float32 [samples] at 16 kHz, 400 samples or more each. Returns float32 [frames, dimensions] each, on
        the CPU; or what `read` makes of them on the model's device, so that frames need not leave it."""
        return self._frames(*pad(waves, self.normalize), read)

    @torch.inference_mode()
    def of_stretches(
        self, waves: list[np.ndarray], clip: ClipStatistics, read: Read | None = None
    ) -> list[torch.Tensor]:
        """As `__call__`, for stretches of one longer clip: normalised as that is, and not each for itself."""
        batch, lengths = pad([clip.normalised(wave).numpy() for wave in waves], False)
        if self._group_norm is None:
            return self._frames(batch, lengths, read)
        self._group_norm.moments = clip.channels
        try:
            return self._frames(batch, lengths, read)
        finally:
            self._group_norm.moments = None

    def _frames(self, batch: torch.Tensor, lengths: list[int], read: Read | None) -> list[torch.Tensor]:
        if self._front_end is not None:
            moments = None if self._group_norm is None else self._group_norm.moments
            clips = [self._front_end(row[:n], moments) for row, n in zip(batch, lengths, strict=True)]
            frames = self._transformed(clips)
        else:
            rough = self.precision == "bfloat16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=rough), whole_float32():
                frames = self.forward(batch.to(self.device), lengths)
        of_clips = (row[: frame_count(n)].float() for row, n in zip(frames, lengths, strict=True))
        return [(read(each) if read else each).cpu() for each in of_clips]

    def _transformed(self, clips: list[torch.Tensor]) -> torch.Tensor:
        """What the front end made, [frames, channels] each, through the transformer: [clips, frames, dimensions]."""
        counts = torch.tensor([len(clip) for clip in clips])
        padded = nn.utils.rnn.pad_sequence(clips, batch_first=True)
        inside = torch.arange(padded.shape[1]) < counts[:, None]
        self.model.encoder(self.model.feature_projection(padded), None if inside.all() else inside)
        return self._output

    def forward(self, batch: torch.Tensor, lengths: list[int], hidden: torch.Tensor | None = None) -> torch.Tensor:
        """batch: [clips, samples], zero after each clip. Returns [clips, frames, dimensions], with gradients.

        hidden: bool [clips, frames], what the transformer is not shown.
        """
        if self._front_end is not None:
            raise RuntimeError("a frozen HuBERT has no forward pass with gradients")
        if self._group_norm is not None:
            self._group_norm.lengths = torch.tensor(lengths)
        samples = torch.arange(batch.shape[1])
        mask = (samples < torch.tensor(lengths)[:, None]).long()
        self.model(batch, attention_mask=mask.to(batch.device), mask_time_indices=hidden)
        return self._output

    def _keep(self, _block: nn.Module, _inputs: object, output: object) -> None:
        self._output = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]


def whole_float32() -> AbstractContextManager[None]:
    """float32 convolutions of cuDNN as they are: by default it rounds what they multiply to TF32, of 10 bits."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


class MaskedGroupNorm(nn.Module):
    """GroupNorm of the first convolution (kernel and stride in samples), one group a channel, over a clip's own frames.

    The plain one also averages over padding, so that a clip's units would depend on its neighbours in the batch.
    """

    def __init__(self, norm: nn.GroupNorm, kernel: int, stride: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.kernel, self.stride = kernel, stride
        self.lengths: torch.Tensor | None = None
        self.moments: tuple[torch.Tensor, torch.Tensor] | None = None
        """Mean and variance of each channel to take in place of the batch's own, [channels] each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [clips, channels, frames]. Returns float32: moments of thousands of frames are none in bfloat16."""
        x = x.float()
        if self.lengths is None:
            raise RuntimeError("set `lengths` (samples of each clip) before the forward pass")
        frames = ((self.lengths - self.kernel) // self.stride + 1).to(x.device)
        mask = (torch.arange(x.shape[-1], device=x.device) < frames[:, None])[:, None].to(x.dtype)
        if self.moments is not None:
            mean, variance = (moment.to(x)[:, None] for moment in self.moments)
            centred = (x - mean) * mask
        else:
            count = frames[:, None, None].to(x.dtype)
            mean = (x * mask).sum(-1, keepdim=True) / count
            centred = (x - mean) * mask
            variance = centred.square().sum(-1, keepdim=True) / count
        return centred * (variance + self.eps).rsqrt() * self.weight[:, None] + self.bias[:, None] * mask


def pad(waves: list[np.ndarray], normalize: bool) -> tuple[torch.Tensor, list[int]]:
    """Clips to one zero-padded batch [clips, samples], normalised clip by clip, and their lengths in samples."""
    lengths = [len(w) for w in waves]
    if short := [n for n in lengths if n < MIN_SAMPLES]:
        raise ValueError(f"a clip of {short[0]} samples has no frame; at least {MIN_SAMPLES} are needed")
    batch = torch.zeros(len(waves), max(lengths))
    for row, wave in zip(batch, waves, strict=True):
        clip = torch.from_numpy(np.array(wave, dtype=np.float32))
        row[: len(clip)] = nn.functional.layer_norm(clip, clip.shape) if normalize else clip
    return batch, lengths


def save(model: HubertModel, directory: str | os.PathLike, *, layer: int, normalize: bool) -> None:
    """Write the Hugging Face layout plus `unit_config.json`."""
    directory = Path(directory)
    model.save_pretrained(directory)
    (directory / UNIT_CONFIG).write_text(json.dumps({"layer": layer}, indent=2) + "\n")
    extractor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_value": 0.0,
        "do_normalize": normalize,
        "return_attention_mask": True,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(extractor, indent=2) + "\n")


def scratch(architecture: dict, seed: int) -> HubertModel:
    """A randomly initialised HuBERT. Raises ValueError if its frames are not 20 ms."""
    torch.manual_seed(seed)
    config = HubertConfig(**{"layerdrop": 0.0, "mask_time_prob": 0.0, **architecture})
    if (hop := int(np.prod(config.conv_stride))) != FRAME:
        raise ValueError(f"encoder.architecture.conv_stride: a hop of {hop} samples; units are {FRAME} samples (20 ms)")
    if (field := receptive_field(config)) != MIN_SAMPLES:
        raise ValueError(
            f"encoder.architecture.conv_kernel: frames of {field} samples; HuBERT's are {MIN_SAMPLES} (25 ms)"
        )
    model = HubertModel(config)
    filters = model.feature_extractor.get_parameter("conv_layers.0.conv.weight")
    if filters.shape[2] >= _FILTER_SAMPLES:
        filters.data.copy_(_band_filters(filters.shape[0], filters.shape[2]))
    return model


_FILTER_SAMPLES = 40
"""A first convolution at least this long (2.5 ms) can hold a frequency, and starts as a bank of them."""


def _band_filters(count: int, length: int) -> torch.Tensor:
    """Windowed sinusoids, mel-spaced from 60 Hz to 7 kHz, in pairs a quarter period apart. [count, 1, length]."""
    mel = torch.linspace(2595 * math.log10(1 + 60 / 700), 2595 * math.log10(1 + 7000 / 700), (count + 1) // 2)
    hertz = 700 * (10 ** (mel / 2595) - 1)
    time = (torch.arange(length) - (length - 1) / 2) / SAMPLE_RATE
    angle = (
        2 * math.pi * hertz.repeat_interleave(2)[:count, None] * time + (torch.arange(count) % 2 * math.pi / 2)[:, None]
    )
    filters = torch.cos(angle) * torch.hann_window(length, periodic=False)
    return (filters / filters.norm(dim=1, keepdim=True))[:, None]


def receptive_field(config: HubertConfig) -> int:
    """Samples that one frame is made from."""
    hops = np.cumprod([1, *config.conv_stride[:-1]])
    return 1 + int(sum((kernel - 1) * hop for kernel, hop in zip(config.conv_kernel, hops, strict=True)))
