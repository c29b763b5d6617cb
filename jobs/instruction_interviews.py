"""Asking everybody everything: what the job `evaluate-instructions` does between its questions and its report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.interviews import Answered, Interviews, Parts, actor, kept_in_chunks, verdicts
from jobs.shell import JobError
from jobs.subjects import Served, Subject
from speechgpt.evaluation.config import InstructionFollowingSection
from speechgpt.recipe import Recipe
from speechgpt.runtime.progress import Progress

if TYPE_CHECKING:
    from jobs.interviews import Call
    from speechgpt.evaluation.examination import Clip
    from speechgpt.evaluation.instruction_following import Asking, Row
    from speechgpt.evaluation.instruction_page import Sample
    from speechgpt.evaluation.judge import Judge
    from speechgpt.evaluation.listening import Utterance
    from speechgpt.evaluation.task_recognition import Done

_SAMPLES = 6
"""Dialogues that the report plays."""


@dataclass(frozen=True)
class Subjects:
    """Who is examined: a bundle, perhaps one that was trained without the chain, and the models of the stages."""

    served: Served
    standard: Served | None
    stages: Sequence[Subject]


def examine(
    subjects: Subjects,
    utterances: Sequence["Utterance"],
    recipe: Recipe,
    judge: "Judge",
    parts: Parts,
    progress: Progress,
) -> tuple[dict[str, Any], list["Row"], list["Sample"]]:
    """Ask everybody everything. Returns the figures, a row for each answer, and dialogues to listen to.

    What `parts` has is not asked again. Raises JobError if no utterance can be decoded, JudgeError if the judge cannot
    be asked.
    """
    import ray

    from jobs.examiners import BundleInterviewer, BundleListener
    from speechgpt.evaluation import instruction_following as following
    from speechgpt.evaluation import task_recognition
    from speechgpt.evaluation.metrics import Bootstrap
    from speechgpt.runtime import cluster

    cluster.connect(recipe.resources)
    section, bootstrap = recipe.instruction_following, Bootstrap(recipe.evaluation.bootstrap, recipe.seed)
    served = (subjects.served.address, subjects.served.store)
    with actor(BundleListener, *served, recipe.evaluation.recogniser) as listener:
        clips, unusable = ray.get(listener.encode.remote(list(utterances), recipe.data.max_seconds))
        if not clips:
            raise JobError(f"none of the {len(utterances)} questions can be decoded; the first: {unusable[0]}")
        recogniser = ray.get(listener.recogniser.remote())
        sounds = {each.id: each.sound for each in utterances}
        interviews = Interviews(clips, parts, listener if recogniser else None)
        transcripts = _transcripts(listener, clips, sounds, recipe, parts) if recogniser else None
        askings = following.askings(section)
        with actor(BundleInterviewer, *served, recipe.generation) as interviewer:
            calls = {asking: call for asking in askings if (call := _call(interviewer, asking, transcripts))}
            _hold(interviews, calls, len(clips), progress)
            done = _tasks(interviewer, clips, recipe, parts, progress)
            dialect = ray.get(interviewer.dialect.remote())
            kept = (
                {} if subjects.stages else {"bundle": _retained(interviewer, "bundle", clips, recipe, parts, progress)}
            )
        if subjects.standard:
            other = (subjects.standard.address, subjects.standard.store)
            with actor(BundleInterviewer, *other, recipe.generation) as interviewer:
                asked = [asking for asking in askings if asking.system == following.STANDARD_MODEL]
                calls = {asking: partial(_of_kind, interviewer.ask, asking.kind) for asking in asked}
                _hold(interviews, calls, len(clips), progress)
        for subject in subjects.stages:
            kept[subject.stage] = _of_stage(subject, clips, recipe, parts, progress)
        results = interviews.results(progress)
        rows = _judged(results, judge, parts, progress)
        samples = _samples(rows, results, sounds, listener)
    figures = {
        "questions": len(clips),
        "judge": judge.name,
        "recogniser": recogniser,
        **following.figures(rows, section, bootstrap),
        "all_categories": sorted({clip.category for clip in clips}),
        "task_recognition": task_recognition.figures(dialect, done, bootstrap) if done else None,
        "retention": {
            stage: following.retention(*measured, bootstrap) for stage, measured in kept.items() if measured is not None
        },
        "notes": _notes(section, subjects, recogniser),
        "unusable": unusable,
    }
    return figures, rows, samples


def _hold(interviews: Interviews, calls: "Mapping[Asking, Call]", questions: int, progress: Progress) -> None:
    with progress.count("asking", len(calls) * questions, "questions") as counter:
        for asking, call in calls.items():
            interviews.hold(asking, call, counter)


def _call(interviewer: Any, asking: "Asking", transcripts: Mapping[str, str] | None) -> "Call | None":
    """How the bundle's own model is asked; None if it is another's turn, or if nobody wrote down the questions.

    transcripts: by clip id, what the recogniser wrote.
    """
    from speechgpt.evaluation.instruction_following import CASCADES, MODEL

    if asking.system == MODEL:
        return partial(_of_kind, interviewer.ask, asking.kind)
    if asking.system == CASCADES["own"]:
        return partial(_in_steps, interviewer, asking, None)
    if asking.system == CASCADES["recogniser"] and transcripts is not None:
        return partial(_in_steps, interviewer, asking, transcripts)
    return None


def _of_kind(method: Any, kind: str, chunk: Sequence["Clip"]) -> Any:
    return method.remote(chunk, kind)


def _in_steps(
    interviewer: Any, asking: "Asking", transcripts: Mapping[str, str] | None, chunk: Sequence["Clip"]
) -> Any:
    """A typed question needs no ears; a spoken one is written down by the recogniser, or (None) by the model."""
    written = None if transcripts is None else [transcripts[clip.id] for clip in chunk]
    typed = [clip.text or "" for clip in chunk] if asking.kind in ("t2s", "t2t") else None
    return interviewer.cascade.remote(chunk, typed or written, asking.spoken)


def _transcripts(
    listener: Any, clips: Sequence["Clip"], sounds: Mapping[str, bytes], recipe: Recipe, parts: Parts
) -> dict[str, str] | None:
    """What the recogniser writes of the questions, as the model's own texts are written; None if no cascade asks."""
    import ray

    from speechgpt.language.normaliser import words

    if "recogniser" not in recipe.instruction_following.cascade:
        return None
    written: dict[str, str] | None = parts.get("transcripts")
    if written is None:
        written = ray.get(listener.originals.remote({clip.id: sounds[clip.id] for clip in clips})).words
        parts.put("transcripts", written)
    return {name: " ".join(words(text)) if recipe.data.spoken_text else text for name, text in written.items()}


