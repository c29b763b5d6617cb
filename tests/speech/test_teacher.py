from importlib import resources

import numpy as np
import pytest

from speechgpt.speech.config import TeacherSection
from speechgpt.speech.hubert import frame_count
from speechgpt.speech.teacher import check, open_teacher

SHIPPED = str(resources.files("speechgpt") / "bundles" / "nano" / "encoder")


@pytest.mark.parametrize(
    "section",
    [TeacherSection(kind="mfcc"), TeacherSection(kind="whisper"), TeacherSection(kind="hubert", path=SHIPPED)],
    ids=lambda section: section.kind,
)
def test_one_frame_of_features_for_each_frame_of_the_encoder(section: TeacherSection) -> None:
    check(section)
    teacher = open_teacher(section)
    draw = np.random.default_rng(0)
    for samples in (400, 5_000, 16_000, 33_333):
        frames = teacher.frames((0.1 * draw.normal(size=samples)).astype(np.float32))
        assert frames.shape[0] == frame_count(samples)
        assert np.isfinite(frames).all()


@pytest.mark.parametrize("kind", ["whisper", "hubert"])
def test_a_teacher_that_is_not_there_is_named(kind: str, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        check(TeacherSection(kind=kind, path=str(tmp_path)))
