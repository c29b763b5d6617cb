"""The other side of `bench serve`, in a process of its own: answers as the original makes them, one at a time.

    python -m serve.bench_original BUNDLE TOKENS

The encoder, if a recording is asked, transformers' `generate` until the answer is whole, then the vocoder over all of
it, without a server in between. One JSON object a line each way; it takes all cores, whatever OMP_NUM_THREADS says, or
one if that is faster.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal


def main(bundle: Path, tokens: int) -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch

    from speechgpt.language.config import GenerationSection
    from speechgpt.language.model import SpeechLanguageModel
    from speechgpt.language.prompts import Turn
    from speechgpt.speech.audio import SAMPLE_RATE, decode
    from speechgpt.speech.encoder import SpeechEncoder
    from speechgpt.speech.vocoder import Vocoder

    adapter = bundle / "adapter" if (bundle / "adapter").is_dir() else None
    model, voice = SpeechLanguageModel.load(bundle / "language", adapter), Vocoder.load(bundle / "vocoder")
    encoder = SpeechEncoder.load(bundle / "encoder")
    generation = GenerationSection(max_new_tokens=tokens)

    def answer(text: str, seed: int, recording: str = "", form: Literal["chain", "direct"] = "chain") -> dict[str, Any]:
        began = time.perf_counter()
        if recording:
            [heard] = encoder.encode([decode(Path(recording).read_bytes())])
            turn = Turn("user", units=tuple(heard.units.tolist()))
            [units] = [reply.units or [] for reply in model.answer([[turn]], form, generation, seed)]
        else:
            [units] = model.speak([text], generation, seed)
        [wave] = voice.synthesize([units])
        return {"taken": time.perf_counter() - began, "sound": len(wave) / SAMPLE_RATE}

    def timed(threads: int) -> float:
        torch.set_num_threads(threads)
        answer("hello", 0)
        return min(answer("hello", 0)["taken"] for _ in range(2))

    torch.set_num_threads(min({1, len(os.sched_getaffinity(0))}, key=timed))
    answers.write(json.dumps({"threads": torch.get_num_threads()}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(answer(**json.loads(line))) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
