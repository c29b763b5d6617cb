"""Two processes, then one, then two: DeepSpeed's universal format, without Ray."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

SCRIPT = Path(tiny_models.__file__).with_name("resized_workers.py")
CASES = ["zero-0", "zero-1", "zero-2", "zero-3", "lora-2", "lora-3"]


@pytest.fixture(scope="module")
def directory(block_file, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("resizing")
    subprocess.run([sys.executable, str(SCRIPT), str(block_file), str(made), ",".join(CASES)], check=True)
    return made


@pytest.fixture(scope="module")
def losses(directory) -> dict[str, dict[str, dict[str, float]]]:
    """{run: {case: {step: loss}}}."""
    curves: dict[str, dict[str, dict[str, float]]] = {}
    for file in sorted(directory.glob("*/losses-*.json")):
        for case, curve in json.loads(file.read_text()).items():
            curves.setdefault(file.parent.name, {}).setdefault(case, {}).update(curve)
    return curves


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_a_fixed_number_of_workers(losses, case):
    fixed, resized = losses["fixed"]["lora-2" if "lora" in case else "zero-2"], losses["resized"][case]
    assert len(fixed) == 9
    assert resized == pytest.approx(fixed, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["zero-2", "lora-2"])
def test_each_rank_writes_its_part_and_the_parts_are_one_checkpoint(directory, losses, case):
    """As many workers go on to the same bits, dropout and all."""
    last = json.loads((directory / "resumed" / "losses-09.json").read_text())[case]
    assert sorted(last) == ["7", "8", "9"], "it did not start anew"
    assert losses["resumed"][case] == losses["fixed"][case]


@pytest.mark.slow
def test_a_hung_rank_fails_the_others_in_the_time_of_the_recipe(directory):
    outcome = json.loads((directory / "hung.json").read_text())
    assert outcome["code"] != 0
    # Torch's own patience would be half an hour.
    assert "Timed out" in outcome["reason"] and "5000ms" in outcome["reason"], outcome["reason"]
