from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_encoder import ARCHITECTURE, steps, under_zero

from speechgpt.speech import hubert
from speechgpt.speech.config import EncoderTrainingSection, MaskingSection
from speechgpt.training import masked_prediction
from speechgpt.training.hearing import Batch, Clip

CLASSES = 3


@given(
    frames=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    probability=st.floats(0.01, 0.2),
    span=st.integers(1, 12),
    seed=st.integers(0, 2**40),
)
def test_stretches_are_hidden_inside_clips_alone(frames, probability, span, seed):
    section = MaskingSection(start_probability=probability, span=span)
    before = np.random.get_state()[1].copy()
    hidden = masked_prediction.hide(frames, section, seed)
    assert (np.random.get_state()[1] == before).all(), "numpy's own generator is as it was"
    assert hidden.shape == (len(frames), max(frames))
    assert (hidden == masked_prediction.hide(frames, section, seed)).all()
    for row, count in zip(hidden, frames, strict=True):
        assert not row[count:].any()
        if count >= 2 * span:
            assert row.sum() >= span, "something is asked of every clip with room for it"


def test_what_is_hidden_does_not_depend_on_who_draws_beside():
    """Batches are made ready on a thread while the model is measured."""
    alone = [masked_prediction.hide([300] * 4, MaskingSection(), seed) for seed in range(80)]
    with ThreadPoolExecutor(4) as threads:
        beside = list(threads.map(lambda seed: masked_prediction.hide([300] * 4, MaskingSection(), seed), range(80)))
    assert np.array_equal(alone, beside)


def test_as_much_is_hidden_as_in_hubert():
    """A stretch of 10 frames begins at 8 % of the frames: about half of them are hidden, since stretches overlap."""
    found = masked_prediction.hide([1000] * 40, MaskingSection(), 1)
    assert 0.5 < found.mean() < 0.6
    assert (found[0] != found[1]).any()


def clips() -> list[Clip]:
    """Tones of 0.4 s that come in one of two orders, the target being the tone: what is hidden can be told."""
    made = []
    for seed in range(8):
        tones = np.resize((0, 1, 2) if seed % 2 else (0, 2, 1), 6)
        wave = np.concatenate([np.sin(2 * np.pi * (300, 900, 2700)[t] * np.arange(6400) / 16_000) for t in tones])
        targets = np.repeat(tones, 20)[: hubert.frame_count(len(wave))]
        made.append(Clip(wave.astype(np.float32), targets.astype(np.int16)))
    return made


def test_only_hidden_frames_are_asked_about():
    section = EncoderTrainingSection(objective="masked", masked=MaskingSection(start_probability=0.03))
    short = clips()[1]._replace(wave=clips()[1].wave[:20_000], targets=clips()[1].targets[:62])
    batch = predictor(section).batch([clips()[0], short], 3)
    asked = batch.labels != -100
    assert (
        asked.any()
        and batch.hidden is not None
        and (asked == batch.hidden).all()
        and (batch.labels[asked] < CLASSES).all()
    )


def predictor(section: EncoderTrainingSection) -> masked_prediction.MaskedPredictor:
    torch.manual_seed(0)
    model = hubert.scratch(masked_prediction.architecture(section, ARCHITECTURE), 0)
    return masked_prediction.MaskedPredictor(hubert.HubertFeatures(model, -1, True), CLASSES, section.masked)


def test_what_is_hidden_is_not_heard():
    """A clip whose hidden stretch sounds otherwise gives the same predictions there, but for the edges that the
    convolutions of neighbouring frames hear."""
    section = EncoderTrainingSection(objective="masked")
    model = predictor(section)
    model.eval()
    wave = clips()[0].wave
    hidden = torch.zeros(1, hubert.frame_count(len(wave)), dtype=torch.bool)
    hidden[:, 20:60] = True
    other = wave.copy()
    other[21 * 320 : 59 * 320] = 0.3 * np.random.default_rng(0).standard_normal(38 * 320).astype(np.float32)
    # Not normalised, which would let every frame hear of it.
    found = [model._features.forward(torch.from_numpy(each)[None], [len(each)], hidden) for each in (wave, other)]
    torch.testing.assert_close(found[0], found[1])
    open_ears = [model._features.forward(torch.from_numpy(each)[None], [len(each)]) for each in (wave, other)]
    assert (open_ears[0] - open_ears[1]).abs().max() > 0.01


def test_a_batch_is_asked_as_its_clips_are_alone():
    """Losses are sums over hidden frames, so that those of clips add up to the batch's."""
    section = EncoderTrainingSection(objective="masked")
    model = predictor(section)
    model.eval()
    heard = [clips()[0], Clip(clips()[1].wave[:25_000], clips()[1].targets[: hubert.frame_count(25_000)])]
    together = model.batch(heard, 5)
    assert together.hidden is not None
    alone = [
        Batch(
            torch.from_numpy(np.float32((c.wave - c.wave.mean()) / np.sqrt(c.wave.var() + 1e-5)))[None],
            [len(c.wave)],
            together.labels[i : i + 1, : len(c.targets)],
            together.hidden[i : i + 1, : len(c.targets)],
        )
        for i, c in enumerate(heard)
    ]
    with torch.no_grad():
        whole, parts = model(together), [model(each) for each in alone]
    torch.testing.assert_close(whole.total, sum(part.total for part in parts), rtol=1e-4, atol=1e-3)
    assert int(whole.frames) == sum(int(part.frames) for part in parts)


def test_what_is_hidden_is_learnt_from_what_is_not():
    """Measured: 0.70 of the hidden frames right, 0.38 before."""
    masked = MaskingSection(start_probability=0.03)
    settings = {"steps": 60, "batch_seconds": 9.6, "learning_rate": 6e-3, "augment": 0.0}
    section = EncoderTrainingSection(objective="masked", masked=masked, **settings)
    model = predictor(section)
    before = model.measure(clips())
    losses = [done.loss for done in steps(under_zero(model, section), clips(), section)]
    after = model.measure(clips())
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert after["hidden_accuracy"] > 0.55 > before["hidden_accuracy"]
    assert after["hidden_loss"] < before["hidden_loss"]
