"""How long a bundle takes to answer one spoken question, alone on its machine."""

import time
from dataclasses import dataclass
from pathlib import Path

from speechgpt.evaluation.examination import Examiner
from speechgpt.language.config import GenerationSection
from speechgpt.language.prompts import Turn
from speechgpt.speech import audio
from speechgpt.speech.encoder import SpeechEncoder
from speechgpt.speech.vocoder import Vocoder


@dataclass(frozen=True)
class Timing:
    """Wall time, in seconds, from the question's file to the samples of the answer, and how long the answer lasts."""

    waited: float
    answer: float


class Conversation:
    """The three parts of a bundle directory in one process, one question at a time, on `threads` cores."""

    def __init__(self, bundle: str, generation: GenerationSection, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        adapter = Path(bundle, "adapter")
        self._encoder = SpeechEncoder.load(Path(bundle, "encoder"), device="cpu")
        self._examiner = Examiner(str(Path(bundle, "language")), str(adapter) if adapter.is_dir() else None, generation)
        self._vocoder = Vocoder.load(Path(bundle, "vocoder"))

    def ask(self, sound: bytes) -> Timing | None:
        """None if the question gets no spoken answer."""
        start = time.perf_counter()
        [heard] = self._encoder.encode([audio.decode(sound)])
        model, turn = self._examiner.model, Turn("user", units=tuple(int(unit) for unit in heard.units))
        [reply] = model.answer([[turn]], "chain", self._examiner.generation)
        if not reply.units:
            return None
        [wave] = self._vocoder.synthesize([reply.units])
        return Timing(time.perf_counter() - start, len(wave) / audio.SAMPLE_RATE)
