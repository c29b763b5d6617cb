import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechgpt.speech.audio import FRAME
from speechgpt.speech.config import GeneratorSection
from speechgpt.speech.frozen_hifigan import FrozenConvolution
from speechgpt.speech.generators import IstftGenerator
from speechgpt.speech.packed_products import PackedWeight
from speechgpt.speech.streaming import VocoderStream, stream
from speechgpt.speech.vocoder import Vocoder, VocoderError

SMALL = {"embedding_dim": 16, "upsample_initial_channel": 32, "istft_channels": 32, "istft_blocks": (2, 2)}
SECTIONS = {
    "hifigan": GeneratorSection(**SMALL, model_in_dim=16),
    "hifigan, speakers": GeneratorSection(**SMALL, model_in_dim=32, speakers=3),
    "hifigan, no durations": GeneratorSection(**SMALL, model_in_dim=16, durations=False),
    "istft": GeneratorSection(**SMALL, model_in_dim=16, head="istft"),
    "istft, running": GeneratorSection(**SMALL, model_in_dim=16, head="istft", rounding="running"),
    "istft, speakers": GeneratorSection(**SMALL, model_in_dim=32, speakers=3, head="istft"),
}
UNITS = 50


@pytest.fixture(scope="module")
def vocoders(random_vocoder: Callable[..., Vocoder]) -> dict[str, Vocoder]:
    return {name: random_vocoder(section) for name, section in SECTIONS.items()}


def pieces(units: list[int], sizes: list[int]) -> Iterator[slice]:
    """The sizes in turn, again and again, until the units are used up."""
    start = 0
    while start < len(units):
        for size in sizes:
            yield slice(start, start + size)
            start += size


def streamed(
    made: Vocoder, units: list[int], sizes: list[int], speaker: int | None, durations: list[int] | None
) -> np.ndarray:
    voice = VocoderStream(made, speaker)
    sound = [
        voice.push(units[piece], None if durations is None else durations[piece]) for piece in pieces(units, sizes)
    ]
    return np.concatenate([*sound, voice.finish()])


@pytest.mark.parametrize("name", SECTIONS)
@settings(max_examples=40)
@given(
    units=st.lists(st.integers(0, UNITS - 1), max_size=40),
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=4),
    told=st.booleans(),
    data=st.data(),
)
def test_streamed_it_is_the_whole(
    vocoders: dict[str, Vocoder], name: str, units: list[int], sizes: list[int], told: bool, data: st.DataObject
) -> None:
    made = vocoders[name]
    durations = None
    if told:
        durations = data.draw(st.lists(st.integers(0, 4), min_size=len(units), max_size=len(units)))
    speaker = data.draw(st.integers(0, 2)) if made.model.spkr is not None else None
    whole = made.synthesize([units], speaker, None if durations is None else [durations])[0]
    np.testing.assert_allclose(streamed(made, units, sizes, speaker, durations), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("speed", [0.5, 1.7, 4.0])
def test_faster_or_slower_it_is_the_whole_at_that_speed(vocoders: dict[str, Vocoder], speed: float) -> None:
    made = vocoders["istft"]
    units = np.random.default_rng(1).integers(UNITS, size=60).tolist()
    ends = np.rint(np.cumsum(made.durations([units])[0]) / speed).astype(int)
    whole = made.synthesize([units], durations=[np.diff(ends, prepend=0).tolist()])[0]
    voice = VocoderStream(made, speed=speed)
    sound = [voice.push(units[piece]) for piece in pieces(units, [7, 1, 20])]
    np.testing.assert_allclose(np.concatenate([*sound, voice.finish()]), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "size"), [("istft", 3), ("istft, speakers", 100), ("hifigan", 10)])
def test_a_long_clip_does_not_drift(vocoders: dict[str, Vocoder], name: str, size: int) -> None:
    """The phase of the pulses and the place in the noise are carried through a minute."""
    made = vocoders[name]
    units = np.random.default_rng(0).integers(UNITS, size=700 if "istft" in name else 150).tolist()
    whole = made.synthesize([units])[0]
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(streamed(made, units, [size], None, None), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SECTIONS)
def test_memory_is_the_context_however_much_was_said(vocoders: dict[str, Vocoder], name: str) -> None:
    voice = VocoderStream(vocoders[name])
    units = np.random.default_rng(0).integers(UNITS, size=40).tolist()
    kept = []
    for _ in range(10):
        voice.push(units, [3] * 40)
        kept.append(numbers(voice))
    assert max(kept[3:]) == kept[3] > 0
    # One push of a long clip is cut as well.
    voice.push(units * 5, [3] * 200)
    assert numbers(voice) == kept[3]


