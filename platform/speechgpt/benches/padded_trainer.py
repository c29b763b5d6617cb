"""A side of `bench train`: the Hugging Face Trainer on rows that are padded to the longest of their batch.

    torchrun -m speechgpt.benches.padded_trainer FOLDER

As the authors' cm_sft.py and com_sft.py (SPEC 2.4): AdamW of torch, DataCollatorForSeq2Seq with pad_to_multiple_of 8,
rows in random order, a log line a step; without FSDP, which needs GPUs.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from speechgpt.benches.turns import Turns
from speechgpt.language.scratch import train_tokenizer


class Rows(Dataset):
    """The rows that `bench train` drew, prefix masked, as the scripts' datasets give them."""

    def __init__(self, file: Path) -> None:
        stored = np.load(file)
        self._ids, self._weights = stored["ids"], stored["weights"]
        self._ends = np.cumsum(stored["lengths"])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        place = slice(self._ends[number - 1] if number else 0, self._ends[number])
        ids, weights = self._ids[place], self._weights[place]
        labels = np.where(weights > 0, ids, -100)
        return {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()}


class _Counting(DataCollatorForSeq2Seq):
    """The collator itself, which also keeps how many tokens it gave and how many places it filled with them."""

    tokens = places = 0

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        batch = super().__call__(features, return_tensors)
        self.tokens += int(batch["attention_mask"].sum())
        self.places += batch["attention_mask"].numel()
        return batch


class _InTurns(TrainerCallback):
    def __init__(self, turns: Turns, collator: _Counting, steps: int, world: int) -> None:
        self._turns, self._collator, self._steps, self._world = turns, collator, steps, world

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._turns.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self._steps == 0:
            collator = self._collator
            # The other ranks' batches are alike on average.
            self._turns.end(tokens=collator.tokens * self._world, places=collator.places * self._world)
            collator.tokens = collator.places = 0
            self._turns.begin()


def main(folder: Path) -> None:
    turns = Turns()
    plan = json.loads((folder / "plan.json").read_text())
    stage, world = plan["stage"], plan["engine"]["workers"]
    collator = _Counting(train_tokenizer(["a"], 260), pad_to_multiple_of=8, padding=True, return_tensors="pt")
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=plan["rows_a_batch"],
        gradient_accumulation_steps=stage["accumulation"],
        max_steps=stage["steps"],
        learning_rate=stage["learning_rate"],
        max_grad_norm=stage["clip"],
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        disable_tqdm=True,
        seed=plan["seed"],
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(folder / "rows.npz"),
        data_collator=collator,
        callbacks=[_InTurns(turns, collator, stage["log_every"], world)],
    ).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
