"""What `plan` reckons against what processes took, for a model of 110 million parameters."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from speechgpt.training import memory
from speechgpt.training.config import EngineSection, StageSection
from speechgpt.training.plan import Sizes

WORKER = Path(__file__).with_name("memory_worker.py")
SHAPE = {"vocab_size": 16_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
STAGE = {"mixture": {"text": 1}, "steps": 2, "block": 256, "learning_rate": 1e-4, "checkpoint_every": 100}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero-0, one worker": ({"workers": 1, "zero_stage": 0}, {"micro_batch": 1}),
    "zero-2, two workers, checkpointing": (
        {"workers": 2, "zero_stage": 2, "gradient_checkpointing": True},
        {"micro_batch": 2},
    ),
    "zero-1, one worker": ({"workers": 1, "zero_stage": 1}, {"micro_batch": 2}),
    "lora, zero-2, one worker": ({"workers": 1, "zero_stage": 2}, {"micro_batch": 2, "lora": {}}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(**SHAPE, num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_within_fifteen_percent_of_what_a_worker_took(name, model, tmp_path, record_property) -> None:
    """The memory that `plan` gives is within 15 % of a worker's measured peak over what it held after its imports."""
    from transformers import AutoConfig

    engine, stage = RUNS[name][0], {**STAGE, **RUNS[name][1]}
    measured = _measured({"model": str(model), "engine": engine, "stage": stage}, engine["workers"], tmp_path)
    assert measured["parameters"] > 1e8
    section, settings = EngineSection(**engine), StageSection(**stage)
    sizes = Sizes(AutoConfig.from_pretrained(model))
    kept = sizes.kept(settings.lora, section, settings.micro_batch, settings.block)
    planned = memory.footprint(sizes.shape(settings.lora), kept, section, settings, section.workers).peak
    record_property("planned_mib", planned >> 20)
    record_property("measured_mib", measured["peak"] >> 20)
    record_property("ratio", round(planned / measured["peak"], 3))
    print(f"{name}: planned {planned >> 20} MiB, measured {measured['peak'] >> 20} MiB")
    assert planned == pytest.approx(measured["peak"], rel=0.15)


def _measured(asked: dict[str, Any], workers: int, folder: Path) -> dict[str, int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if workers > 1:
        environment |= {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(WORKER), json.dumps(asked), str(folder)]
    started = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(workers)
    ]
    try:
        said = [worker.communicate(timeout=1500)[0] for worker in started]
        assert [worker.returncode for worker in started] == [0] * workers
    finally:
        for worker in started:
            worker.kill()
    return json.loads(said[0].splitlines()[-1])