def numbers(thing: object, seen: set[int] | None = None) -> int:
    """How many numbers a stream keeps alive besides the vocoder's own, whole storages counted."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, torch.nn.Module | Vocoder | FrozenConvolution | PackedWeight):
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes() // thing.element_size()
    if isinstance(thing, list | tuple):
        return sum(numbers(each, seen) for each in thing)
    return sum(numbers(each, seen) for each in vars(thing).values()) if hasattr(thing, "__dict__") else 0


def look_ahead(section: GeneratorSection) -> int:
    """Frames after its own that a frame's sound depends on, and as many before: 21 for the published CodeHiFiGAN."""
    return _hifigan_reach(section) if section.head == "hifigan" else _istft_reach(section)


def _hifigan_reach(section: GeneratorSection) -> int:
    """From the last sample of frame 0 back through the layers, to the last frame that it was made of."""
    block = max(
        sum((kernel - 1) // 2 * (dilation + 1) for dilation in dilations)
        for kernel, dilations in zip(section.resblock_kernel_sizes, section.resblock_dilation_sizes, strict=True)
    )
    at = FRAME - 1 + 3
    for rate, kernel in zip(reversed(section.upsample_rates), reversed(section.upsample_kernel_sizes), strict=True):
        # A transposed convolution puts input i at the samples i · rate - padding … + kernel - 1.
        at = (at + block + (kernel - rate) // 2) // rate
    return at + 3


def _istft_reach(section: GeneratorSection) -> int:
    up, hop, window = IstftGenerator.UP, IstftGenerator.HOP, IstftGenerator.WINDOW
    margin = (window - hop) // 2
    last_window = (FRAME - 1 + margin) // hop
    shaped_by = (last_window + section.istft_blocks[1] * 3) // up
    # The sound in a window lies between the pitches of two frames.
    pulses_by = math.floor((last_window * hop + window - margin - 1 - FRAME / 2) / FRAME) + 1
    slow = 3 + section.istft_blocks[0] * (section.istft_kernel // 2)
    return max(shaped_by, pulses_by) + 4 + slow


@pytest.mark.parametrize("name", ["hifigan", "istft"])
def test_sound_follows_at_the_look_ahead(vocoders: dict[str, Vocoder], name: str) -> None:
    """The first frame's sound is whole when `look_ahead` frames have followed, and not before."""
    voice = VocoderStream(vocoders[name])
    ahead = look_ahead(SECTIONS[name])
    samples = 0
    for frame in range(ahead + 1):
        assert samples < FRAME, f"whole after {frame} of {ahead} frames"
        samples += len(voice.push([frame], [1]))
    assert FRAME <= samples < 2 * FRAME


@pytest.mark.parametrize("name", ["hifigan", "istft"])
def test_look_ahead_is_the_receptive_field(vocoders: dict[str, Vocoder], name: str) -> None:
    """Of the sound of one frame, by changing another: `look_ahead` away it still matters, one further it does not."""
    made, ahead = vocoders[name], look_ahead(SECTIONS[name])
    here = 40
    units = np.random.default_rng(3).integers(UNITS, size=80)

    def difference(frame: int) -> float:
        changed = units.copy()
        changed[frame] = (changed[frame] + 7) % UNITS
        one, other = (made.synthesize([u], durations=[np.ones(80, int)])[0] for u in (units, changed))
        return float(np.abs(one - other)[here * FRAME : (here + 1) * FRAME].max())

    assert difference(here) > 1e-3
    assert difference(here + ahead + 1) == 0
    if name == "hifigan":
        assert difference(here - ahead - 1) == 0


def test_the_published_look_ahead() -> None:
    """±21 frames, SPEC 4.4."""
    assert look_ahead(GeneratorSection()) == 21


def test_pieces_without_sound_are_left_out(vocoders: dict[str, Vocoder]) -> None:
    made = vocoders["hifigan"]
    units = np.random.default_rng(0).integers(UNITS, size=30).tolist()
    sound = list(stream(made, (units[i : i + 2] for i in range(0, 30, 2))))
    assert all(len(each) for each in sound)
    assert len(sound) > 2
    np.testing.assert_allclose(np.concatenate(sound), made.synthesize([units])[0], rtol=0, atol=1e-5)
    assert list(stream(made, [])) == []


def test_wrong_use_is_named(vocoders: dict[str, Vocoder]) -> None:
    voice = VocoderStream(vocoders["hifigan"])
    with pytest.raises(VocoderError, match="2 units came with 1 durations"):
        voice.push([1, 2], [3])
    voice.push([1, 2], [3, 3])
    with pytest.raises(VocoderError, match="for all of its units or for none"):
        voice.push([1, 2])
    with pytest.raises(VocoderError, match="unit 50 is outside"):
        voice.push([50], [1])
    voice.finish()
    with pytest.raises(VocoderError, match="finished"):
        voice.push([1], [1])
    with pytest.raises(VocoderError, match="speaker 3"):
        VocoderStream(vocoders["istft, speakers"], speaker=3)
