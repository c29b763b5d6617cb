"""What a pipeline takes from outside, looked at before its first job: hours must not end at a missing package."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs.shell import JobError
from speechgpt.recipe import Recipe


def check(recipe: Recipe) -> None:
    """Raises JobError that names everything missing, each with the recipe's key and what to do.

    World and manifests are left to the first job, which reads them whole.
    """
    if problems := list(_problems(recipe)):
        raise JobError(f"recipe {recipe.name} needs what is not here:\n  " + "\n  ".join(problems))


def _problems(recipe: Recipe) -> Iterator[str]:
    from jobs import published_rows, question_sets, text_instructions, train_text_to_unit
    from speechgpt.evaluation import recogniser
    from speechgpt.speech import teacher
    from speechgpt.speech.voices import Voice
    from speechgpt.training import abilities, pretrained

    voices = {**recipe.voices.questions, **recipe.voices.held_out}
    for name, voice in voices.items():
        yield from _tried(f"voices: {name}", Voice, voice)
    for file in recipe.instructions.text_instructions:
        yield from _tried("", text_instructions.read_file, file)
    for file in recipe.instructions.published:
        yield from _tried("", published_rows.check, file)
    for file in recipe.instructions.questions.files:
        yield from _tried("", question_sets.check, file, recipe.instructions.questions)
    if recipe.encoder.init == "scratch":
        yield from _tried("encoder.training.teacher", teacher.check, recipe.encoder.training.teacher)
    if recipe.evaluation.recogniser != "none":
        yield from _tried("evaluation", recogniser.find, recipe.evaluation.recogniser)
    if recipe.language.base.endswith((".gguf", pretrained.PACKAGED)):
        yield from _tried("language.base", pretrained.locate, recipe.language.base)
    for name, stage in recipe.stages.items():
        if stage.lora and stage.lora.base == "int8":
            yield from _tried(f"stages.{name}", abilities.require_int8)
    if train_text_to_unit.is_needed(recipe) and (init := recipe.text_to_unit.init) != "train":
        places = {"text_to_unit.init": init}
    else:
        places = {}
    places |= {"encoder.init": recipe.encoder.init, "language.base": recipe.language.base}
    places |= {"vocoder.init": recipe.vocoder.init, "codebook.init": recipe.codebook.init}
    for key, place in places.items():
        if place.startswith(("/", "./", "../", "~")) and not place.endswith(".gguf") and not Path(place).is_dir():
            yield f"{key}: {place}: no such directory"


def _tried(key: str, find: Callable[..., object], *arguments: Any) -> Iterator[str]:
    try:
        find(*arguments)
    except (JobError, OSError, ImportError, RuntimeError, ValueError) as error:
        yield f"{key}: {error}" if key else str(error)
