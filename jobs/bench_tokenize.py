"""`bench tokenize`: sound files to units by the job `tokenize`, against loops that take one file at a time.

Three sides with the same weights (HuBERT Base, layer 11, 1000 centroids), files and threads, in one run: the original's
loop with real fairseq, the loop that one writes with transformers, and the job, in each precision that there is here.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import ray_data
from jobs.shell import Context
from jobs.tokenize_speech import PHASES
from jobs.tokenize_speech import run as tokenize
from speechgpt.interop import hubert as published
from speechgpt.interop.benches.baseline import BenchError, Fairseq
from speechgpt.interop.benches.encode import LAYER, agreement, machine, mixed_clips, require_agreement, some_codebook
from speechgpt.interop.benches.timing import Taken
from speechgpt.recipe import Recipe, load
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.recordings import UTTERANCE_SCHEMA
from speechgpt.runtime.tracking import Run
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech import audio, hubert
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.units import Units, expand


def run(count: int, threads: int, seed: int, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """The result as `bench` prints it. folder: an empty directory for what the sides read."""
    import torch

    torch.set_num_threads(threads)
    ray_data.connect(_recipe("float32", threads).resources)
    files = _sound_files(count, seed, folder / "sounds")
    clips = [audio.decode(file) for file in files]
    seconds = sum(map(len, clips)) / audio.SAMPLE_RATE
    model = hubert.scratch({}, seed).eval()
    encoder = folder / "encoder"
    encoder.mkdir()
    hubert.save(model, encoder, layer=LAYER, normalize=False)
    torch.save(published.to_fairseq(model, normalize=False, where="the model"), folder / "hubert.pt")
    features = hubert.HubertFeatures(model, LAYER, normalize=False)
    codebook = some_codebook(features, clips, seed)
    codebook.save(encoder)
    np.save(folder / "centroids.npy", codebook.centroids.numpy())
    settings = {"checkpoint": str(folder / "hubert.pt"), "centroids": str(folder / "centroids.npy"), "layer": LAYER}
    loop = _TransformersLoop(encoder, codebook)
    theirs, plain = Taken(), Taken()
    units: dict[str, list[np.ndarray]] = {"fairseq": [], "transformers": []}
    jobs: dict[str, dict[str, Any]] = {}
    with Fairseq(threads, model="encoder", **settings) as fairseq:

        def fairseq_encodes(clip: np.ndarray) -> dict[str, Any]:
            np.save(folder / "wave.npy", clip)
            return fairseq.ask(wave=str(folder / "wave.npy"))

        def loops_take(numbers: range) -> None:
            for number in numbers:
                answer = fairseq_encodes(clips[number])
                theirs.add(answer["wall"], answer["processor"])
                units["fairseq"].append(np.array(answer["result"]))
                units["transformers"].append(plain.measure(lambda number=number: loop(files[number])))  # type: ignore[misc]
                advance(1)

        fairseq_encodes(clips[0])
        loop(files[0])
        # What else the machine does falls on all sides: the job stands between two halves of the loops.
        loops_take(range(count // 2))
        for precision in hubert.precisions():
            jobs[precision], units[precision] = _job(files, encoder, folder / precision, precision, threads)
        loops_take(range(count // 2, count))
    agreed = {name: agreement(units["fairseq"], units[name], features, codebook, clips) for name in list(units)[1:]}
    require_agreement(agreed)
    ours = jobs["float32"]
    return {
        "figure": round(seconds / ours["processor"], 2),
        "unit": "seconds of speech per processor-second, float32, from sound file to row of units",
        "baseline": round(seconds / theirs.processor, 2),
        "ratio": round(theirs.processor / ours["processor"], 2),
        "conditions": {
            **machine(threads),
            "clips": count,
            "seconds": round(seconds, 1),
            "model": f"HuBERT Base, random weights, layer {LAYER}, {codebook.clusters} centroids; shipped recordings",
            "baseline": "fairseq 0.12.2, one clip at a time, already decoded",
            "clock": "processor time of the side's own process; the job between two halves of the loops",
            "transformers": {
                "figure": round(seconds / plain.processor, 2),
                "ratio": round(plain.processor / ours["processor"], 2),
            },
            **{name: _told(job, theirs, plain) for name, job in jobs.items()},
            "agreement": agreed,
        },
    }


def _told(job: dict[str, Any], theirs: Taken, plain: Taken) -> dict[str, Any]:
    return {
        "ratio_to_fairseq": round(theirs.processor / job["processor"], 2),
        "ratio_to_transformers": round(plain.processor / job["processor"], 2),
        "share": {phase: round(job["worker"][phase] / job["processor"], 4) for phase in PHASES},
        "wall": {name: round(job[name], 2) for name in ("whole", "in_worker", "worker_start", "around")},
        "ray_share_of_wall": round(job["around"] / job["whole"], 4),
    }


def _sound_files(count: int, seed: int, folder: Path) -> list[Path]:
    folder.mkdir()
    files = [folder / f"{number:05d}.flac" for number in range(count)]
    for file, clip in zip(files, mixed_clips(count, seed), strict=True):
        file.write_bytes(audio.encode(clip, "flac"))
    return files


class _TransformersLoop:
    """What one writes with transformers: read a file, run the model, take a layer, find the nearest centroid."""

    def __init__(self, directory: Path, codebook: Codebook) -> None:
        from transformers import HubertModel

        self._model = HubertModel.from_pretrained(directory, local_files_only=True).eval()
        self._centroids = codebook.centroids

    def __call__(self, file: Path) -> np.ndarray:
        import soundfile
        import torch

        wave, _ = soundfile.read(file, dtype="float32")
        with torch.no_grad():
            hidden = self._model(torch.from_numpy(wave)[None], output_hidden_states=True).hidden_states[LAYER][0]
            return torch.cdist(hidden, self._centroids).argmin(1).numpy()


def _recipe(precision: str, threads: int) -> Recipe:
    actors = f"{{min_actors: 1, max_actors: 1, cpus: {threads}}}"
    # The recipe's model and voices do not matter; the encoder is in the workspace already.
    return load(
        "tiny",
        (
            f"encoder.precision={precision}",
            "encoder.batch_seconds=20",
            "corpora.shard_seconds=120",
            f"resources.tokenisation={actors}",
        ),
    )


def _job(
    files: list[Path], encoder: Path, place: Path, precision: str, threads: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What the job took (`whole`: all its time by the clock, from an empty workspace), and the units of each file."""
    workspace = Workspace(place)
    with workspace.stage("encoder") as folder:
        for file in encoder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    rows = [{"id": file.stem, "path": str(file), "split": "train", "seconds": 6.0} for file in files]
    workspace.write_table("manifest/utterances.parquet", pa.Table.from_pylist(rows, UTTERANCE_SCHEMA))
    began = time.perf_counter()
    done = tokenize(Context(_recipe(precision, threads), workspace, Progress(silent=True), Run("", "")))
    whole = time.perf_counter() - began
    worker = done["figures"]["worker_seconds"]
    table = workspace.read_table("units").to_pylist()
    if len(table) != len(files):
        raise BenchError(
            f"{len(files) - len(table)} of {len(files)} files became no units: {done['figures']['reasons']}"
        )
    units = {row["utterance_id"]: expand(Units(np.array(row["units"]), np.array(row["durations"]))) for row in table}
    taken = {
        "worker": worker,
        "processor": sum(worker[phase] for phase in PHASES),
        "whole": whole,
        "in_worker": worker["wall"],
        "worker_start": worker["start"],
        "around": whole - worker["wall"] - worker["start"],
    }
    return taken, [units[file.stem] for file in files]
