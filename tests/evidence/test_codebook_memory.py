"""k-means over more frames than memory holds."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FRAMES = (10**6, 10**7)
PROGRAM = """
import json, sys, time
import numpy as np, torch
from pathlib import Path
from speechgpt.speech import kmeans_passes

torch.set_num_threads(1)
frames, clusters, dimensions, block = int(sys.argv[1]), 100, 64, 100_000
centres = np.random.default_rng(0).normal(size=(300, dimensions)).astype(np.float32) * 3

def blocks():
    for number in range(frames // block):
        draw = np.random.default_rng((1, number))
        lumps = draw.integers(len(centres), size=block)
        yield centres[lumps] + draw.standard_normal((block, dimensions), dtype=np.float32)

sample = next(blocks())[: 20 * clusters]
began = time.process_time()
start = kmeans_passes.start(sample, clusters, 0)
_, report = kmeans_passes.fit(start, lambda c: kmeans_passes.partial(blocks(), c), 2, float(sample.var(0).mean()))
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps(report | {"peak": int(peak.split()[1]) * 1024, "seconds": time.process_time() - began}))
"""


def test_memory_is_flat_in_the_number_of_frames(record_property):
    """Ten times the frames of a codebook take the same memory, within 10 %."""
    peaks = {}
    for frames in FRAMES:
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(frames)], capture_output=True, text=True, check=True)
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["frames"] == frames
        peaks[frames] = report["peak"]
        record_property(f"{frames} frames, peak, MB", round(report["peak"] / 1e6, 1))
        record_property(f"{frames} frames, processor-seconds of 3 passes", round(report["seconds"], 1))
        record_property(f"{frames} frames, inertia", round(report["inertia"], 4))
    assert peaks[FRAMES[1]] <= 1.1 * peaks[FRAMES[0]]
