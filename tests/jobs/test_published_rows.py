"""Published files through the job `instructions`: what is kept, what is refused, and in how much memory."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import build_instructions, published_rows
from jobs.build_instructions import REFUSED, REPORT, ROWS, tally_of, write_published
from jobs.shell import JobError, execute
from speechgpt.language.prompts import META, read_row
from speechgpt.recipe import Recipe, RecipeError, load
from speechgpt.runtime.workspace import Workspace

U = "<sosp><1><2><eosp>"
GOOD = {
    "transcribe": f"[Human]: Write it. This is input: {U}<eoh> [SpeechGPT]: hello there<eoa> ",
    "speak": f"[Human]: Say it. This is input: hello there<eoh> [SpeechGPT]: {U}<eoa> ",
    "s2s": f"[Human]: {U}<eoh>. [SpeechGPT]: Play?; [ta] Let's.\nYou\n\nbegin.; [ua] {U}<eoa>.",
    "text": "[Human]: Who?<eoh> [SpeechGPT]: Me.<eoa>",
    "units": "<sosp><3><4><eosp>",
}
BAD = {
    "text: harmful": "[Human]: What the fuck?<eoh> [SpeechGPT]: Oh.<eoa>",
    "text: personal": "[Human]: Who?<eoh> [SpeechGPT]: Ask jane@example.org.<eoa>",
    "speak: style": f"[Human]: Whisper it. This is input: hello<eoh> [SpeechGPT]: {U}<eoa> ",
    "s2s: long_answer": f"[Human]: {U}<eoh>. [SpeechGPT]: Q; [ta] {'word ' * 35}; [ua] {U}<eoa>.",
    "units: unit_range": "<sosp><32><eosp>",
    "units: repeated_units": "<sosp><3><3><eosp>",
    "units: over_block": f"<sosp>{'<3><4>' * 200}<eosp>",
    "published: broken_markers": "[Human]: Who?<eoh> [SpeechGPT]: Me.",
    "published: unreadable": None,
}


def recipe_of(*files: Path | str, own: bool = False, **more: object) -> Recipe:
    settings = [f"instructions.{key}={json.dumps(value)}" for key, value in more.items()]
    named = f"instructions.published={json.dumps(list(map(str, files)))}"
    bad = "data.max_bad_fraction=0.5"
    return load("tiny", (named, f"instructions.own={json.dumps(own)}", bad, "language.prefix=speechgpt", *settings))


def line(plain_text: str | None, prefix: str = META) -> str:
    return "{broken" if plain_text is None else json.dumps({"prefix": prefix, "plain_text": plain_text})


def corpus(folder: Path) -> list[Path]:
    """Every kind of good and bad row, in the three kinds of file."""
    rows, units, packed = folder / "rows.jsonl", folder / "units.txt", folder / "more.json.gz"
    rows.write_text("\n".join(line(text) for text in [*GOOD.values(), *BAD.values()]) + "\n\n")
    units.write_text(f"{GOOD['units']}\n{GOOD['units']}\n")
    packed.write_bytes(gzip.compress((line(GOOD["text"], "") + "\n").encode() * 3))
    return [rows, units, packed]


def build(workspace: Workspace, recipe: Recipe, size: int = published_rows.RANGE_BYTES) -> list[str]:
    """What the job does in its tasks, without Ray."""
    parts = list(published_rows.plan(recipe.instructions.published, size))
    for group in published_rows.tasks(parts):
        write_published(workspace, group, published_rows.maker(recipe))
    return [each.part for each in parts]


def test_rows_stay_byte_for_byte_and_refusals_say_where_and_why(tmp_path):
    workspace = Workspace(tmp_path / "run")
    (rows, *_) = corpus(tmp_path)
    (part,) = build(workspace, recipe_of(rows))
    table = workspace.read_table(ROWS).to_pylist()
    assert {row["kind"]: row["plain_text"] for row in table} == GOOD
    assert {row["prefix"] for row in table} == {META}
    assert [row["id"] for row in table] == [
        "transcribe-rows-1",
        "speak-rows-2",
        "s2s-rows-3",
        "text-rows-4",
        "units-rows-5",
    ]
    assert {(row["category"], row["split"]) for row in table} == {("rows", "train")}
    counts = tally_of(workspace, f"{ROWS}/{part}")
    assert counts["refused"] == dict.fromkeys(BAD, 1)
    assert counts["examples"] == {why: [f"rows-{number}"] for number, why in enumerate(BAD, len(GOOD) + 1)}
    refused = workspace.read_table(REFUSED).to_pylist()
    assert {f"{row['kind']}: {row['reason']}" for row in refused} == set(BAD)
    where = {row["reason"]: row["detail"] for row in refused}
    assert where["harmful"] == f"{rows}, line 6"
    assert where["unreadable"].startswith(f"{rows}, line 14: not a JSON object")
    assert where["broken_markers"] == f"{rows}, line 13: turn 1 does not end with <eoa> or <eos>"
    told = json.dumps(refused) + json.dumps(counts)
    assert "jane" not in told and "fuck" not in told, "what a refused row says stays out of every report"


def test_switched_off_filters_keep_what_can_be_read(tmp_path):
    workspace = Workspace(tmp_path / "run")
    (rows, *_) = corpus(tmp_path)
    names = ("harmful", "personal", "style", "long_answers", "over_block", "unit_range", "repeated_units")
    build(workspace, recipe_of(rows, filters=dict.fromkeys(names, False)))
    assert workspace.read_table(ROWS).num_rows == len(GOOD) + len(BAD) - 2
    assert {row["reason"] for row in workspace.read_table(REFUSED).to_pylist()} == {"unreadable", "broken_markers"}


def test_rows_are_rewritten_when_the_recipe_asks(tmp_path):
    workspace = Workspace(tmp_path / "run")
    (rows, *_) = corpus(tmp_path)
    recipe = recipe_of(rows, rewrite_published=True)
    build(workspace, recipe)
    for row in workspace.read_table(ROWS).to_pylist():
        if row["kind"] == "units":
            assert (row["prefix"], row["plain_text"]) == ("", GOOD["units"])
            continue
        assert row["prefix"] == META
        written, published = read_row("paper", row["plain_text"]), read_row("released", GOOD[row["kind"]])
        assert written == published and row["plain_text"] != GOOD[row["kind"]]


def test_parts_are_named_by_what_they_hold(tmp_path):
    files = corpus(tmp_path)
    first, second = Workspace(tmp_path / "a"), Workspace(tmp_path / "b")
    parts = build(first, recipe_of(*files), size=200)
    assert len(parts) > 8 and len(set(parts)) == len(parts)
    assert build(second, recipe_of(*files), size=200) == parts
    assert first.digest(ROWS) == second.digest(ROWS)
    whole = Workspace(tmp_path / "c")
    build(whole, recipe_of(*files))
    rows = [sorted(place.read_table(ROWS).to_pylist(), key=lambda row: row["id"]) for place in (first, whole)]
    assert rows[0] == rows[1], "however the files are cut"
    files[1].write_text("<sosp><5><eosp>\n")
    assert set(parts) - set(build(second, recipe_of(*files), size=200)) == {
        part for part in parts if part.startswith("published-units-")
    }


def test_a_relative_path_is_found_from_another_directory(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(line(GOOD["text"]))
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of("rows.jsonl")
    [group] = published_rows.tasks(published_rows.plan(recipe.instructions.published))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_published(Workspace(tmp_path / "work"), group, published_rows.maker(recipe))
    counted = tally_of(Workspace(tmp_path / "work"), f"{ROWS}/{group[0].part}")
    assert counted["published"] == {"file": "rows.jsonl", "name": "rows", "lines": 1, "kept": 1}


def test_files_of_one_name_are_told_apart():
    assert published_rows.names(["a/train.txt", "b/train.jsonl", "c/train.txt.gz"]) == ["train", "train.2", "train.3"]
    assert published_rows.names(["train.2.txt", "train.txt", "train.txt"]) == ["train.2", "train", "train.3"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl.zip", "rows"])
def test_other_files_are_refused_with_the_recipe(name):
    with pytest.raises(RecipeError, match=rf"instructions.published: {name}: a name ending in .jsonl, .json or .txt"):
        recipe_of(name)


def test_a_recipe_without_any_rows_is_refused():
    with pytest.raises(RecipeError, match="own: false leaves no rows"):
        recipe_of()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(JobError, match=r"instructions\.published: .*none\.jsonl"):
        list(published_rows.plan([str(tmp_path / "none.jsonl")]))


def test_a_pipeline_looks_at_the_first_row_before_it_begins(tmp_path):
    (rows, *_) = corpus(tmp_path)
    published_rows.check(str(rows))
    empty, array = tmp_path / "empty.jsonl", tmp_path / "array.json"
    empty.write_text("\n\n")
    array.write_text("\n[{}]\n")
    for file, complaint in (
        (empty, "is empty"),
        (array, r"array\.json, line 2: .*jq"),
        (tmp_path / "no.txt", r"no\.txt"),
    ):
        with pytest.raises(JobError, match=rf"instructions\.published: .*{complaint}"):
            published_rows.check(str(file))


def test_a_stage_that_changes_its_block_or_mixture_changes_published_rows_alone():
    plain, published = load("tiny"), recipe_of("a.txt")
    assert published_rows.sections(plain) == ()
    assert {"codebook.clusters", "stages.chain.block", "stages.base.mixture"} <= set(published_rows.sections(published))


@pytest.mark.ray
def test_the_job_reports_and_goes_on_where_it_was(ray_cluster, run_directory, tmp_path):
    files, workspace = corpus(tmp_path), Workspace(run_directory)
    recipe = recipe_of(*files)
    done = execute(build_instructions.JOB, recipe, workspace, json=True)
    report = workspace.read_json(REPORT)
    assert report["rows"] == {"s2s": 1, "speak": 1, "text": 4, "transcribe": 1, "units": 3}
    assert report["refused"] == dict.fromkeys(sorted(BAD), 1)
    assert report["examples"]["text: harmful"] == ["rows-6"]
    assert report["published"] == {
        "rows": {"file": str(files[0]), "lines": 14, "kept": 5, "refused": 9},
        "units": {"file": str(files[1]), "lines": 2, "kept": 2, "refused": 0},
        "more": {"file": str(files[2]), "lines": 3, "kept": 3, "refused": 0},
    }
    assert done["figures"] == {"rows": report["rows"], "refused": report["refused"]}
    assert set(done["outputs"]) == {ROWS, REFUSED, build_instructions.QUESTIONS, REPORT}

    before, kept = workspace.digest(ROWS), [name for name in workspace.list(ROWS) if "units" in name]
    assert execute(build_instructions.JOB, recipe, workspace, json=True)["skipped"]
    # As if it had been killed after one file.
    times = {name: Path(workspace.path(name)).stat().st_mtime_ns for name in kept}
    workspace.delete("instructions/_done/instructions.json")
    workspace.write_json(
        "instructions/_done/instructions.started.json", {"fingerprint": done["fingerprint"], "run_id": done["run_id"]}
    )
    for name in set(workspace.list(ROWS)) - set(kept):
        workspace.delete(name)
    again = execute(build_instructions.JOB, recipe, workspace, json=True)
    assert workspace.digest(ROWS) == before and again["figures"] == done["figures"]
    assert {name: Path(workspace.path(name)).stat().st_mtime_ns for name in kept} == times

    with pytest.raises(JobError, match=r"1 of 20 lines are no rows.*rows\.jsonl, line 14: not a JSON object"):
        strict = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_bad_fraction": 0.01})})
        workspace.delete("instructions/_done/instructions.json")
        execute(build_instructions.JOB, strict, workspace, json=True)


ROWS_OF_A_LARGE_FILE = 200_000


def write_large_file(file: Path) -> None:
    """200,000 rows of the published kinds and lengths, 210 MB."""
    draw = random.Random(1)

    def units(count: int) -> str:
        return "<sosp>" + "".join(f"<{unit}>" for unit in draw.sample(range(1000), count)) + "<eosp>"

    speech = [units(120) for _ in range(100)]
    rows = []
    for _ in range(200):
        u, v = draw.choice(speech), draw.choice(speech)
        rows += [
            line(f"[Human]: Write it. This is input: {u}<eoh> [SpeechGPT]: the alchemist rode in front<eoa> "),
            line(f"[Human]: Say it. This is input: the alchemist rode<eoh> [SpeechGPT]: {v}<eoa> "),
            line(f"[Human]: {u}<eoh>. [SpeechGPT]: Who?; [ta] An answer\nof lines.; [ua] {v}<eoa>."),
            line("[Human]: Tell me more<eoh> [SpeechGPT]: There is no more.<eoa>"),
        ]
    block = "\n".join(rows) + "\n"
    with file.open("w") as out:
        for _ in range(ROWS_OF_A_LARGE_FILE // len(rows)):
            out.write(block)


MEASURE = """
import pathlib, sys
from jobs import build_instructions, published_rows
from speechgpt.interop.instruction_rows import PublishedRows
from speechgpt.recipe import load
from speechgpt.runtime.workspace import Workspace

