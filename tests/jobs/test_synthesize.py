"""Prompts are spoken by the voices that they name, and no others are asked for."""

from pathlib import Path

import pytest

from jobs.manifest import prompts_of
from jobs.synthesize import speak
from speechgpt import recipe
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech.voices import VoiceError

pytestmark = pytest.mark.ray


def test_voices_that_say_nothing_need_not_be_there(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = "voices.questions.absent={engine: kokoro, voice: am_nobody, examined: false}"
    chosen = recipe.load("tiny", (absent, "data.max_bad_fraction=0"))
    prompts, workspace = prompts_of(chosen), Workspace(tmp_path / "work")
    of_training = set(prompts["voice"].to_pylist())
    asked = prompts.filter([split == "heldout" for split in prompts["split"].to_pylist()])
    assert "absent" in of_training and "absent" not in asked["voice"].to_pylist()
    assert speak(asked, chosen, workspace, Progress(silent=True)) == 0
    spoken = workspace.read_table("speech")
    assert sorted(spoken["id"].to_pylist()) == sorted(asked["id"].to_pylist())
    with pytest.raises(Exception, match="kokoro|am_nobody") as refused:
        speak(prompts, chosen, Workspace(tmp_path / "all"), Progress(silent=True))
    assert VoiceError.__name__ in str(refused.value)
