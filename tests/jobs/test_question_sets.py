"""Question sets through the jobs: read, filtered, counted, spoken by voices or by a model, and rows of them."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from jobs import build_instructions, manifest, question_sets, train_text_to_unit
from jobs.build_instructions import REFUSED, REPORT, ROWS
from jobs.pipeline import steps
from jobs.shell import JobError, execute
from jobs.synthesize import Speaker
from speechgpt.language.prompts import Exchange, read_row
from speechgpt.language.scratch import train_tokenizer
from speechgpt.language.text_to_unit import TextToUnit, TokenizerText
from speechgpt.recipe import Recipe, RecipeError, load
from speechgpt.runtime.workspace import Workspace

ROWS_OF_A_SET = [
    {"question": "What do bees make?", "answer": "Bees make honey."},
    {"question": "what do bees make", "answer": "Wax."},
    {"question": "What is the sea?", "answer": "water " * 40},
    {"messages": [{"question": "Hi there!", "answer": "Hello."}, {"question": "Who are you?", "answer": "A bee."}]},
    {"question": "What is bullshit?", "answer": "A rude word."},
    {"question": "什么是蜂蜜？", "answer": "蜂蜜是甜的。"},
    {"question": "Say [ta] now", "answer": "No."},
]
REFUSED_OF_IT = {"duplicate": 1, "harmful": 1, "language": 1, "marker": 1}


def recipe_of(*files: Path, more: tuple[str, ...] = (), **questions: object) -> Recipe:
    section = {"files": [str(file) for file in files], **questions}
    return load(
        "tiny",
        (
            f"instructions.questions={json.dumps(section)}",
            "instructions.forms=[s2s, s2t, t2s, t2t, direct]",
            "language.dialect=paper",
            "data.shipped_recordings=false",
            *more,
        ),
    )


@pytest.fixture
def question_set(tmp_path: Path) -> Path:
    file = tmp_path / "bees.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS_OF_A_SET) + "\n\n")
    return file


def adds_up(counts: dict) -> bool:
    return counts["rows"] == counts["chains"] + counts["text_only"] + sum(counts["refused"].values())


def test_every_row_is_kept_or_refused_for_one_reason(question_set: Path):
    sets = question_sets.read(recipe_of(question_set))
    counts = sets.counts["bees"]
    expected = {"rows": 7, "chains": 2, "text_only": 1, "refused": REFUSED_OF_IT}
    assert counts == {"file": str(question_set), **expected} and adds_up(counts)
    assert [talk.id for talk in sets.kept] == ["bees-1", "bees-3", "bees-4"]
    assert {(each.source, each.reason) for each in sets.refused} == {
        ("bees-2", "duplicate"),
        ("bees-5", "harmful"),
        ("bees-6", "language"),
        ("bees-7", "marker"),
    }
    assert all(each.detail == f"{question_set}, row {each.source[-1]}" for each in sets.refused)


def test_the_same_set_in_each_kind_of_file_and_duplicates_across_them(question_set: Path, tmp_path: Path):
    packed, table = tmp_path / "packed.json.gz", tmp_path / "bees.parquet"
    packed.write_bytes(gzip.compress(question_set.read_bytes()))
    columns = dict.fromkeys(("question", "answer", "messages"))
    pq.write_table(pa.Table.from_pylist([{**columns, **row} for row in ROWS_OF_A_SET]), table)
    alone = [question_sets.read(recipe_of(file)) for file in (question_set, packed, table)]
    assert [[talk.turns for talk in sets.kept] for sets in alone] == [[talk.turns for talk in alone[0].kept]] * 3
    together = question_sets.read(recipe_of(question_set, packed, table))
    assert list(together.counts) == ["bees", "packed", "bees.2"] and all(map(adds_up, together.counts.values()))
    assert together.counts["bees.2"]["refused"]["duplicate"] == 4 and len(together.kept) == 3


def test_a_file_of_another_form_stops_the_job_and_names_the_first_row(tmp_path: Path):
    file = tmp_path / "other.jsonl"
    file.write_text('{"q": "secret"}\n{"question": "Hi?", "answer": "Ho."}\nno json\n')
    with pytest.raises(JobError, match=r"2 of 3 rows cannot be used.*other\.jsonl, row 1: neither the texts") as raised:
        question_sets.read(recipe_of(file))
    assert "secret" not in str(raised.value)
    with pytest.raises(JobError, match=r"other\.jsonl, row 1"):
        question_sets.check(str(file), recipe_of(file).instructions.questions)
    with pytest.raises(JobError, match=r"gone\.jsonl cannot be read"):
        question_sets.read(recipe_of(tmp_path / "gone.jsonl"))


def test_what_cannot_be_is_said_before_any_work():
    def load_with(*overrides: str) -> None:
        load("tiny", overrides)

    with pytest.raises(RecipeError, match=r"x\.csv: a name ending in"):
        load_with("instructions.questions.files=[x.csv]")
    with pytest.raises(RecipeError, match="set it to text-to-unit"):
        load_with("instructions.own=false", "instructions.questions.files=[x.jsonl]")
    with pytest.raises(RecipeError, match="the latter give text rows, too"):
        load_with("instructions.text_instructions=[x.jsonl]", "instructions.questions.files=[x.jsonl]")


def test_voices_are_to_speak_what_was_kept(question_set: Path):
    prompts = manifest.prompts_of(recipe_of(question_set)).to_pylist()
    asked = {row["question_id"]: row for row in prompts if row["question_id"].startswith("bees")}
    assert {name: (row["text"], row["answer"]) for name, row in asked.items()} == {
        "bees-1": ("What do bees make?", "Bees make honey."),
        "bees-4.1": ("Hi there!", "Hello."),
        "bees-4.2": ("Who are you?", "A bee."),
    }
    assert {row["category"] for row in asked.values()} == {"bees"}
    answers = {row["text"] for row in prompts if row["role"] == "answer"}
    assert {"Bees make honey.", "Hello.", "A bee."} <= answers
    assert not any(row["question_id"].startswith("bees") for row in manifest.prompts_of(recipe_of()).to_pylist())
    model_speaks = recipe_of(question_set, spoken_by="text-to-unit")
    assert not any(row["question_id"].startswith("bees") for row in manifest.prompts_of(model_speaks).to_pylist())


def test_the_model_is_made_only_where_it_speaks(question_set: Path):
    def titles(recipe: Recipe) -> list[str]:
        return [job.title(argument) for job, argument in steps(recipe)]

    assert "train-text-to-unit" not in titles(recipe_of(question_set))
    spoken = titles(recipe_of(question_set, spoken_by="text-to-unit"))
    assert spoken.index("tokenize") < spoken.index("train-text-to-unit") < spoken.index("instructions")


def exchanges(workspace: Workspace) -> dict[str, list[Exchange]]:
    rows = workspace.read_table(ROWS).to_pylist()
    return {row["id"]: read_row("paper", row["plain_text"]) for row in rows if row["kind"] != "units"}


@pytest.mark.parametrize(
    ("of_set", "expected"),
    [("de", {"1": "de", "2": "de-at"}), (None, {"1": "", "2": "de-at", "3": "fr"})],
)
def test_a_clip_is_in_the_language_of_its_row_or_of_its_set(tmp_path: Path, monkeypatch, of_set, expected):
    """Without Ray: the actor is handed its prompts."""
    rows = [
        {"question": "Wer macht den Honig?", "answer": "Das sind die Bienen."},
        {"question": "Wo ist der Honig?", "answer": "Er ist in dem Glas.", "language": "de_AT"},
        {"question": "Qui fait le miel?", "answer": "Ce sont les abeilles.", "language": "fr"},
    ]
    (tmp_path / "bees.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = recipe_of(tmp_path / "bees.jsonl", language=of_set)
    prompts = manifest.prompts_of(recipe).sort_by("id")
    workspace = Workspace(tmp_path / "run")
    monkeypatch.setattr("ray.get", lambda reference: reference)
    speaker = Speaker(workspace, prompts, recipe)
    for first in range(0, len(prompts), 250):
        speaker({"first": first, "file": f"speech/part-{first}.parquet"})
    spoken = workspace.read_table("speech").to_pylist()
    languages = {row["text"]: row["language"] for row in spoken}
    asked = {row["question"]: expected.get(str(n)) for n, row in enumerate(rows, 1)}
    answered = {row["answer"]: expected.get(str(n)) for n, row in enumerate(rows, 1)}
    assert {text: languages.pop(text, None) for text in (*asked, *answered)} == asked | answered
    assert set(languages.values()) == {"en"}, "the world's"


@pytest.mark.ray
def test_rows_of_clips_that_voices_spoke(ray_cluster, question_set: Path, tmp_path: Path):
    from jobs.tokenize_speech import UNITS_SCHEMA

    recipe, workspace = recipe_of(question_set), Workspace(str(tmp_path / "run"))
    clips, units = [], {}
    for number, prompt in enumerate(manifest.prompts_of(recipe).to_pylist()):
        units[prompt["id"]] = (number % 31, 31, number // 31)
        clip = {key: prompt[key] for key in UNITS_SCHEMA.names if key in prompt}
        clips.append({**clip, "utterance_id": prompt["id"], "units": units[prompt["id"]]})
    workspace.write_table("units/part-a.parquet", pa.Table.from_pylist(clips, UNITS_SCHEMA))
    workspace.write_json("units/_done/tokenize.json", {"digest": "made by hand"})
    execute(build_instructions.JOB, recipe, workspace, json=True)

    rows = exchanges(workspace)
    name, *others = sorted(name for name in rows if name.startswith("s2s-question-bees-4.2"))
    assert len(others) == recipe.voices.clips_per_question - 1
    first, last = rows[name]
    assert first == Exchange("t2t", "Hi there!", "Hello.")
    assert (last.question, last.answer) == ("Who are you?", "A bee.")
    assert last.question_units == units[name.removeprefix("s2s-")]
    assert rows["direct" + name.removeprefix("s2s")][-1].answer_units == last.answer_units != ()
    assert [exchange.kind for exchange in rows["text-bees-4"]] == ["text", "text"]
    assert rows["text-bees-3"][0].answer.startswith("water water")
    assert rows["t2s-bees-4.2"] == [first, Exchange("t2s", "Who are you?", "A bee.", (), last.answer_units)]
    report = workspace.read_json(REPORT)
    assert adds_up(report["questions"]["bees"]) and report["questions"]["bees"]["chains"] == 2
    assert {why: n for why, n in report["refused"].items() if why.startswith("question: ")} == {
        f"question: {reason}": count for reason, count in REFUSED_OF_IT.items()
    }
    assert len(workspace.read_table(REFUSED)) == sum(report["refused"].values())
    assert sum(report["rows"].values()) == len(workspace.read_table(ROWS))


def small_model() -> TextToUnit:
    tokenizer = train_tokenizer(["what do bees make honey"], 280)
    size = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 128}
    counts = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    torch.manual_seed(0)
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=320, **size, **counts, **ends, forced_eos_token_id=None, init_std=0.5)
    )
    return TextToUnit(bart.eval(), TokenizerText(tokenizer), tuple(range(280, 312)), "spoken")


@pytest.mark.ray
def test_rows_that_a_model_spoke_need_no_clip(ray_cluster, question_set: Path, tmp_path: Path):
    model = small_model()
    model.save(tmp_path / "model")
    alone = ("instructions.own=false", f"text_to_unit.init={tmp_path / 'model'}")
    recipe = recipe_of(question_set, spoken_by="text-to-unit", more=alone)
    workspace = Workspace(str(tmp_path / "run"))
    figures = execute(train_text_to_unit.JOB, recipe, workspace, json=True)["figures"]
    assert figures["units"] == 32
    execute(build_instructions.JOB, recipe, workspace, json=True)

    texts = ["What do bees make?", "Bees make honey.", "Hi there!", "Hello.", "Who are you?", "A bee."]
    written = dict(zip(texts, model.write(texts), strict=True))
    rows = exchanges(workspace)
    expected = {"text-bees-1", "text-bees-3", "text-bees-4"}
    for turn, question, answer in [("1", *texts[:2]), ("4.1", *texts[2:4]), ("4.2", *texts[4:])]:
        expected |= {f"t2t-bees-{turn}"}
        said = {"s2s": written[question] and written[answer], "s2t": written[question], "t2s": written[answer]}
        expected |= {f"{kind}-bees-{turn}" for kind in (*said, "direct") if said.get(kind, said["s2s"])}
    assert set(rows) == expected
    report = workspace.read_json(REPORT)
    assert adds_up(report["questions"]["bees"])
    unspoken = sum(n for why, n in report["refused"].items() if why.endswith("unspoken"))
    assert len(rows) + unspoken == 3 + 3 * 5
    for name, found in rows.items():
        if name.startswith(("s2s", "direct")):
            assert found[-1].answer_units == written[found[-1].answer]
