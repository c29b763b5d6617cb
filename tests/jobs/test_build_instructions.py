"""The job `instructions` on a real Ray: what enters the rows, what stays out, and going on after a kill."""

import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import build_instructions
from jobs.build_instructions import QUESTIONS, REFUSED, REPORT, ROWS, spoken_answers
from jobs.shell import execute
from jobs.tokenize_speech import UNITS_SCHEMA
from speechgpt.language import world
from speechgpt.language.prompts import META, read_row
from speechgpt.recipe import Recipe, load
from speechgpt.runtime.workspace import Workspace


def clip(name: str, text: str, voice: str, units: list[int], **more) -> dict:
    role = more.pop("role", "question")
    plain = {"answer": "", "split": "train", "stranger": False, "category": "plus", "question_id": "", "source": "test"}
    return {"utterance_id": name, "text": text, "voice": voice, "units": units, "role": role, **plain, **more}


def recipe_of(*overrides: str) -> Recipe:
    return load("tiny", ("language.dialect=paper", "language.prefix=speechgpt", *overrides))


def fill(workspace: Workspace, recipe: Recipe) -> None:
    """Two shards of units, marked as if `tokenize` had made them."""
    questions = world.load(recipe.world, recipe.seed).questions()
    voice = recipe.voices.answer
    heldout = next(q for q in questions if q.split == "heldout")
    train = [q for q in questions if q.split == "train"]
    shards = {
        "units/part-a.parquet": [
            *(clip(f"q-{q.id}", q.question, "high", [1, 2, 3], answer=q.answer) for q in train),
            clip("held-out", heldout.question, "high", [21, 22], answer=heldout.answer, split="heldout"),
            clip("stranger", train[0].question, "low", [23, 24], answer=train[0].answer, stranger=True),
            clip("marker", "say [ta] now", "high", [4, 5], answer="i do not know"),
            clip("nameless", "", "high", [6, 7]),
            clip("unsaid", None, "high", [6, 8], split="heldout", stranger=True),
            clip("void", "say it", "high", []),
        ],
        "units/part-b.parquet": [
            clip(f"a-{n}", answer, voice, [8, 9, 10 + n % 5], role="answer")
            for n, answer in enumerate(sorted({q.answer for q in train})[1:])
        ],
    }
    for name, clips in shards.items():
        workspace.write_table(name, pa.Table.from_pylist(clips, UNITS_SCHEMA))
    workspace.write_json("units/_done/tokenize.json", {"digest": "made by hand"})


@pytest.mark.ray
def test_rows_are_built_and_nothing_unheard_gets_in(ray_cluster, tmp_path: Path):
    chats = tmp_path / "chats.jsonl"
    said = ("how do i boil an egg", "how do i build a bomb")
    chats.write_text("".join(json.dumps({"instruction": text, "response": "ask a cook"}) + "\n" for text in said))
    recipe, workspace = recipe_of(f"instructions.text_instructions=[{chats}]"), Workspace(str(tmp_path / "work"))
    fill(workspace, recipe)
    done = execute(build_instructions.JOB, recipe, workspace, json=True)
    rows = workspace.read_table(ROWS).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["split"] for row in rows} == {"train"}
    assert {row["prefix"] for row in rows if row["kind"] != "units"} == {META}
    assert {row["kind"] for row in rows} == {"units", "transcribe", "speak", "text", "s2s", "s2t", "t2s", "t2t"}
    written = "".join(row["plain_text"] for row in rows)
    assert not any(f"<{unit}>" in written for unit in (21, 22, 23, 24))
    for row in rows:
        if row["kind"] != "units":
            assert [exchange.kind for exchange in read_row("paper", row["plain_text"])] == [row["kind"]]
    heard = {e.answer_units for row in rows if row["kind"] == "speak" for e in read_row("paper", row["plain_text"])}
    assert heard and all(units[:2] == (8, 9) for units in heard)

    report = workspace.read_json(REPORT)
    assert sum(report["rows"].values()) == len(rows)
    assert report["refused"]["transcribe: marker"] == report["refused"]["s2t: marker"] == 1
    assert report["refused"]["s2s: no_answer_speech"] >= 1
    assert done["figures"] == {key: report[key] for key in ("clips", "rows", "refused")}
    assert report["examples"]["transcribe: marker"] == ["marker"]
    assert list(report["text_instructions"].values()) == [{"rows": 2, "kept": 1, "refused": {"harmful": 1}}]
    assert report["refused"]["text: harmful"] == 1
    refused = {(row["source"], row["kind"], row["reason"]) for row in workspace.read_table(REFUSED).to_pylist()}
    assert len(refused) == sum(report["refused"].values()) and ("marker", "s2t", "marker") in refused
    clips = workspace.read_table("units").num_rows
    assert report["clips"] == {"used": clips - 4, "held_out": 1, "no_units": 1, "stranger": 2}
    assert report["clips"]["used"] == report["rows"]["units"]
    tasks = report["rows"]["transcribe"] + report["rows"]["speak"]
    assert report["clips"]["used"] == tasks + sum(
        report["refused"][f"transcribe: {why}"] for why in ("marker", "no_text")
    )
    assert {("held-out", "clip", "held_out"), ("nameless", "transcribe", "no_text")} < refused
    split = {row["id"]: row["split"] for row in workspace.read_table(QUESTIONS).to_pylist()}
    assert set(split.values()) == {"train", "heldout"}
    texts = {row["id"].removeprefix("text-") for row in rows if row["kind"] == "text"}
    assert texts == {name for name, where in split.items() if where == "train"} | {"chats-1"}

    before = workspace.digest(ROWS)
    assert execute(build_instructions.JOB, recipe, workspace, json=True)["skipped"]
    # As if it had been killed after one shard.
    workspace.delete("instructions/_done/instructions.json")
    workspace.write_json(
        "instructions/_done/instructions.started.json", {"fingerprint": done["fingerprint"], "run_id": done["run_id"]}
    )
    workspace.delete(f"{ROWS}/part-b.parquet")
    execute(build_instructions.JOB, recipe, workspace, json=True)
    assert workspace.digest(ROWS) == before


def test_of_clips_that_do_not_answer_none_is_held_as_objects(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    clips = [clip(f"o{n}", "no", "high", [1] * 1000) for n in range(1000)]
    clips += [clip("b", " yes ", "mine", [2]), clip("a", "yes", "mine", [1]), clip("c", None, "mine", [3])]
    workspace.write_table("units/part-a.parquet", pa.Table.from_pylist(clips, UNITS_SCHEMA))
    assert spoken_answers(workspace, "mine") == {"yes": (1,)}
    tracemalloc.start()
    spoken_answers(workspace, "mine")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1e6, "a million units are 8 MB of pointers"
