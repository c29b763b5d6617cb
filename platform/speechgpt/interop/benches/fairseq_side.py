"""Run by real fairseq's own Python: its own path for one clip at a time, on request. One JSON object a line each way.

    python fairseq_side.py THREADS

Nothing of this project is imported. Times are taken here, around fairseq's own calls.
"""

# ruff: noqa: E402
# isort: off
import os

# fairseq logs to standard output, from its import on; that must not come between the answers.
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import fairseq_on_python_311  # noqa: F401  # before fairseq

# isort: on
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data.dictionary import Dictionary
from fairseq.models.text_to_speech.vocoder import CodeHiFiGANVocoder

CHUNK = 1_600_000


def encoder(order: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """As SpeechGPT's speech2unit: features of each chunk of 100 s, then the nearest centroid."""
    torch.serialization.add_safe_globals([Dictionary])
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([order["checkpoint"]])
    model = models[0].eval()
    centroids = np.load(order["centroids"])
    columns = torch.from_numpy(centroids.T.copy())
    squares = torch.from_numpy((centroids.T**2).sum(0, keepdims=True))
    layer = order["layer"]

    def encode(clip: dict[str, Any]) -> list[int]:
        wave = torch.from_numpy(np.load(clip["wave"]))[None]
        features = []
        with torch.no_grad():
            for start in range(0, wave.shape[1], CHUNK):
                chunk = wave[:, start : start + CHUNK]
                found, _ = model.extract_features(source=chunk, padding_mask=None, mask=False, output_layer=layer)
                features.append(found)
        x = torch.cat(features, 1)[0]
        distance = x.pow(2).sum(1, keepdim=True) - 2 * torch.matmul(x, columns) + squares
        return distance.argmin(dim=1).numpy().tolist()

    return encode


def vocoder(order: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """As generate_waveform_from_code.py: one line of units at a time, durations predicted."""
    model = CodeHiFiGANVocoder(order["checkpoint"], json.loads(Path(order["config"]).read_text()))

    def speak(clip: dict[str, Any]) -> int:
        # fairseq's own program keeps what a backward pass would need; `lean` is without.
        with torch.no_grad() if clip["lean"] else nullcontext():
            wave = model({"code": torch.tensor(clip["units"]).view(1, -1)}, True).numpy()
        np.save(clip["sound"], wave)
        return len(wave)

    return speak


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    work: Callable[[dict[str, Any]], Any] | None = None
    for line in sys.stdin:
        order = json.loads(line)
        if work is None:
            work = {"encoder": encoder, "vocoder": vocoder}[order["model"]](order)
            ANSWERS.write(json.dumps({"ready": True}) + "\n")
            continue
        wall, processor = time.perf_counter(), time.process_time()
        result = work(order)
        taken = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        ANSWERS.write(json.dumps({**taken, "result": result}) + "\n")


if __name__ == "__main__":
    main()
