"""The benchmarks of jobs, as commands of `speechgpt bench`."""

from speechgpt.interop.benches.command import Clips, Json, Seed, Threads, show


def tokenize(clips: Clips = 120, threads: Threads = 1, seed: Seed = 0, json: Json = False) -> None:
    """Sound files to units by the job `tokenize`, against fairseq's and transformers' own loops."""
    from jobs.bench_tokenize import run

    show(run, clips, threads, seed, json)
