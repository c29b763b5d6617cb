"""A workspace as the jobs before `train` leave it, small enough for a stage to take seconds."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from speechgpt.runtime.workspace import Workspace

WORDS = [
    "what",
    "is",
    "two",
    "plus",
    "three",
    "four",
    "five",
    "color",
    "day",
    "the",
    "a",
    "dog",
    "barks",
    "capital",
    "of",
]
SETTINGS = (
    "stages.base.steps=300",
    "stages.base.checkpoint_every=60",
    "stages.base.log_every=50",
    "stages.base.block=48",
    "stages.base.mixture={text: 3, transcribe: 1}",
    "stages.chain.start_from=base",
    "stages.chain.mixture={s2s: 1}",
)


def prepared(place: Path | str) -> Workspace:
    """180 rows of random words and units, a codebook of 32 units, and the markers of the jobs that make them."""
    workspace, rng = Workspace(place), np.random.default_rng(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(3, 8))))

    def units() -> str:
        return "<sosp>" + "".join(f"<{unit}>" for unit in rng.integers(0, 32, int(rng.integers(5, 12)))) + "<eosp>"

    def row(kind: str, number: int) -> dict[str, str]:
        plain_text = {
            "text": f"[Human]: {text()}<eoh>. [SpeechGPT]: {text()}<eoa>.",
            "transcribe": f"[Human]: This is input: {units()}<eoh>.[SpeechGPT]: {text()}<eos>.",
            "s2s": f"[Human]: {units()}<eoh>. [SpeechGPT]: [tq] {text()}; [ta] {text()}; [ua] {units()}<eoa>.",
        }[kind]
        return dict(
            id=f"{kind}-{number}", kind=kind, prefix="", plain_text=plain_text, category=f"c{number % 3}", split="train"
        )

    rows = [row(kind, number) for kind in ("text", "transcribe", "s2s") for number in range(60)]
    rows[0] |= {"plain_text": f"[Human]: {'dog ' * 60}<eoh>. [SpeechGPT]: a<eoa>."}
    rows[1] |= {"split": "heldout"}
    workspace.write_table("instructions/rows.parquet", pa.Table.from_pylist(rows))
    workspace.write_bytes("encoder/kmeans.safetensors", save({"centroids": rng.normal(size=(32, 16)).astype("f4")}))
    workspace.write_json("instructions/_done/instructions.json", {"digest": "rows"})
    workspace.write_json("encoder/_done/fit-units.json", {"digest": "codebook"})
    return workspace