def _tasks(
    interviewer: Any, clips: Sequence["Clip"], recipe: Recipe, parts: Parts, progress: Progress
) -> "dict[str, list[Done]]":
    """{task: what the model made of it}, free to write what it likes."""
    from speechgpt.evaluation.task_recognition import TASKS, Done
    from speechgpt.language.script import spread

    count = recipe.instruction_following.tasks
    some = spread([clip for clip in clips if clip.text], count, recipe.seed) if count else []
    done: dict[str, list[Done]] = {}
    with progress.count("asking without a grammar", len(TASKS) * len(some), "questions") as counter:
        for number, task in enumerate(TASKS if some else ()):
            call = partial(_unguided, interviewer, task, recipe.seed)
            replies = kept_in_chunks(call, some, counter, parts, f"task-{number}")
            done[task.name] = [Done(*reply) for reply in replies.values()]
    return done


def _unguided(interviewer: Any, task: Any, seed: int, chunk: Sequence["Clip"]) -> Any:
    return interviewer.unguided.remote(chunk, task, seed)


def _retained(
    interviewer: Any, stage: str, clips: Sequence["Clip"], recipe: Recipe, parts: Parts, progress: Progress
) -> tuple[Any, Any, Any] | None:
    """(clips, their losses, their answers) by kind, as `instruction_following.retention` takes them."""
    from speechgpt.evaluation.examination import UnitLoss
    from speechgpt.evaluation.instruction_following import RETAINED
    from speechgpt.language.script import spread

    count = recipe.instruction_following.retention
    some = spread([clip for clip in clips if clip.text and clip.answer], count, recipe.seed) if count else []
    if not some:
        return None
    losses, replies = {}, {}
    with progress.count(f"text alone, {stage}", 2 * len(RETAINED) * len(some), "questions") as counter:
        for kind in RETAINED:
            part = f"text-{stage}.{kind}"
            lost = kept_in_chunks(
                partial(_of_kind, interviewer.text_losses, kind), some, counter, parts, f"{part}.losses"
            )
            said = kept_in_chunks(partial(_of_kind, interviewer.ask, kind), some, counter, parts, part)
            losses[kind] = [UnitLoss(*lost[clip.id]) for clip in some]
            # The second field of an Answer is its text.
            replies[kind] = [said[clip.id][1] for clip in some]
    return some, losses, replies


