from typing import Literal

import numpy as np
import pytest
import torch
from small_encoder import ARCHITECTURE, steps, under_zero

from speechgpt.speech import codebook, hubert
from speechgpt.speech.config import EncoderTrainingSection
from speechgpt.training.distillation import Student
from speechgpt.training.hearing import Clip

WITHOUT_DROPOUT = {**ARCHITECTURE, "hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0}


def clips() -> list[Clip]:
    """Two-tone clips whose target is the tone that sounds."""
    made = []
    for seed in range(8):
        draw = np.random.default_rng(seed)
        tones = draw.integers(3, size=4)
        wave = np.concatenate([np.sin(2 * np.pi * (300, 900, 2700)[t] * np.arange(3200) / 16_000) for t in tones])
        targets = np.repeat(tones, 10)[: hubert.frame_count(len(wave))]
        made.append(Clip(wave.astype(np.float32), targets.astype(np.int16)))
    return made


def student() -> Student:
    return Student(hubert.HubertFeatures(hubert.scratch(WITHOUT_DROPOUT, 0), -1, True), 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_student_learns_what_the_teacher_hears(precision: Literal["fp32", "bf16"]) -> None:
    section = EncoderTrainingSection(steps=60, batch_seconds=6.4, learning_rate=3e-3, augment=0.0, precision=precision)
    model = student()
    before = model.measure(clips())
    losses = [progress.loss for progress in steps(under_zero(model, section), clips(), section)]
    assert len(losses) == 60
    assert losses[-1] < losses[0] / 2
    after = model.measure(clips())
    assert after["frame_accuracy"] > max(0.8, before["frame_accuracy"])
    assert after["frame_loss"] < before["frame_loss"] / 2


def test_every_frame_of_every_clip_is_asked_about_and_no_other() -> None:
    first, second = clips()[:2]
    batch = student().batch([first, Clip(second.wave[:5000], second.targets[: hubert.frame_count(5000)])], 0)
    assert batch.labels[0].tolist() == first.targets.tolist()
    assert batch.labels[1].tolist() == [*second.targets[:15], *[-100] * (len(first.targets) - 15)]
    assert batch.hidden is None


def test_k_means_finds_the_units_again_in_what_the_student_hears() -> None:
    section = EncoderTrainingSection(steps=60, batch_seconds=6.4, learning_rate=3e-3, augment=0.0)
    model = student()
    heard = clips()
    for _ in steps(under_zero(model, section), heard, section):
        pass
    model.eval()
    frames = torch.cat([model._features([clip.wave])[0] for clip in heard])
    units = np.concatenate([clip.targets for clip in heard])
    book, _ = codebook.fit(frames.numpy(), 3, seed=0)
    clusters = book.assign(frames).numpy()
    most_common = sum(np.bincount(units[clusters == cluster]).max() for cluster in range(3))
    assert most_common / len(units) > 0.8
