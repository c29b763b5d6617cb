import numpy as np

from speechgpt.speech.augment import augment, begun_anywhere, disguised, recorded, resampled, shifted
from speechgpt.speech.hubert import frame_count


def test_every_change_keeps_one_target_a_frame_and_finite_sound() -> None:
    draw = np.random.default_rng(0)
    wave = draw.normal(size=24_000).astype(np.float32) * 0.1
    targets = np.arange(frame_count(len(wave)))
    for _ in range(100):
        changed, kept = augment(wave, targets, draw)
        assert len(kept) == frame_count(len(changed))
        assert np.isfinite(changed).all()
        assert (np.diff(kept) >= 0).all()


def test_targets_move_with_the_sound() -> None:
    """A click stays at the frame whose target names it."""
    wave = np.zeros(16_000)
    wave[8_000] = 1.0
    targets = (np.arange(frame_count(16_000)) == 8_000 // 320).astype(int)
    for factor in (0.85, 1.0, 1.18):
        changed, kept = resampled(wave, targets, factor)
        assert abs(np.abs(changed).argmax() / 320 - kept.argmax()) <= 1.5


def test_a_clip_that_begins_in_the_middle_keeps_the_nearest_targets() -> None:
    draw = np.random.default_rng(0)
    wave = np.arange(24_000, dtype=np.float32)
    targets = np.arange(frame_count(len(wave)))
    begins = set()
    for _ in range(200):
        changed, kept = begun_anywhere(wave, targets, draw)
        assert np.array_equal(changed, wave[-len(changed) :])
        assert len(kept) == frame_count(len(changed))
        # The old frame began at 320 times its number.
        moved = np.abs(kept * 320 - changed[np.arange(len(kept)) * 320])
        assert moved[:-1].max() <= 160 and moved[-1] <= 320
        begins.add(changed[0] % 320)
    assert len(begins) > 100
    short = np.zeros(500, np.float32)
    assert len(begun_anywhere(short, np.zeros(1), draw)[0]) == 500


def test_a_recording_keeps_what_is_said_between_pauses_and_is_never_digital_silence() -> None:
    tone = (0.5 * np.sin(np.arange(16_000) * 0.3)).astype(np.float32)
    for seed in range(50):
        made = recorded(tone, np.random.default_rng(seed))
        assert made.dtype == np.float32
        assert len(tone) <= len(made) <= len(tone) + 1.4 * 16_000
        assert np.isfinite(made).all() and np.abs(made).max() <= 1.0
        assert made.std() > 0.001 and (made == 0).mean() < 0.01
    again = recorded(tone, np.random.default_rng(49))
    np.testing.assert_array_equal(again, made)


def test_a_disguise_changes_the_voice_and_not_the_timing() -> None:
    time = np.arange(16_000) / 16_000
    tone = (0.5 * np.sin(2 * np.pi * 1000 * time) * (time > 0.5)).astype(np.float32)
    for factor in (0.8, 1.0, 1.25):
        made = shifted(tone, factor)
        assert len(made) == len(tone)
        spectrum = np.abs(np.fft.rfft(made))
        assert abs(spectrum.argmax() - 1000 * factor) < 15
        begins = np.flatnonzero(np.abs(made) > 0.25)[0] / 16_000
        assert abs(begins - 0.5) < 0.03
    for seed in range(20):
        assert len(disguised(tone, np.random.default_rng(seed))) == len(tone)