def _of_stage(subject: Subject, clips: Sequence["Clip"], recipe: Recipe, parts: Parts, progress: Progress) -> Any:
    from jobs.examiners import StageInterviewer

    with actor(StageInterviewer, subject.workspace, subject.model, subject.adapter, recipe.generation) as interviewer:
        return _retained(interviewer, subject.stage, clips, recipe, parts, progress)


def _judged(results: "Mapping[Asking, Answered]", judge: "Judge", parts: Parts, progress: Progress) -> list["Row"]:
    """A row for each answer. Each different item is judged once, whoever said it."""
    from speechgpt.evaluation import instruction_following as following

    items = [
        item
        for asking, (clips, answers, heard) in results.items()
        for clip in clips
        for item in following.items(clip, asking, answers[clip.id], following.aloud(heard, clip.id))
        if item
    ]
    known = verdicts(items, judge, parts, progress)
    return [
        row
        for asking, (clips, answers, heard) in results.items()
        for row in following.rows(asking, clips, answers, heard, known.__getitem__)
    ]


def _samples(
    rows: Sequence["Row"], results: "Mapping[Asking, Answered]", sounds: Mapping[str, bytes], listener: Any
) -> list["Sample"]:
    """Some of the model's spoken answers to spoken questions."""
    import ray

    from speechgpt.evaluation.instruction_following import MODEL, Asking
    from speechgpt.evaluation.instruction_page import Sample

    asking = Asking(MODEL, "s2s")
    if asking not in results:
        return []
    shown = [row for row in rows if (row.system, row.kind) == asking][:_SAMPLES]
    units = {row.id: list(results[asking].answers[row.id].units or ()) for row in shown}
    aloud = ray.get(listener.spoken.remote({name: said for name, said in units.items() if said})).sounds
    return [Sample(row, sounds[row.id], aloud.get(row.id)) for row in shown]


def _notes(section: InstructionFollowingSection, subjects: Subjects, recogniser: str | None) -> list[str]:
    """What was asked for and could not be measured, in words."""
    notes = []
    if recogniser is None and "recogniser" in section.cascade:
        notes.append("evaluation.recogniser is none: spoken answers and the cascade with a recogniser have no score.")
    if section.ablation and not subjects.standard:
        notes.append(
            "Of the ablation only the model trained for the chain was asked: instruction_following.standard names no "
            "bundle that was trained without it."
        )
    if section.retention and not subjects.stages:
        notes.append("Text was asked of the bundle alone: the models of its stages are not here.")
    return notes


def standard_bundle(section: InstructionFollowingSection, served: Served) -> Served:
    """The bundle that was trained without the chain. Raises JobError if its units are not the other's."""
    other = Served.at(section.standard)
    encoders = [
        {name: digest for name, digest in opened.manifest["files"].items() if name.startswith("encoder/")}
        for opened in (other.opened(), served.opened())
    ]
    if encoders[0] != encoders[1]:
        raise JobError(
            f"instruction_following.standard: {section.standard} has another encoder than {served.address}; what the "
            "two are trained for can only be compared on the same units"
        )
    return other
