"""`bench encode`: speech to units, HuBERT Base, layer 11 of 12, 1000 centroids."""

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speechgpt.interop.benches.baseline import BenchError, Fairseq
from speechgpt.interop.benches.timing import Taken, operations, peak, profile

LAYER, CLUSTERS = 11, 1000
ROUND = 10
"""Clips that each side does in its turn, so that what else the machine does falls on both."""
_FACTORS: dict[str, str] = {
    "float32": "float32",
    "bfloat16x3": "bfloat16",
    "bfloat16": "bfloat16",
}
_PRODUCTS = {"float32": 1, "bfloat16x3": 3, "bfloat16": 1}
"""What a matrix product is made of, and of how many of them, at each precision."""
_RECORDINGS = Path(__file__).parents[2] / "recordings"


def run(count: int, threads: int, seed: int, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """The result as `bench` prints it. folder: an empty directory for what both sides read."""
    import torch

    from speechgpt.interop import hubert as published
    from speechgpt.speech import hubert
    from speechgpt.speech.encoder import SpeechEncoder
    from speechgpt.speech.units import expand

    torch.set_num_threads(threads)
    clips = mixed_clips(count, seed)
    model = hubert.scratch({}, seed).eval()
    torch.save(published.to_fairseq(model, normalize=False, where="the model"), folder / "hubert.pt")
    hubert.save(model, folder, layer=LAYER, normalize=False)
    plain = hubert.HubertFeatures(model, LAYER, normalize=False)
    codebook = some_codebook(plain, clips, seed)
    codebook.save(folder)
    np.save(folder / "centroids.npy", codebook.centroids.numpy())
    encoders = {name: SpeechEncoder.load(folder, batch_seconds=20, precision=name) for name in hubert.precisions()}
    theirs, ours = Taken(), {name: Taken() for name in encoders}
    units: dict[str, list[np.ndarray]] = {name: [] for name in ("fairseq", *encoders)}
    settings = {"checkpoint": str(folder / "hubert.pt"), "centroids": str(folder / "centroids.npy"), "layer": LAYER}
    with Fairseq(threads, model="encoder", **settings) as fairseq:

        def fairseq_encodes(wave: np.ndarray) -> np.ndarray:
            np.save(folder / "wave.npy", wave)
            answer = fairseq.ask(wave=str(folder / "wave.npy"))
            theirs.add(answer["wall"], answer["processor"])
            return np.array(answer["result"])

        for encoder in encoders.values():
            encoder.encode(clips[:1])
        fairseq_encodes(clips[0])
        theirs = Taken()
        for start in range(0, count, ROUND):
            batch = clips[start : start + ROUND]
            units["fairseq"] += [fairseq_encodes(wave) for wave in batch]
            for name, encoder in encoders.items():
                # A clip is encoded whole, as fairseq does, so units are compared frame by frame.
                found = ours[name].measure(lambda encoder=encoder, batch=batch: encoder.encode(batch))  # type: ignore[misc]
                units[name] += [expand(each) for each in found]
            advance(len(batch))
    seconds = sum(map(len, clips)) / 16_000
    longest = max(clips, key=len)
    work = operations(lambda: encoders["float32"].encode([longest])) / (len(longest) / 16_000)
    floors = {name: work * _PRODUCTS[name] / peak(getattr(torch, _FACTORS[name])) for name in encoders}
    agreed = {name: agreement(units["fairseq"], units[name], plain, codebook, clips) for name in encoders}
    require_agreement(agreed)
    return {
        "figure": round(seconds / ours["float32"].processor, 2),
        "unit": "seconds of speech per processor-second, float32",
        "baseline": round(seconds / theirs.processor, 2),
        "ratio": round(theirs.processor / ours["float32"].processor, 2),
        "conditions": {
            **machine(threads),
            "clips": count,
            "seconds": round(seconds, 1),
            "model": f"HuBERT Base, random weights, layer {LAYER}, {CLUSTERS} centroids; shipped recordings",
            "baseline": "fairseq 0.12.2, extract_features and nearest centroid, one clip at a time",
            "clock": f"processor time, both sides in turn, {ROUND} clips each",
            "precisions": {
                name: {
                    "figure": round(seconds / ours[name].processor, 2),
                    "ratio": round(theirs.processor / ours[name].processor, 2),
                    "wall_ratio": round(theirs.wall / ours[name].wall, 2),
                    "agreement": agreed[name],
                }
                for name in encoders
            },
            "floor": {
                "operations_a_second_of_speech": work,
                **{
                    name: {
                        "seconds": round(floors[name], 4),
                        "taken": round(ours[name].processor / seconds, 4),
                        "fairseq": round(theirs.processor / seconds, 4),
                    }
                    for name in encoders
                },
            },
            "profile": {
                name: profile(lambda encoder=encoder: encoder.encode([longest]))  # type: ignore[misc]
                for name, encoder in encoders.items()
            },
        },
    }


def mixed_clips(count: int, seed: int) -> list[np.ndarray]:
    """float32 [samples] each, of 1 to 12 s, evenly in the logarithm, cut from the shipped recordings in a row."""
    from speechgpt.speech.audio import decode

    draw = np.random.default_rng(seed)
    speech = np.concatenate([decode(file.read_bytes()) for file in sorted(_RECORDINGS.glob("*.opus"))])
    lengths = np.exp(draw.uniform(np.log(16_000), np.log(12 * 16_000), count)).astype(int)
    starts = draw.integers(len(speech) - lengths)
    return [speech[start : start + length].copy() for start, length in zip(starts, lengths, strict=True)]


def some_codebook(features: Any, clips: list[np.ndarray], seed: int) -> Any:
    """Centroids where frames are: frames of the first clips, drawn."""
    import torch

    from speechgpt.speech.codebook import Codebook

    frames: list[torch.Tensor] = []
    for clip in clips:
        frames += features([clip])
        if sum(map(len, frames)) >= 2 * CLUSTERS:
            break
    pool = torch.cat(frames)
    if len(pool) < CLUSTERS:
        raise BenchError(f"{len(clips)} clips hold {len(pool)} frames, {CLUSTERS} centroids need as many; --clips more")
    return Codebook(pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:CLUSTERS]])


def agreement(
    one: list[np.ndarray], other: list[np.ndarray], features: Any, codebook: Any, clips: list[np.ndarray]
) -> dict[str, float | int]:
    """Frames that are the same unit, and of the others how many are no near ties.

    A tie is near when the two nearest centroids are as far away to 1e-4 of the frame's own length, which is how
    closely the two sides' features agree.
    """
    same = total = apart = 0
    for left, right, clip in zip(one, other, clips, strict=True):
        if len(left) != len(right):
            raise BenchError(f"a clip of {len(clip)} samples gave {len(left)} frames there and {len(right)} here")
        equal = left == right
        same, total = same + int(equal.sum()), total + len(left)
        if not equal.all():
            frames = features([clip])[0][~equal]
            apart += int((codebook.margins(frames) > 1e-4 * frames.norm(dim=1)).sum())
    return {"share": round(same / total, 5), "frames": total, "differing_where_centroids_are_apart": apart}


def require_agreement(agreed: Mapping[Any, dict[str, float | int]]) -> None:
    """Of all sides whose products are as good as float32's."""
    for name, found in agreed.items():
        if name != "bfloat16" and found["differing_where_centroids_are_apart"]:
            raise BenchError(f"the two sides give different units, so their speeds do not compare: {name} {found}")


def machine(threads: int) -> dict[str, Any]:
    import os

    import torch

    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    return {
        "processor": model or platform.processor(),
        "bfloat16_instructions": torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
