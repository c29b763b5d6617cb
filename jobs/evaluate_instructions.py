"""Job `evaluate-instructions`: the paper's own evaluation: how well instructions are followed, in speech and in text.

Held-out questions go in as speech and as text, and answers come back as either (four forms); a judge, a language model
behind any OpenAI-compatible route or rules, gives each a score from 1 to 5. Beside them stand a cascade of the same
models, the chain of modality with its parts left out, the tasks that the model recognises without a grammar, and what
each stage kept of its text. Writes `reports/instruction_following.json`, `.html` and, with every answer, `.parquet`.
With `--bundle B` it examines any bundle, on the held-out questions of its own recipe, spoken anew, or with
`--manifest M` on the recordings named there, which need an `answer`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer

from jobs.interviews import Answered, Interviews, Parts, actor, kept_in_chunks, verdicts
from jobs.publish import bundle_path
from jobs.shell import Context, Job, JobError, JsonOption, RecipeOption, SetOption, WorkspaceOption, execute, verb
from jobs.subjects import BundleOption, Served, Subject, recipe_of, refuse_lone_manifest, stage_subjects
from jobs.utterances import manifest_utterances, workspace_utterances
from speechgpt.evaluation.config import InstructionFollowingSection
from speechgpt.recipe import Recipe, load, resolved
from speechgpt.runtime.files import absolute
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.workspace import Workspace

if TYPE_CHECKING:
    from jobs.interviews import Call
    from speechgpt.evaluation.examination import Clip
    from speechgpt.evaluation.instruction_following import Asking, Row
    from speechgpt.evaluation.instruction_page import Sample
    from speechgpt.evaluation.judge import Judge
    from speechgpt.evaluation.listening import Utterance
    from speechgpt.evaluation.task_recognition import Done

_JSON, _HTML, _ROWS = (f"reports/instruction_following.{kind}" for kind in ("json", "html", "parquet"))
_PARTS = "reports/instruction_following.parts"
"""Answers, what was heard of them, and verdicts, as far as a killed attempt had come."""
_SAMPLES = 6
"""Dialogues that the report plays."""

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Subjects:
    """Who is examined: a bundle, perhaps one that was trained without the chain, and the models of the stages."""

    served: Served
    standard: Served | None
    stages: Sequence[Subject]


class _Line(NamedTuple):
    """A prompt of the recipe's script, as far as drawing it needs."""

    id: str
    category: str
    text: str
    stranger: bool


def run(context: Context) -> dict[str, Any]:
    """In a workspace: its bundle, its held-out clips, and the model that each stage left."""
    recipe, workspace = context.recipe, context.workspace
    subjects = [
        subject
        for subject in stage_subjects(recipe, workspace)
        if workspace.exists(subject.model) and (subject.adapter is None or workspace.exists(subject.adapter))
    ]
    questions = [each for each in workspace_utterances(workspace) if each.answer is not None]
    wanted = of_voices(questions, recipe.instruction_following, lambda each: each.group != "seen")
    return _report(context, Served(workspace.path(bundle_path(recipe))), subjects, wanted)


def run_bundle(context: Context, served: Served, manifest: str) -> dict[str, Any]:
    """A bundle alone: the recordings of a manifest, or its recipe's held-out questions, which are spoken first."""
    recipe = context.recipe
    if manifest:
        questions = [each for each in manifest_utterances(manifest, recipe.data.max_bad_fraction) if each.answer]
    else:
        questions = spoken_questions(context)
    return _report(context, served, [], questions)


def of_voices(
    questions: Sequence[Thing], section: InstructionFollowingSection, is_held_out: Callable[[Thing], bool]
) -> list[Thing]:
    """Those in the voices that the recipe asks for; all, if there are none."""
    if section.voices == "all":
        return list(questions)
    found = [each for each in questions if is_held_out(each) == (section.voices == "held-out")]
    return found or list(questions)


