import pytest

from jobs import preflight
from jobs.shell import JobError
from speechgpt.recipe import load


@pytest.mark.parametrize("recipe", ["tiny", "nano", "nano-voice"])
def test_the_shipped_recipes_find_what_they_need(recipe):
    preflight.check(load(recipe))


def test_all_that_is_missing_is_named_at_once(monkeypatch, tmp_path):
    installed = {"hibari": None, "espeakng_loader": None}
    monkeypatch.setattr("speechgpt.speech.voices.find_spec", lambda name: installed.get(name, "there"))
    monkeypatch.setattr("speechgpt.evaluation.recogniser.find_spec", lambda name: None)
    monkeypatch.setattr("speechgpt.training.abilities.find_spec", lambda name: None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "only"}\n')
    overrides = (
        f"instructions.text_instructions=[{rows}]",
        f"language.base={tmp_path / 'llama'}",
        "stages.chain.lora.base=int8",
    )
    with pytest.raises(JobError) as caught:
        preflight.check(load("nano", overrides))
    said = str(caught.value)
    for part in (
        "voices: heart: hibari is not installed: pip install",
        "espeakng_loader",
        "[judge]",
        "stages.chain: lora.base: int8 needs the package bitsandbytes",
        f"{rows}, line 1",
    ):
        assert part in said
    assert "language.base" in said and "no such directory" in said
    assert "joe" not in said, "what is there is not complained of"
