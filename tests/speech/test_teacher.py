import numpy as np
import pytest

from speechgpt.speech.config import TeacherSection
from speechgpt.speech.hubert import frame_count
from speechgpt.speech.teacher import open_teacher


@pytest.mark.parametrize("kind", ["mfcc", "whisper"])
def test_one_frame_of_features_for_each_frame_of_the_encoder(kind: str) -> None:
    teacher = open_teacher(TeacherSection(kind=kind))
    draw = np.random.default_rng(0)
    for samples in (400, 5_000, 16_000, 33_333):
        frames = teacher.frames((0.1 * draw.normal(size=samples)).astype(np.float32))
        assert frames.shape[0] == frame_count(samples)
        assert np.isfinite(frames).all()
