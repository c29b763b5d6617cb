"""Answers of a model in training, and sounds of a vocoder in training, as artifacts that MLflow shows and plays."""

import base64
import html
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.shell import Context

if TYPE_CHECKING:
    import numpy as np

    from speechgpt.speech.vocoder import Vocoder

_FOLDER = "samples"


class SpokenSamples:
    """Speaks the answers with the run's vocoder: its own if that is trained, else the one it would start from."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._vocoder: Vocoder | None = None
        self._sought = False

    def log(self, step: int, answers: list[dict[str, Any]]) -> None:
        """answers: as `answering.answered` gives them, with `row`, the held-out row that was asked."""
        sounds = [self._spoken(answer["units"]) for answer in answers]
        log_samples(self._context, step, answers, sounds)

    def _spoken(self, units: list[int] | None) -> "np.ndarray | None":
        if not units:
            return None
        if not self._sought:
            self._sought, self._vocoder = True, self._found()
        return self._vocoder.synthesize([units])[0] if self._vocoder else None

    def _found(self) -> "Vocoder | None":
        from jobs.train_vocoder import initial_model
        from speechgpt.speech.codebook import Codebook
        from speechgpt.speech.vocoder import Vocoder, VocoderError

        recipe, workspace = self._context.recipe, self._context.workspace
        try:
            if workspace.exists("vocoder/_done/train-vocoder.json"):
                with workspace.fetch("vocoder") as directory:
                    return Vocoder.load(directory)
            if recipe.vocoder.init != "scratch":
                with workspace.fetch("encoder") as directory:
                    return Vocoder(initial_model(recipe, Codebook.load(directory)))
        except (VocoderError, OSError) as error:
            self._context.progress.say(f"samples without sound: {error}")
            return None
        self._context.progress.say("samples without sound: the vocoder is trained from scratch, after this stage")
        return None


def log_samples(context: Context, step: int, samples: list[dict[str, Any]], sounds: "list[np.ndarray | None]") -> None:
    """`samples/step-N/`: index.html with players, answers.json, a .wav for each sound (float32 at 16 kHz)."""
    from speechgpt.speech import audio

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = [None if sound is None else audio.encode(sound, "wav") for sound in sounds]
        for number, content in enumerate(files):
            if content is not None:
                (folder / f"{number}.wav").write_bytes(content)
        (folder / "answers.json").write_text(json.dumps(samples, ensure_ascii=False, indent=1, default=str))
        (folder / "index.html").write_text(_page(step, samples, files))
        context.run.log_artifacts(folder, f"{_FOLDER}/step-{step:07}")


def _page(step: int, samples: list[dict[str, Any]], files: list[bytes | None]) -> str:
    lines = [f"<!doctype html><meta charset=utf-8><title>step {step}</title><h1>step {step}</h1>"]
    for sample, content in zip(samples, files, strict=True):
        lines.append("<dl>")
        for name, value in sample.items():
            if value not in (None, "", []):
                lines.append(f"<dt><b>{html.escape(name)}</b><dd>{html.escape(str(value))}")
        lines.append("</dl>")
        if content is not None:
            # In the page itself: MLflow shows pages in a frame that reaches no other file.
            sound = base64.b64encode(content).decode()
            lines.append(f'<audio controls src="data:audio/wav;base64,{sound}"></audio>')
        lines.append("<hr>")
    return "\n".join(lines)