def spoken_questions(context: Context) -> list["Utterance"]:
    """The recipe's held-out questions, no more of them than are asked, in the samples that its pipeline judges."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from jobs.manifest import prompts_of
    from jobs.synthesize import speak
    from speechgpt.evaluation.instruction_following import chosen

    recipe, section = context.recipe, context.recipe.instruction_following
    prompts = prompts_of(recipe)
    prompts = prompts.filter(pc.and_(pc.equal(prompts["split"], "heldout"), pc.equal(prompts["role"], "question")))
    lines = [
        _Line(row["id"], row["category"], row["text"], row["stranger"])
        for row in prompts.select(_Line._fields).to_pylist()
    ]
    drawn = chosen(of_voices(lines, section, lambda line: line.stranger), section.questions, recipe.seed)
    ids = {line.id for line in drawn}
    speak(prompts.filter(pc.is_in(prompts["id"], pa.array(sorted(ids)))), recipe, context.workspace, context.progress)
    # Other settings may have left other clips here, and the same one twice.
    return list({each.id: each for each in workspace_utterances(context.workspace) if each.id in ids}.values())


def _report(
    context: Context, served: Served, stages: Sequence[Subject], questions: Sequence["Utterance"]
) -> dict[str, Any]:
    """Examine, and write what a job of this name leaves."""
    import pyarrow as pa

    from speechgpt.evaluation import instruction_following as following
    from speechgpt.evaluation.instruction_page import render
    from speechgpt.evaluation.judge import open_judge

    recipe, workspace, section = context.recipe, context.workspace, context.recipe.instruction_following
    judge = open_judge(section.judge)
    if not questions:
        raise JobError(
            f"{workspace.uri}: no held-out question with a known answer; evaluation.questions and world.held_out say "
            "how many there are, and a manifest needs the column `answer`"
        )
    asked = following.chosen(questions, section.questions, recipe.seed)
    standard = standard_bundle(section, served) if section.standard and section.ablation else None
    subjects = Subjects(served, standard, stages if section.retention else [])
    figures, rows, samples = examine(subjects, asked, recipe, judge, Parts(workspace, _PARTS), context.progress)
    workspace.write_table(_ROWS, pa.Table.from_pylist(following.table(rows)))
    workspace.write_json(_JSON, figures)
    workspace.write_bytes(_HTML, render(figures, samples, recipe.name).encode())
    workspace.delete(_PARTS)
    for name in (_JSON, _HTML, _ROWS):
        with workspace.fetch(name) as file:
            context.run.log_artifacts(file)
    context.progress.say(f"report: {workspace.path(_HTML)}")
    return {"figures": following.headlines(figures), "outputs": [_JSON, _HTML, _ROWS]}


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
                calls = {asking: partial(_ask, interviewer, asking) for asking in asked}
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
        "files": {"rows": _ROWS},
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
        return partial(_ask, interviewer, asking)
    if asking.system == CASCADES["own"]:
        return partial(_in_steps, interviewer, asking, None)
    if asking.system == CASCADES["recogniser"] and transcripts is not None:
        return partial(_in_steps, interviewer, asking, transcripts)
    return None


def _ask(interviewer: Any, asking: "Asking", chunk: Sequence["Clip"]) -> Any:
    return interviewer.ask.remote(chunk, asking.kind)


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
            lost = kept_in_chunks(
                lambda chunk, kind=kind: interviewer.text_losses.remote(chunk, kind),  # type: ignore[misc]
                some,
                counter,
                parts,
                f"text-{stage}.{kind}.losses",
            )
            said = kept_in_chunks(
                lambda chunk, kind=kind: interviewer.ask.remote(chunk, kind),  # type: ignore[misc]
                some,
                counter,
                parts,
                f"text-{stage}.{kind}",
            )
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


def evaluate_instructions(
    bundle: BundleOption = "",
    manifest: Annotated[
        str, typer.Option(help="Recordings with an `answer` to ask a bundle; else its recipe's held-out questions.")
    ] = "",
    recipe: RecipeOption = "nano",
    workspace: WorkspaceOption = "",
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    refuse_lone_manifest(bundle, manifest)
    overrides = tuple(set or ())
    with verb(json) as answer:
        if bundle:
            job, chosen, place = of_bundle(bundle, manifest, recipe, workspace, overrides)
        else:
            job, chosen = JOB, load(recipe, overrides)
            place = Workspace(workspace or f"runs/{chosen.name}")
        done = execute(job, chosen, place, json=json)
        if not json:
            _show(place.read_json(_JSON))
        answer(done)


def of_bundle(
    address: str, manifest: str, recipe: str, workspace: str, overrides: tuple[str, ...]
) -> tuple[Job, Recipe, Workspace]:
    """The job for a bundle alone: under the recipe that made it, or for want of one, on a manifest, the given one.

    Raises JobError for a bundle without a recipe and no manifest.
    """
    from speechgpt.runtime import bundle

    served = Served.at(address)
    opened = served.opened()
    made_by = recipe_of(opened, address, manifest)
    # Whoever made it tracked their runs in a place of their own.
    tree = {key: value for key, value in (made_by or {}).items() if key != "tracking"}
    chosen = resolved(tree, overrides, f"of bundle {address}") if made_by else load(recipe, overrides)
    # What the voices said under another recipe must not be taken for this one's.
    which = hashlib.sha256((opened.manifest["lineage"].get("recipe") or opened.digest).encode()).hexdigest()[:8]
    manifest = manifest and absolute(manifest)
    job = Job(
        name=JOB.name,
        part=JOB.part,
        run=partial(run_bundle, served=served, manifest=manifest),
        sections=(*_SECTIONS, "world", "voices"),
        files=lambda recipe: [str(opened.directory / bundle.INDEX), *([manifest] if manifest else []), *_files(recipe)],
        partial=JOB.partial,
    )
    return job, chosen, Workspace(f"{workspace or 'runs'}/{chosen.name}-instructions-{which}")


def _show(figures: dict[str, Any]) -> None:
    from rich.console import Console

    from speechgpt.evaluation.instruction_page import tables

    for table in tables(figures):
        Console().print(table)


def _files(recipe: Recipe) -> list[str]:
    """The index of the bundle to compare with, which names all that is in it."""
    from speechgpt.runtime import bundle

    if not recipe.instruction_following.standard:
        return []
    standard = Served.at(recipe.instruction_following.standard)
    return [str(bundle.resolve(standard.address, standard.store) / bundle.INDEX)]


_SECTIONS = ("instruction_following", "evaluation", "generation", "data")
JOB = Job(
    name="evaluate-instructions",
    part="reports",
    run=run,
    reads=("manifest", "synthesize", "publish"),
    reads_if_there=("train-base", "train-adaptation", "train-crossmodal", "train-chain"),
    sections=_SECTIONS,
    files=_files,
    partial=(_PARTS,),
)
main = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
main.command("evaluate-instructions", help=__doc__)(evaluate_instructions)

if __name__ == "__main__":
    main()
