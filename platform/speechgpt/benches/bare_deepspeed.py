"""A side of `bench train`: DeepSpeed as its own tutorial has it, on the same model and the same blocks.

    torchrun -m speechgpt.benches.bare_deepspeed FOLDER

Of ours there are only the start of the process group, the reader of the blocks and the attention: what is compared is
what stands around the model.
"""

import json
import sys
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM

from speechgpt.benches.turns import Turns
from speechgpt.training import engine as zero
from speechgpt.training import row_attention
from speechgpt.training.blocks import Blocks
from speechgpt.training.config import EngineSection, StageSection


def main(folder: Path) -> None:
    turns = Turns()
    plan = json.loads((folder / "plan.json").read_text())
    stage, section = StageSection(**plan["stage"]), EngineSection(**plan["engine"])
    zero.join(section)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(plan["seed"])
    configuration = {
        "train_micro_batch_size_per_gpu": stage.micro_batch,
        "gradient_accumulation_steps": stage.accumulation,
        "gradient_clipping": stage.clip,
        "zero_optimization": {"stage": section.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }
    attention = row_attention.implementation(AutoConfig.from_pretrained(folder / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation=attention)
    by_rows = attention == row_attention.NAME
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, betas=zero.BETAS, fused=True)
    engine, *_ = zero.import_deepspeed().initialize(model=model, optimizer=optimizer, config=configuration)
    engine.train()
    # All in memory beforehand, as a tutorial's DataLoader over tensors has it.
    blocks = Blocks(folder / "blocks.arrow")
    data = blocks.read(range(len(blocks)))
    labels = data.ids.masked_fill(data.weights == 0, -100)
    of_micro = stage.micro_batch * world
    place = 0
    while True:
        turns.begin()
        losses, tokens = [], 0
        for _ in range(stage.log_every * stage.accumulation):
            mine = slice(place + rank * stage.micro_batch, place + (rank + 1) * stage.micro_batch)
            rows = {"row_lengths": row_attention.row_lengths(data.positions[mine])} if by_rows else {}
            loss = engine(
                input_ids=data.ids[mine],
                position_ids=data.positions[mine],
                labels=labels[mine],
                use_cache=False,
                **rows,
            ).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            tokens += int(blocks.tokens[place : place + of_micro].sum())
            place += of_micro
        turns.end(tokens=tokens, loss=sum(losses) / len(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
