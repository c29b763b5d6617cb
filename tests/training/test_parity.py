"""Two workers under ZeRO 0 to 3 train as one process does that knows neither DeepSpeed, nor our loop, nor packing."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import LLAMA
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from speechgpt.training import blocks, packing

WORKER = Path(__file__).with_name("parity_workers.py")
BLOCK, STEPS, BLOCKS_A_STEP = 32, 30, 4
UNITS = (44, 20)
RATE, WARM_UP, CLIP, DECAY, BETAS = 4e-3, 3, 1.5, 0.1, (0.9, 0.98)
PROBE = [3, 9, 50, 60, 7, 41, 12, 63]
STAGE = dict(
    mixture={"text": 1},
    steps=STEPS,
    block=BLOCK,
    micro_batch=1,
    accumulation=2,
    learning_rate=RATE,
    warmup=WARM_UP / STEPS,
    weight_decay=DECAY,
    clip=CLIP,
    log_every=1,
    checkpoint_every=STEPS,
)
LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def run(model: str, zero_stage: int, engine: dict[str, object] | None = None, **stage) -> dict:
    return {
        "model": model,
        "engine": {"workers": 2, "zero_stage": zero_stage, **(engine or {})},
        "stage": STAGE | stage,
    }


RUNS = {
    "llama-0": run("llama", 0),
    "llama-1": run("llama", 1),
    "llama-2": run("llama", 2),
    "llama-3": run("llama", 3),
    "llama-2-offload": run("llama", 2, {"offload": "cpu"}),
    "llama-3-offload": run("llama", 3, {"offload": "cpu"}),
    "qwen2-2": run("qwen2", 2, {"gradient_checkpointing": True}),
    "smollm2-3": run("smollm2", 3, {"gradient_checkpointing": True}),
    "bf16-2": run("llama", 2, {"precision": "bf16"}),
    "lora-2": run("llama", 2, lora=LORA, steps=6),
    "lora-3": run("llama", 3, lora=LORA, steps=6),
}


def fresh(name: str) -> PreTrainedModel:
    """Random weights in the shape of LLaMA (a head of its own), SmolLM2 (LLaMA, head tied) or Qwen2 (biases, tied)."""
    torch.manual_seed(0)
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**LLAMA, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=name == "smollm2"))


def drawn_blocks() -> list[packing.Block]:
    """Rows of many lengths, a different number of targets in each block, some of half the weight.

    Some tokens are more frequent than others, so that there is something to learn.
    """
    rng = np.random.default_rng(0)
    often = 1 / np.arange(1, 62)
    packed = []
    for _ in range(STEPS * BLOCKS_A_STEP):
        lengths = rng.integers(4, 11, rng.integers(1, 4))
        rows = [
            (3 + rng.choice(61, n, p=often / often.sum()), rng.choice([0.0, 0.5, 1.0], n).astype(np.float32))
            for n in lengths
        ]
        packed.append(packing.pack(rows, BLOCK, pad_id=0))
    return packed


def plain_training(model: PreTrainedModel, packed: list[packing.Block]) -> tuple[list[float], list[float]]:
    """AdamW, clipping and a linear schedule over whole steps, in one process; each step's loss and length of gradient.

    Which token sees which is said here by an explicit mask, not by positions.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)

    def rate(step: int) -> float:
        return (step + 1) / WARM_UP if step < WARM_UP else 1 - (step - WARM_UP) / (STEPS - WARM_UP)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses, norms = [], []
    for step in range(STEPS):
        of_step = packed[step * BLOCKS_A_STEP : (step + 1) * BLOCKS_A_STEP]
        ids = torch.from_numpy(np.stack([block.ids for block in of_step])).long()
        weights = torch.from_numpy(np.stack([block.weights for block in of_step]))[:, 1:]
        positions = torch.from_numpy(np.stack([block.positions for block in of_step])).long()
        row = (positions == 0).cumsum(1)
        visible = (row[:, :, None] == row[:, None, :]) & torch.ones(BLOCK, BLOCK, dtype=torch.bool).tril()
        out = model(input_ids=ids, position_ids=positions, attention_mask=visible[:, None], use_cache=False)
        entropy = functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        optimizer.zero_grad()
        ((entropy * weights).sum() / weights.sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        schedule.step()
        losses.append(float(entropy.detach()[weights > 0].mean()))
    return losses, norms


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both workers trained; `outcome.json` has losses and logits by run."""
    directory = tmp_path_factory.mktemp("parity")
    blocks.write(directory / "blocks.arrow", [blocks.table(range(STEPS * BLOCKS_A_STEP), drawn_blocks())], BLOCK)
    for name in ("llama", "smollm2", "qwen2"):
        fresh(name).save_pretrained(directory / name)
    (directory / "plan.json").write_text(json.dumps({"runs": RUNS, "units": UNITS, "probe": PROBE}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(directory)],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        )
        for rank in ("0", "1")
    ]
    try:
        assert [worker.wait(timeout=900) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return directory


@pytest.fixture(scope="module")
def outcome(directory: Path) -> dict:
    return json.loads((directory / "outcome.json").read_text())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([PROBE])).logits


def told(outcome: dict, label: str) -> torch.Tensor:
    return torch.tensor(outcome[label]["logits"]).view(1, len(PROBE), -1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["llama", "qwen2", "smollm2"])
def test_losses_are_those_of_one_plain_process_step_by_step(outcome, name):
    losses, norms = plain_training(fresh(name), drawn_blocks())
    labels = [label for label in RUNS if label.startswith(name)]
    assert labels and losses[-1] < losses[0] - 0.2
    # Clipping must bite in some steps and spare others for the equality to say anything about it.
    assert min(norms) < CLIP < max(norms), norms
    for label in labels:
        assert len(outcome[label]["losses"]) == STEPS
        assert outcome[label]["losses"] == pytest.approx(losses, abs=1e-5), label


@pytest.mark.slow
def test_bfloat16_stays_near(outcome):
    assert outcome["bf16-2"]["losses"] == pytest.approx(outcome["llama-2"]["losses"], abs=0.05)
    assert outcome["bf16-2"]["losses"] != pytest.approx(outcome["llama-2"]["losses"], abs=1e-5), "it is not float32"


@pytest.mark.slow
@pytest.mark.parametrize("label", ["llama-3", "smollm2-3"])
def test_zero_three_becomes_one_file_with_the_same_logits(directory, outcome, label):
    loaded = AutoModelForCausalLM.from_pretrained(directory / label)
    torch.testing.assert_close(logits(loaded), told(outcome, label), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(logits(loaded), logits(fresh(label.removesuffix("-3"))), atol=0.1), "it has learnt"
    stored = load_file(directory / label / "model.safetensors")
    assert ("lm_head.weight" in stored) == (label == "llama-3"), "a tied head is stored once"


@pytest.mark.slow
@pytest.mark.parametrize("label", ["lora-2", "lora-3"])
def test_an_adapter_merged_is_the_adapter_stacked(directory, outcome, label):
    stacked = PeftModel.from_pretrained(fresh("llama"), directory / label)
    alone = logits(stacked)
    torch.testing.assert_close(alone, told(outcome, label), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(alone, logits(fresh("llama")), atol=1e-3), "the adapter does something"
    assert not (directory / label / "model.safetensors").exists(), "the adapter alone is kept"
    stored = load_file(directory / label / "adapter_model.safetensors")
    assert len(stored) == 8 and all("lora_" in name for name in stored), "and nothing of the base in it"
    merged = stacked.merge_and_unload()
    torch.testing.assert_close(logits(merged), alone, atol=1e-5, rtol=0)
    merged.save_pretrained(directory / f"merged {label}")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(directory / f"merged {label}")), alone, atol=1e-5, rtol=0
    )


@pytest.mark.slow
def test_lora_is_the_same_under_zero_two_and_three(outcome):
    assert outcome["lora-3"]["losses"] == pytest.approx(outcome["lora-2"]["losses"], abs=1e-5)
