"""ZeRO on two processes, without Ray: what must hold for any launcher."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("two_workers.py")


@pytest.fixture(scope="module")
def outcome(block_file, tmp_path_factory) -> dict:
    """Losses by ZeRO stage, and the files each made."""
    directory = tmp_path_factory.mktemp("zero")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(block_file), str(directory)],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank, "DS_ACCELERATOR": "cpu"},
        )
        for rank in ("0", "1")
    ]
    try:
        assert [worker.wait(timeout=600) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return json.loads((directory / "losses.json").read_text()) | {"directory": directory}


@pytest.mark.slow
def test_zero_stages_have_the_same_losses(outcome):
    assert len(outcome["0"]) == 10
    for zero_stage in ("2", "3"):
        assert outcome[zero_stage] == pytest.approx(outcome["0"], abs=1e-5)


@pytest.mark.slow
def test_zero_three_exports_the_whole_model(outcome):
    import torch
    from safetensors.torch import load_file

    whole = load_file(outcome["directory"] / "model-0" / "model.safetensors")
    gathered = load_file(outcome["directory"] / "model-3" / "model.safetensors")
    assert gathered.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(gathered[name], whole[name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_zero_three_exports_the_adapter_alone(outcome):
    from safetensors.torch import load_file

    adapter = load_file(outcome["directory"] / "adapter-3" / "adapter_model.safetensors")
    assert len(adapter) == 8 and all("lora_" in name for name in adapter)
    assert all(tensor.numel() > 0 for tensor in adapter.values())


@pytest.mark.slow
def test_each_rank_writes_its_part_and_the_parts_are_one_checkpoint(outcome):
    assert outcome["resumed"] == pytest.approx(outcome["2"][6:], abs=0)
