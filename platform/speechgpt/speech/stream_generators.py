"""The waveform generators over frames that come piece by piece; the layers are those of `generators`, run once."""

import torch
from torch import Tensor

from speechgpt.speech.audio import FRAME, SAMPLE_RATE
from speechgpt.speech.frozen_hifigan import FrozenConvolution, FrozenHifiGan
from speechgpt.speech.generators import (
    ConvNextBlock,
    IstftGenerator,
    glide,
    noise_source,
    pulses_at,
    stepped,
)
from speechgpt.speech.stream_layers import (
    ConvolutionStream,
    OverlapStream,
    RowsStream,
    Waiting,
    WindowStream,
)

_PIECE = 200
"""Frames of a long clip that go through together."""


class _ResBlockStream:
    def __init__(self, pairs: list[tuple[FrozenConvolution, FrozenConvolution]]) -> None:
        self._pairs = [(RowsStream(first, 0.1), RowsStream(second, 0.1), Waiting(dim=0)) for first, second in pairs]

    def push(self, x: Tensor, last: bool, usual: bool) -> Tensor:
        for first, second, residual in self._pairs:
            residual.add(x)
            x = second.push(first.push(x, last, usual), last, usual)
            residual.add_to(x)
        return x


class HifiGanStream:
    """`HifiGanGenerator` of one clip."""

    def __init__(self, generator: FrozenHifiGan) -> None:
        self._dtype = generator.dtype
        self._enter, self._leave = RowsStream(generator.enter), RowsStream(generator.leave, 0.01)
        self._levels = [
            (RowsStream(up, 0.1), [_ResBlockStream(pairs) for pairs in blocks], [Waiting(dim=0) for _ in blocks])
            for up, blocks in zip(generator.ups, generator.blocks, strict=True)
        ]

    def push(self, x: Tensor, last: bool) -> Tensor:
        """x: frames [1, model_in_dim, n]; returns the samples that follow, float32 [m]."""
        # A clip begins, goes on and ends with the same lengths in all layers; only a shorter piece brings others.
        usual = x.shape[2] in (0, _PIECE)
        x = self._enter.push(x[0].T.to(self._dtype), last, usual)
        for up, blocks, finished in self._levels:
            x = up.push(x, last, usual)
            for block, each in zip(blocks, finished, strict=True):
                each.add(block.push(x, last, usual))
            # The wider a block's kernels, the later it knows.
            count = min(len(each) for each in finished)
            x = x.new_zeros(count, x.shape[1])
            for each in finished:
                each.add_to(x)
            x /= len(finished)
        return torch.tanh_(self._leave.push(x, last, usual)[:, 0].float())

    def whole(self, x: Tensor) -> Tensor:
        """All of a clip's frames at once, in pieces, for clips of any length. float32 [320 T]."""
        pieces = [self.push(piece, last=False) for piece in x.split(_PIECE, dim=2)]
        return torch.cat([*pieces, self.push(x[:, :, :0], last=True)])


class _ConvNextStream:
    def __init__(self, block: ConvNextBlock) -> None:
        self._block = block
        self._depthwise = ConvolutionStream(block.depthwise)
        self._residual = Waiting()

    def push(self, x: Tensor, last: bool) -> Tensor:
        self._residual.add(x)
        y = self._depthwise.push(x, last)
        return self._residual.take(y.shape[2]) + self._block.shaped(y)


class _PulseStream:
    """`pulses`: the phase and half a frame are carried on."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._phase: Tensor | float = 0.0
        self._skip = FRAME // 2

    def push(self, pitch: Tensor, last: bool) -> Tensor:
        """pitch: Hz [1, n] -> the samples up to the middle of the last frame, or to its end, [1, m]."""
        middles = torch.cat([pitch[:, :1] if self._last is None else self._last, pitch], dim=1)
        self._last = middles[:, -1:].clone()
        if last:
            middles = torch.cat([middles, self._last], dim=1)
        hertz = glide(middles)[:, self._skip : -(FRAME // 2) if last else None]
        if not hertz.shape[1]:
            return hertz.float()
        self._skip = 0
        phase = (self._phase + torch.cumsum(hertz / SAMPLE_RATE, dim=1)) % 1.0
        self._phase = phase[:, -1:].clone()
        return pulses_at(phase, hertz)


class IstftStream:
    """`IstftGenerator` of one clip."""

    def __init__(self, generator: IstftGenerator) -> None:
        window, hop = generator.WINDOW, generator.HOP
        self._generator = generator
        self._trunk = generator.trunk().stream()
        self._before_pitch = Waiting()
        self._pulses, self._noise = _PulseStream(), noise_source()
        self._source, self._breath = (WindowStream(window, hop, generator.window) for _ in range(2))
        self._sources, self._breaths, self._shapes = Waiting(), Waiting(), Waiting()
        self._fast = [_ConvNextStream(block) for block in generator.fast]  # type: ignore[arg-type]
        self._sound, self._envelope = (OverlapStream(window, hop, generator.window) for _ in range(2))

    def push(self, x: Tensor, last: bool) -> Tensor:
        """x: frames [1, model_in_dim, n]; returns the samples that follow, [m]."""
        generator = self._generator
        x, expected = self._trunk.push(x, last)
        self._before_pitch.add(x)
        pitch = stepped(expected)
        if not pitch.shape[1]:
            return generator.window.new_zeros(0)
        noise = torch.randn(pitch.shape[1] * FRAME, generator=self._noise).to(x.device)[None]
        self._sources.add(self._source.push(self._pulses.push(pitch, last), last))
        self._breaths.add(self._breath.push(noise, last))
        x = generator.widened(self._before_pitch.take(pitch.shape[1]), pitch)
        for block in self._fast:
            x = block.push(x, last)
        self._shapes.add(x)
        count = min(len(self._sources), len(self._breaths), len(self._shapes))
        if not count:
            return generator.window.new_zeros(0)
        source, breath = (
            generator.spectrum(each.take(count).transpose(1, 2)) for each in (self._sources, self._breaths)
        )
        pieces = generator.pieces(self._shapes.take(count), source, breath)
        sound = self._sound.push(generator.summed(pieces), count, last)
        weight = generator.window.square()[None, :, None].expand(1, -1, count)
        envelope = self._envelope.push(generator.summed(weight), count, last)
        return generator.levelled(sound, envelope)[0]
