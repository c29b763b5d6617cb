"""Job `evaluate-instructions`: the paper's own evaluation: how well instructions are followed, in speech and in text.

Held-out questions go in as speech and as text, and answers come back as either (four forms); a judge, a language model
behind any OpenAI-compatible route or rules, gives each a score from 1 to 5. Beside them stand a cascade of the same
models, the chain of modality with its parts left out, the tasks that the model recognises without a grammar, and what
each stage kept of its text. Writes `reports/instruction_following.json`, `.html` and, with every answer, `.parquet`.
With `--bundle B` it examines any bundle, on the held-out questions of its own recipe, spoken anew, or with
`--manifest M` on the recordings named there, which need an `answer`.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer

from jobs.instruction_interviews import Subjects, examine, standard_bundle
from jobs.interviews import Parts
from jobs.publish import bundle_path
from jobs.shell import Context, Job, JobError, JsonOption, RecipeOption, SetOption, WorkspaceOption, execute, verb
from jobs.subjects import BundleOption, Served, Subject, recipe_of, refuse_lone_manifest, stage_subjects
from jobs.utterances import manifest_utterances, workspace_utterances
from speechgpt.evaluation.config import InstructionFollowingSection
from speechgpt.recipe import Recipe, load, resolved
from speechgpt.runtime.files import absolute
from speechgpt.runtime.workspace import Workspace

if TYPE_CHECKING:
    from speechgpt.evaluation.listening import Utterance

_JSON, _HTML, _ROWS = (f"reports/instruction_following.{kind}" for kind in ("json", "html", "parquet"))
_PARTS = "reports/instruction_following.parts"
"""Answers, what was heard of them, and verdicts, as far as a killed attempt had come."""
Thing = TypeVar("Thing")


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
    figures["files"] = {"rows": _ROWS}
    workspace.write_table(_ROWS, pa.Table.from_pylist(following.table(rows)))
    workspace.write_json(_JSON, figures)
    workspace.write_bytes(_HTML, render(figures, samples, recipe.name).encode())
    workspace.delete(_PARTS)
    for name in (_JSON, _HTML, _ROWS):
        with workspace.fetch(name) as file:
            context.run.log_artifacts(file)
    context.progress.say(f"report: {workspace.path(_HTML)}")
    return {"figures": following.headlines(figures), "outputs": [_JSON, _HTML, _ROWS]}


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
