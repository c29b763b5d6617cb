"""Job `evaluate`: what a bundle can do, measured on speech and questions that no training saw, and written as a report.

In a workspace it examines the recipe's bundle and the model that each training stage left, and writes
`reports/evaluation.json` and `reports/evaluation.html`. With `--bundle B` it examines any bundle on
what the bundle's own recipe keeps from training, with `--manifest M` on the recordings named there (their `answer`
column, if there is one, says what a spoken question should get back); `--report P.html` keeps what is found.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.interviews import actor, in_chunks
from jobs.publish import bundle_path
from jobs.shell import Context, Job, JobError, JsonOption, RecipeOption, SetOption, WorkspaceOption, perform, verb
from jobs.subjects import BundleOption, Served, Subject, recipe_of, refuse_lone_manifest, stage_subjects
from jobs.utterances import manifest_utterances, spoken_held_out, workspace_utterances
from speechgpt.evaluation.config import EvaluationSection
from speechgpt.language.config import GenerationSection, ReplyForm
from speechgpt.recipe import Recipe
from speechgpt.runtime.config import ResourcesSection
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.tracking import Tracking
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech.config import DataSection, VoiceSection

if TYPE_CHECKING:
    from speechgpt.evaluation.examination import Clip
    from speechgpt.evaluation.listening import Utterance
    from speechgpt.evaluation.metrics import Bootstrap
    from speechgpt.evaluation.report import Sample
    from speechgpt.evaluation.scoring import Examined

_JSON, _HTML = "reports/evaluation.json", "reports/evaluation.html"
_SAMPLES = 8
"""Dialogues that the report plays."""
_RECORDED = "real recordings"
_NOISE = 20.0
"""dB below a recording, of the noise that its units should stand."""
_TIMED, _TIMED_CORES = 31, 2
"""Questions asked one at a time, the first of them uncounted, and the cores that their answers are made on."""


@dataclass(frozen=True)
class Terms:
    """Under which an evaluation runs."""

    evaluation: EvaluationSection = EvaluationSection()
    generation: GenerationSection = GenerationSection()
    resources: ResourcesSection = ResourcesSection()
    data: DataSection = DataSection()
    seed: int = 1
    answer_voice: str = ""
    voice: VoiceSection | None = None
    """Of the answer voice, if it is a synthetic one."""

    @classmethod
    def of(cls, recipe: Recipe) -> "Terms":
        name = recipe.voices.answer
        spoken = (name, recipe.voices.questions.get(name))
        return cls(recipe.evaluation, recipe.generation, recipe.resources, recipe.data, recipe.seed, *spoken)


def run(context: Context) -> dict[str, Any]:
    from speechgpt.evaluation.report import render

    recipe, workspace = context.recipe, context.workspace
    utterances = workspace_utterances(workspace)
    if not utterances:
        raise JobError(
            f"{workspace.uri}: no held-out clip to evaluate on; evaluation.questions and world.held_out say how many"
        )
    subjects = stage_subjects(recipe, workspace) if recipe.evaluation.stages else []
    served = Served(workspace.path(bundle_path(recipe)))
    figures, samples = examine(served, utterances, subjects, Terms.of(recipe), context.progress)
    workspace.write_json(_JSON, figures)
    page = render(figures, samples, title=recipe.name, curves=loss_curves(recipe, workspace))
    workspace.write_bytes(_HTML, page.encode())
    for name in (_JSON, _HTML):
        with workspace.fetch(name) as file:
            context.run.log_artifacts(file)
    context.progress.say(f"report: {workspace.path(_HTML)}")
    return {"figures": {k: v for k, v in figures.items() if k != "detail"}, "outputs": [_JSON, _HTML]}


def examine(
    served: Served, utterances: Sequence["Utterance"], subjects: Sequence[Subject], terms: Terms, progress: Progress
) -> tuple[dict[str, Any], list["Sample"]]:
    """Examine a bundle on all utterances, and each subject on some of them.

    The recogniser listens in one Ray actor while the language models answer in another. Returns the figures (the
    contract's keys and `detail`) and dialogues to listen to. Raises JobError if no utterance can be decoded.
    """
    import ray

    from jobs.examiners import BundleListener
    from speechgpt.evaluation import scoring
    from speechgpt.evaluation.listening import Listened
    from speechgpt.evaluation.metrics import Bootstrap
    from speechgpt.evaluation.report import Sample
    from speechgpt.language.script import spread
    from speechgpt.runtime import cluster

    cluster.connect(terms.resources)
    with actor(BundleListener, served.address, served.store, terms.evaluation.recogniser) as listener:
        clips, unusable = ray.get(listener.encode.remote(list(utterances), terms.data.max_seconds))
        if not clips:
            raise JobError(f"none of the {len(utterances)} utterances can be decoded; the first: {unusable[0]}")
        judged = spread(scoring.headline(clips), terms.evaluation.judged_clips, terms.seed)
        apart = _by_voice(clips, terms)
        listened = {clip.id: clip for clip in (*judged, *(clip for part in apart.values() for clip in part))}
        told = [clip for clip in listened.values() if clip.text is not None]
        sounds = {utterance.id: utterance.sound for utterance in utterances}
        originals = listener.originals.remote({clip.id: sounds[clip.id] for clip in told})
        resynthesised = listener.spoken.remote({clip.id: clip.units for clip in told})
        examined = _examine_bundle(served, clips, terms, progress)
        spoken = {clip.id: examined.replies[clip.id].units for clip in judged if clip.id in examined.replies}
        answers = listener.spoken.remote({name: units for name, units in spoken.items() if units}, bool(apart))
        texts = {name: examined.replies[name].text for name, units in spoken.items() if units}
        said = listener.said.remote({n: t for n, t in texts.items() if t}, terms.voice, terms.seed) if apart else None
        table = _examine_stages(subjects, clips, terms, progress)
        progress.say("listening to the answers")
        original, again, aloud = ray.get([originals, resynthesised, answers])
        voice = ray.get(said) if said else Listened({}, {})
        heard = scoring.Heard(original.words, again.words, aloud.words, voice.words)
        bootstrap = Bootstrap(terms.evaluation.bootstrap, terms.seed)
        figures = scoring.figures(clips, examined, heard, bootstrap, judged)
        if apart:
            quality = {"model": aloud.quality, "voice": voice.quality}
            figures["detail"] |= {
                "resynthesis": {name: scoring.resynthesis(part, heard, bootstrap) for name, part in apart.items()},
                "answers_aloud": scoring.beside_the_voice(examined, heard, quality, bootstrap),
            }
        figures["detail"] |= {
            "stages": table,
            "recogniser": ray.get(listener.recogniser.remote()),
            "unusable": unusable,
        }
        recorded = {clip.id: sounds[clip.id] for clip in apart.get(_RECORDED, [])}
        if recorded:
            edits = ray.get(listener.stability.remote(recorded, _NOISE, terms.seed))
            figures["detail"]["unit_edits_in_noise"] = scoring.mean(edits, bootstrap)
    if apart:
        figures["detail"]["alone"] = _converse(served, [sounds[clip.id] for clip in judged[:_TIMED]], terms, bootstrap)
    samples = [
        Sample(
            clip=clip,
            reply=examined.replies[clip.id],
            heard=aloud.words.get(clip.id),
            question=sounds[clip.id],
            resynthesis=again.sounds.get(clip.id),
            answer=aloud.sounds.get(clip.id),
        )
        for clip in judged
        if clip.id in examined.replies
    ]
    return figures, samples[:_SAMPLES]


def _by_voice(clips: Sequence["Clip"], terms: Terms) -> dict[str, list["Clip"]]:
    """The clips whose resynthesis is judged apart: of the answer voice, of voices that no training heard, and real
    recordings."""
    from speechgpt.language.script import spread

    count = terms.evaluation.by_voice
    if not count or terms.voice is None or terms.evaluation.recogniser == "none":
        return {}
    parts = {
        "answer voice": [c for c in clips if c.group == "seen" and c.speaker == terms.answer_voice],
        "voices never heard": [c for c in clips if c.group == "stranger"],
        _RECORDED: [c for c in clips if c.group == "recording"],
    }
    return {name: spread(members, count, terms.seed) for name, members in parts.items() if members}


def _converse(
    served: Served, questions: Sequence[bytes], terms: Terms, bootstrap: "Bootstrap"
) -> dict[str, Any] | None:
    """How long single questions wait for their answer, while nothing else runs; the first warms up and is not counted.

    None where the cluster has not the cores for it.
    """
    import ray

    from jobs.examiners import BundleConversation
    from speechgpt.evaluation import scoring

    cores = min(_TIMED_CORES, int(ray.cluster_resources().get("CPU", 0)))
    if not cores:
        return None
    alone = (served.address, served.store, terms.generation, cores)
    with actor(BundleConversation, *alone, cpus=cores) as conversation:
        timings = [ray.get(conversation.ask.remote(sound)) for sound in questions][1:]
    return {**scoring.waiting([each for each in timings if each is not None], bootstrap), "cores": cores}


def _examine_bundle(served: Served, clips: Sequence["Clip"], terms: Terms, progress: Progress) -> "Examined":
    """Put every clip to the served model: as a recognition task, and as a question to be answered aloud.

    Recordings that are no questions are not asked for an answer, unless nothing else is there.
    """
    from jobs.examiners import BundleExaminer
    from speechgpt.evaluation.scoring import Examined

    told = [clip for clip in clips if clip.text is not None]
    questions = _questions(clips)
    with (
        actor(BundleExaminer, served.address, served.store, terms.generation) as examiner,
        progress.count("asking the bundle", len(told) + len(questions) + len(clips), "replies") as counter,
    ):
        return Examined(
            transcripts=in_chunks(examiner.transcribe.remote, told, counter),
            replies=in_chunks(_answering(examiner, "chain"), questions, counter),
            losses=in_chunks(examiner.unit_losses.remote, clips, counter),
        )


def _examine_stages(
    subjects: Sequence[Subject], clips: Sequence["Clip"], terms: Terms, progress: Progress
) -> dict[str, Any]:
    """{stage: its row of the table}: the same few questions put to the model that each stage left."""
    from jobs.examiners import StageExaminer
    from speechgpt.evaluation import scoring
    from speechgpt.evaluation.metrics import Bootstrap
    from speechgpt.language.script import spread

    questions = _questions(clips)
    main = spread(scoring.headline(questions), terms.evaluation.stage_clips, terms.seed)
    others = [clip for clip in questions if clip.group == "stranger" and clip not in main]
    compared = main + spread(others, terms.evaluation.stage_clips, terms.seed)
    table = {}
    with progress.count("asking the model of each stage", 4 * len(compared) * len(subjects), "replies") as counter:
        for subject in subjects:
            asked = (subject.workspace, subject.model, subject.adapter, terms.generation)
            with actor(StageExaminer, *asked) as examiner:
                examined = scoring.Examined(
                    transcripts=in_chunks(examiner.transcribe.remote, compared, counter),
                    replies=in_chunks(_answering(examiner, "text"), compared, counter),
                    typed=in_chunks(examiner.answer_typed.remote, compared, counter),
                    losses=in_chunks(examiner.unit_losses.remote, compared, counter),
                )
            bootstrap = Bootstrap(terms.evaluation.bootstrap, terms.seed)
            table[subject.stage] = scoring.stage_figures(compared, examined, bootstrap)
    return table


def _questions(clips: Sequence["Clip"]) -> list["Clip"]:
    return [clip for clip in clips if clip.answer is not None] or list(clips)


def _answering(examiner: Any, form: ReplyForm) -> Callable[[Sequence["Clip"]], Any]:
    return lambda chunk: examiner.answer.remote(chunk, form)


def loss_curves(recipe: Recipe, workspace: Workspace) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of each training stage, as its MLflow run has them."""
    tracking = Tracking.open(recipe.tracking, workspace, recipe.name)
    curves: dict[str, list[tuple[int, float]]] = {}
    for stage in recipe.stages:
        marker = f"models/_done/train-{stage}.json"
        if workspace.exists(marker):
            curves[stage] = tracking.curve(workspace.read_json(marker)["run_id"], "loss")
    return curves


def evaluate_bundle(
    address: str, manifest: str, workspace: str, progress: Progress
) -> "tuple[dict[str, Any], list[Sample]]":
    """The figures of any bundle under the terms of the recipe that made it, if it has one; and dialogues to listen to.

    They are of a manifest, or else of the questions that this recipe keeps from training, which all its voices speak
    anew, into a directory of `workspace`. Raises JobError for a bundle without a recipe and no manifest.
    """
    served = Served.at(address)
    opened = served.opened()
    tree = recipe_of(opened, address, manifest)
    made_by = Recipe.model_validate(tree) if tree else None
    terms = Terms.of(made_by) if made_by else Terms()
    if manifest:
        utterances = manifest_utterances(manifest, terms.data.max_bad_fraction)
    else:
        assert made_by is not None
        # What the voices said under another recipe must not be taken for this one's.
        which = hashlib.sha256(made_by.yaml().encode()).hexdigest()[:8]
        place = Workspace(f"{workspace or 'runs'}/{made_by.name}-heldout-{which}")
        utterances = spoken_held_out(made_by, place, progress)
    if not utterances:
        raise JobError(f"{manifest or 'the recipe'} has nothing to evaluate on")
    figures, samples = examine(served, utterances, [], terms, progress)
    return {**figures, "bundle": opened.digest}, samples


def evaluate(
    bundle: BundleOption = "",
    manifest: Annotated[
        str, typer.Option(help="Recordings to evaluate a bundle on; else its recipe's held-out questions, spoken anew.")
    ] = "",
    recipe: RecipeOption = "nano",
    workspace: WorkspaceOption = "",
    set: SetOption = None,
    json: JsonOption = False,
    report: Annotated[
        Path | None, typer.Option(help="A bundle's page (HTML); its figures are written beside it, as JSON.")
    ] = None,
) -> None:
    refuse_lone_manifest(bundle, manifest)
    if report and not bundle:
        raise typer.BadParameter("--report needs --bundle; a workspace has its own in reports/")
    if report and report.suffix != ".html":
        raise typer.BadParameter(f"--report {report}: its name should end in .html")
    if not bundle:
        perform(JOB, None, recipe, workspace, set, json)
        return
    with verb(json) as answer:
        if report:
            # Before the work, not after it.
            report.parent.mkdir(parents=True, exist_ok=True)
        figures, samples = evaluate_bundle(bundle, manifest, workspace, Progress(silent=json))
        if report:
            _write(report, figures, samples, bundle)
        if not json:
            _show(figures["detail"])
        answer(figures if json else {"figures": {k: v for k, v in figures.items() if k != "detail"}})


def _write(page: Path, figures: dict[str, Any], samples: "list[Sample]", title: str) -> None:
    from speechgpt.evaluation.report import render

    page.write_text(render(figures, samples, title=title, curves={}))
    page.with_suffix(".json").write_text(dumps(figures, indent=2) + "\n")


def _show(detail: dict[str, Any]) -> None:
    from rich.console import Console

    from speechgpt.evaluation.summary import tables

    for table in tables(detail):
        Console().print(table)


def _reads(recipe: Recipe, _argument: str | None) -> tuple[str, ...]:
    trained = [f"train-{stage}" for stage in recipe.stages] if recipe.evaluation.stages else []
    return ("manifest", "synthesize", "publish", *trained)


JOB = Job(name="evaluate", part="reports", run=run, reads=_reads, sections=("evaluation", "generation", "data"))
main = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
main.command("evaluate", help=__doc__)(evaluate)

if __name__ == "__main__":
    main()