def peak():
    # KiB. A child's peak by getrusage begins with its parent's, and this one's parent is all the tests.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

recipe = load("tiny", (f"instructions.published=[{sys.argv[1]}]", "codebook.clusters=1000"))
made = published_rows.maker(recipe)
workspace = Workspace(sys.argv[2])
for group in published_rows.tasks(published_rows.plan([sys.argv[1]])):
    build_instructions.write_published(workspace, group, made)
    print(peak())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    large = tmp_path / "large.jsonl"
    write_large_file(large)
    # Allocators that keep what was freed would be measured, too.
    plain = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
    command = [sys.executable, "-c", MEASURE, str(large), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | plain)
    peaks = [int(kilobytes) / 1024 for kilobytes in done.stdout.split()]
    rows = sum(pq.read_metadata(file).num_rows for file in (tmp_path / "run" / ROWS).glob("*.parquet"))
    assert rows == ROWS_OF_A_LARGE_FILE
    size, parts = large.stat().st_size / 2**20, len(peaks)
    # The first parts reach what one part takes, the buffers of its columns included.
    begun = peaks[parts // 4]
    print(f"{size:.0f} MiB of rows; {begun:.0f} MiB resident after a quarter, {peaks[-1]:.0f} MiB after all")
    assert parts > 10
    assert peaks[-1] < begun + 30, f"{size * 3 / 4:.0f} MiB of rows later"
    assert peaks[-1] < 500
