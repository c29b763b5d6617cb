from itertools import islice
from typing import Literal

import numpy as np
import pytest
import torch

from speechgpt.speech import codebook, hubert
from speechgpt.speech.config import EncoderTrainingSection
from speechgpt.training.distillation import Clip, Student, batch_plan, distil, frame_accuracy

ARCHITECTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
}


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_student_learns_what_the_teacher_hears(precision: Literal["fp32", "bf16"]) -> None:
    section = EncoderTrainingSection(steps=60, batch_seconds=6.4, learning_rate=3e-3, augment=0.0, precision=precision)
    student = Student(hubert.HubertFeatures(hubert.scratch(ARCHITECTURE, 0), -1, True), 3)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    heard = clips()
    before = frame_accuracy(student, heard, True)
    batches = batch_plan([len(c.wave) / 16_000 for c in heard], section, 1, 0)
    losses = [p.loss for p in distil(student, optimizer, heard.__getitem__, batches, section, seed=0, normalize=True)]
    assert len(losses) == 60
    assert losses[-1] < losses[0] / 2
    assert frame_accuracy(student, heard, True) > max(0.8, before)


def test_k_means_finds_the_units_again_in_what_the_student_hears() -> None:
    section = EncoderTrainingSection(steps=60, batch_seconds=6.4, learning_rate=3e-3, augment=0.0)
    features = hubert.HubertFeatures(hubert.scratch(ARCHITECTURE, 0), -1, True)
    student = Student(features, 3)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    heard = clips()
    batches = batch_plan([len(c.wave) / 16_000 for c in heard], section, 1, 0)
    for _ in distil(student, optimizer, heard.__getitem__, batches, section, seed=0, normalize=True):
        pass
    student.eval()
    frames = torch.cat([features([clip.wave])[0] for clip in heard])
    units = np.concatenate([clip.targets for clip in heard])
    book, _ = codebook.fit(frames.numpy(), 3, seed=0)
    clusters = book.assign(frames).numpy()
    most_common = sum(np.bincount(units[clusters == cluster]).max() for cluster in range(3))
    assert most_common / len(units) > 0.8


def test_the_plan_visits_every_clip_once_an_epoch_in_an_order_of_the_seed() -> None:
    section = EncoderTrainingSection(batch_seconds=4.0)
    seconds = np.random.default_rng(0).uniform(0.5, 3.0, 50).tolist()
    seen: list[int] = []
    for batch in batch_plan(seconds, section, 1, seed=5):
        seen += batch
        if len(seen) >= 50:
            break
    assert sorted(seen) == list(range(50))
    again = list(islice(batch_plan(seconds, section, 1, seed=5), 10))
    assert again == list(islice(batch_plan(seconds, section, 1, seed=5), 10))
    assert again != list(islice(batch_plan(seconds, section, 1, seed=6), 10))


def test_resumed_equals_unbroken() -> None:
    section = EncoderTrainingSection(steps=6, batch_seconds=3.2, augment=0.5)
    heard = clips()
    seconds = [len(clip.wave) / 16_000 for clip in heard]

    def fresh() -> tuple[Student, torch.optim.Optimizer]:
        student = Student(hubert.HubertFeatures(hubert.scratch(ARCHITECTURE, 0), -1, True), 3)
        torch.manual_seed(1)
        torch.nn.init.normal_(student.head.points)
        return student, torch.optim.AdamW(student.parameters())

    def steps(student: Student, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        batches = islice(batch_plan(seconds, section, 1, 0), first, None)
        made = distil(student, optimizer, heard.__getitem__, batches, section, seed=0, normalize=True, first_step=first)
        assert [progress.step for progress in islice(made, last - first)] == list(range(first + 1, last + 1))

    unbroken, optimizer = fresh()
    steps(unbroken, optimizer, 0, 6)
    stopped, first_optimizer = fresh()
    steps(stopped, first_optimizer, 0, 3)
    resumed, second_optimizer = fresh()
    resumed.load_state_dict(stopped.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    torch.manual_seed(99)
    steps(resumed, second_optimizer, 3, 6)
    for (name, one), other in zip(unbroken.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
