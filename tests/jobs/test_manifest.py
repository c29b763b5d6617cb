"""Manifests in: what is accepted, what is set aside and with which words; and the script that the voices are given."""

import json
import struct
import wave
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import manifest
from jobs.manifest import JOB, inspected_by_workers, refuse_too_many, run
from jobs.shell import Context, JobError, _fingerprint, execute
from speechgpt.language.script import script, spread
from speechgpt.language.world import Question
from speechgpt.recipe import load
from speechgpt.runtime import recordings
from speechgpt.runtime.config import CorpusSection
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.recordings import UTTERANCE_SCHEMA, ManifestError, inspect, read_manifests
from speechgpt.runtime.tracking import Run
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech.config import VoiceSection, VoicesSection


def tone(path: Path, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(b"".join(struct.pack("<h", 8000 * (i // 20 % 2 * 2 - 1)) for i in range(int(16000 * seconds))))
    return path


def jsonl(path: Path, *rows: dict | str) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_rows_come_out_whole_with_what_the_file_says(tmp_path):
    tone(tmp_path / "sounds" / "a.wav")
    uri = jsonl(
        tmp_path / "m.jsonl", {"id": "a", "path": "sounds/a.wav", "text": " hello ", "speaker": "ann", "licence": "CC0"}
    )
    table = read_manifests([uri]).table
    assert table.schema.names == [*UTTERANCE_SCHEMA.names, "licence"]
    row = table.to_pylist()[0]
    assert row["path"] == str(tmp_path / "sounds" / "a.wav")
    assert (row["text"], row["seconds"], row["speaker"], row["licence"]) == ("hello", 0.5, "ann", "CC0")
    assert len(row["sha256"]) == 64


def test_parquet_and_absolute_paths_and_several_manifests(tmp_path):
    first, second = tone(tmp_path / "a.wav"), tone(tmp_path / "b.wav")
    pq.write_table(pa.table({"id": ["b"], "path": [str(second)], "split": ["dev"]}), tmp_path / "m.parquet")
    uri = jsonl(tmp_path / "m.jsonl", {"id": "a", "path": str(first), "split": "train"})
    table = read_manifests([str(tmp_path / "m.parquet"), uri]).table
    assert table["id"].to_pylist() == ["a", "b"]
    assert table["split"].to_pylist() == ["train", "heldout"], "every split that is not train is kept from training"


def test_speech_without_text_is_allowed(tmp_path):
    tone(tmp_path / "a.wav")
    found = read_manifests(
        [jsonl(tmp_path / "m.jsonl", {"id": "a", "path": "a.wav"}, {"id": "b", "path": "a.wav", "text": " "})]
    )
    assert [row["text"] for row in found.rows] == [None, None]
    assert not found.problems


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ('{"id": "x", "path": ', "unreadable_row", "not JSON"),
        ('["x"]', "unreadable_row", "not list"),
        ({"path": "a.wav"}, "missing_key", "id:"),
        ({"id": "x"}, "missing_key", "path:"),
        ({"id": "", "path": "a.wav"}, "missing_key", "id:"),
        ({"id": 7, "path": "a.wav"}, "wrong_type", "id: text is expected, not 7"),
        ({"id": "x", "path": "a.wav", "text": ["no"]}, "wrong_type", "text:"),
        ({"id": "x", "path": "a.wav", "text": "\ud83d"}, "wrong_type", "text: '\\ud83d' is not all Unicode"),
        ({"id": "x", "path": "a.wav", "category": ["a", "b"]}, "wrong_type", "category:"),
        ({"id": "x", "path": "a.wav", "stranger": "no"}, "wrong_type", "stranger: true or false"),
        ({"id": "x", "path": "a.wav", "seconds": "long"}, "wrong_type", "seconds:"),
        ({"id": "x", "path": "a.wav", "seconds": True}, "wrong_type", "seconds:"),
        ({"id": "x", "path": "a.wav", "seconds": -1}, "wrong_type", "seconds: a length in seconds is expected, not -1"),
        ({"id": "x", "path": "a.wav", "seconds": float("nan")}, "wrong_type", "seconds:"),
        ({"id": "x", "path": "a.wav", "seconds": float("inf")}, "wrong_type", "seconds:"),
        ({"id": "x", "path": "a.wav", "seconds": 10**400}, "wrong_type", "seconds:"),
        ({"id": "good", "path": "a.wav"}, "duplicate_id", "already taken by {manifest}:1"),
        ({"id": "x", "path": "gone.wav"}, "missing_file", "gone.wav"),
        ({"id": "x", "path": "."}, "missing_file", "path:"),
    ],
)
def test_a_bad_row_is_named_and_the_others_go_on(tmp_path, row, reason, said):
    tone(tmp_path / "a.wav")
    good = {"id": "good", "path": "a.wav"}
    uri = jsonl(tmp_path / "m.jsonl", good, "", row, {"id": "last", "path": "a.wav"})
    found = read_manifests([uri])
    assert [r["id"] for r in found.rows] == ["good", "last"]
    (problem,) = found.problems
    assert problem.source == f"{uri}:3", "the line's number in the file, blank lines counted"
    assert problem.reason == reason
    assert said.format(manifest=uri) in problem.detail
    assert found.quarantine().column_names == ["source", "reason", "detail"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.jsonl", None, "no such file"),
        ("m.csv", b"id,path", "ending in .jsonl or .parquet"),
        ("m.parquet", b"id,path", "not a Parquet file"),
    ],
)
def test_a_manifest_that_is_none_stops_the_job_with_its_name(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=said) as error:
        read_manifests([str(tmp_path / name)])
    assert str(tmp_path / name) in str(error.value)


def test_a_parquet_manifest_without_its_columns_says_which(tmp_path):
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=r"no column \['id'\]"):
        read_manifests([str(tmp_path / "m.parquet")])


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ((1, "two"), ["1", '"two"']),
        (({}, {}), ["{}", "{}"]),
        (([{"a": {}}], []), ['[{"a": {}}]', "[]"]),
        ((2**70, None), [str(2**70), None]),
        (("\ud83d", "b"), ['"\\ud83d"', '"b"']),
        (({"a": 1}, {"b": [2]}), [{"a": 1, "b": None}, {"a": None, "b": [2]}]),
    ],
)
def test_columns_that_parquet_has_no_type_for_are_kept_as_json(tmp_path, values, kept):
    tone(tmp_path / "a.wav")
    uri = jsonl(tmp_path / "m.jsonl", *({"id": str(n), "path": "a.wav", "take": v} for n, v in enumerate(values)))
    place = Workspace(tmp_path / "work")
    place.write_table("manifest/utterances.parquet", read_manifests([uri]).table)
    assert place.read_table("manifest/utterances.parquet")["take"].to_pylist() == kept


def test_a_file_whose_name_is_no_unicode_is_set_aside_by_its_name(tmp_path):
    tone(tmp_path / "sounds/a.wav")
    (tmp_path / "sounds/a.wav").rename(f"{tmp_path}/sounds/caf\udce9.wav")
    found = read_manifests([], [CorpusSection(layout="folder", uri=str(tmp_path / "sounds"))])
    (row,) = found.quarantine().to_pylist()
    assert (row["source"], row["reason"]) == (f"{tmp_path}/sounds/caf\\udce9.wav", "wrong_type")


def test_recordings_without_a_split_are_partly_held_out_and_always_the_same_ones(tmp_path):
    tone(tmp_path / "a.wav")
    uri = jsonl(tmp_path / "m.jsonl", *({"id": f"u{n}", "path": "a.wav"} for n in range(300)))
    splits = [row["split"] for row in read_manifests([uri]).rows]
    assert splits == [row["split"] for row in read_manifests([uri]).rows]
    assert 15 <= Counter(splits)["heldout"] <= 45


def test_a_split_is_training_by_whichever_of_its_names_and_what_is_unknown_is_told(tmp_path, capsys):
    names = {
        "train": ("train", "Train", "training", " TRAIN ", "train.100", "train-clean-100", "train_other"),
        "heldout": ("dev", "test", "validation", "val", "heldout", "Test.other", "eval"),
        "unknown": ("XL", "gold", "gold", "trainable"),
    }
    rows = []
    for kind, splits in names.items():
        rows += [{"id": f"{kind}-{n}", "split": split, "seconds": 36} for n, split in enumerate(splits)]
    for row in rows:
        tone(tmp_path / f"{row['id']}.wav", 0.1)
    place = Workspace(tmp_path / "work")
    uri = jsonl(tmp_path / "m.jsonl", *({**row, "path": f"{row['id']}.wav"} for row in rows))
    recipe = load("tiny", (f"data.extra_manifests=[{uri}]",))
    figures = run(Context(recipe, place, Progress(), Run("", "")))["figures"]
    splits = {row["id"]: row["split"] for row in place.read_table("manifest/utterances.parquet").to_pylist()}
    assert splits == {row["id"]: "train" if row["id"].startswith("train") else "heldout" for row in rows}
    assert figures["train"] == {"clips": 7, "hours": 0.07} and figures["heldout"] == {"clips": 11, "hours": 0.11}
    assert figures["unknown_splits"] == ["gold: 2", "XL: 1", "trainable: 1"]
    said = capsys.readouterr().err
    assert "4 recordings are held out" in said and "'gold', 'XL', 'trainable'" in said


def test_paths_of_a_manifest_that_is_named_from_here_are_whole(tmp_path, monkeypatch):
    """Workers have another working directory."""
    tone(tmp_path / "in/sounds/a.wav")
    jsonl(tmp_path / "in/m.jsonl", {"id": "a", "path": "sounds/a.wav"}, {"id": "b", "path": "gone.wav"})
    monkeypatch.chdir(tmp_path)
    for uri in ("in/m.jsonl", "./in/../in/m.jsonl"):
        found = read_manifests([uri])
        assert [row["path"] for row in found.rows] == [str(tmp_path / "in/sounds/a.wav")]
        assert found.problems[0].source == f"{uri}:2" and str(tmp_path / "in/gone.wav") in found.problems[0].detail


def test_too_many_bad_rows_stop_the_job_and_show_the_first(tmp_path):
    tone(tmp_path / "a.wav")
    found = read_manifests([jsonl(tmp_path / "m.jsonl", {"id": "a", "path": "a.wav"}, {"id": "b", "path": "gone.wav"})])
    refuse_too_many(found, 0.5, "here")
    with pytest.raises(JobError, match="1 of 2 manifest rows") as error:
        refuse_too_many(found, 0.49, "here")
    assert "m.jsonl:2: missing_file" in str(error.value)


VOICES = VoicesSection(
    questions={name: VoiceSection(engine="tone", voice=name) for name in ("low", "mid", "high")},
    answer="mid",
    held_out={"other": VoiceSection(engine="tone")},
    clips_per_question=2,
)
QUESTIONS = [
    Question(id=f"{category}{n}", category=category, question=f"{category} {n}", answer=f"it is {n % 3}", split=split)
    for category in ("sums", "colours")
    for n, split in enumerate(["train"] * 6 + ["heldout"] * 3)
]


def test_the_script_gives_every_sentence_its_voices():
    prompts = script(QUESTIONS, ["read this", "and that", "and more", "and last"], VOICES, held_out=4, seed=1)
    by_role = Counter(prompt.role for prompt in prompts)
    assert by_role == {"question": 12 * 2 + 4 * 4, "answer": 3, "reading": 4 + 2}
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    spoken = Counter(p.question_id for p in prompts if p.split == "train" and p.role == "question")
    assert set(spoken.values()) == {2}
    assert {p.voice for p in prompts if p.role == "answer"} == {"mid"}
    assert Counter(p.voice for p in prompts if p.role == "reading")["mid"] == 4


def test_word_lists_are_read_by_the_answer_voice_and_by_another():
    prompts = script(QUESTIONS, [], VOICES, held_out=4, seed=1, word_lists=["one two", "three four"])
    readers = [(p.text, p.voice == "mid") for p in prompts if p.role == "reading"]
    assert sorted(readers) == sorted((text, own) for text in ("one two", "three four") for own in (True, False))


def test_strangers_speak_held_out_questions_and_nothing_else():
    prompts = script(QUESTIONS, ["read this"], VOICES, held_out=4, seed=1)
    strangers = [prompt for prompt in prompts if prompt.voice == "other"]
    assert strangers
    assert all(p.stranger and p.split == "heldout" and p.role == "question" for p in strangers)
    assert not any(p.stranger for p in prompts if p.voice != "other")


def test_a_voice_of_a_small_share_speaks_seldom_and_one_that_is_not_examined_in_training_alone():
    slow = VoiceSection(engine="tone", share=0.1, examined=False)
    voices = VOICES.model_copy(update={"questions": {**VOICES.questions, "slow": slow}, "clips_per_question": 1})
    many = [Question(f"q{n}", "sums", f"sum {n}", "it is one", "train") for n in range(1000)] + QUESTIONS
    prompts = script(many, [], voices, held_out=4, seed=1)
    often = Counter(p.voice for p in prompts if p.role == "question" and p.split == "train")
    assert sum(often.values()) == 1000 + 12
    assert 15 <= often["slow"] <= 55 and min(often[name] for name in VOICES.questions) > 250
    assert {p.voice for p in prompts if p.split == "heldout"} == {*VOICES.questions, "other"}


def test_the_script_depends_on_its_arguments_alone():
    arguments = (["read this"], VOICES, 4)
    assert script(QUESTIONS, *arguments, 1) == script(list(reversed(QUESTIONS)), *arguments, 1)
    assert script(QUESTIONS, *arguments, 1) != script(QUESTIONS, *arguments, 2)


def test_held_out_questions_are_spread_evenly_over_categories():
    heldout = [q for q in QUESTIONS if q.split == "heldout"]
    assert Counter(q.category for q in spread(heldout, 4, seed=1)) == {"sums": 2, "colours": 2}
    assert len(spread(heldout, None, seed=1)) == 6


def made(place: Workspace, *overrides: str) -> dict:
    return run(Context(load("tiny", overrides), place, Progress(silent=True), Run("", "")))


def test_a_corpus_becomes_rows_and_what_sounds_the_same_is_told(tmp_path):
    corpus = tmp_path / "corpus"
    for name in ("a", "deep/b", "c"):
        tone(corpus / f"{name}.wav", 0.5 if name != "c" else 0.75)
    (corpus / "a.txt").write_text("hello")
    place = Workspace(tmp_path / "work")
    source = f"corpora.sources=[{{layout: folder, uri: {corpus}, speaker: ann, split: train}}]"
    figures = made(place, source)["figures"]
    rows = place.read_table("manifest/utterances.parquet").to_pylist()
    assert [(r["id"], r["seconds"], r["rate"], r["speaker"], r["text"], r["split"]) for r in rows] == [
        ("a.wav", 0.5, 16000, "ann", "hello", "train"),
        ("c.wav", 0.75, 16000, "ann", None, "train"),
        ("deep/b.wav", 0.5, 16000, "ann", None, "train"),
    ]
    pairs = place.read_table("manifest/same_sound.parquet").to_pylist()
    assert [(pair["id"], pair["same_as"]) for pair in pairs] == [("deep/b.wav", "a.wav")]
    assert (figures["recordings"], figures["same_sound"], figures["quarantined"], figures["shards"]) == (3, 1, 0, 1)
    settings = ("corpora.duplicate_audio=quarantine", "data.max_bad_fraction=1", "corpora.shard_seconds=1")
    figures = made(place, source, *settings)["figures"]
    assert (figures["recordings"], figures["reasons"], figures["shards"]) == (2, {"same_sound": 1}, 2)
    (refused,) = place.read_table("quarantine/manifest.parquet").to_pylist()
    assert refused["source"] == str(corpus / "deep/b.wav") and "same bytes as a.wav" in refused["detail"]


def test_a_corpus_counts_by_names_sizes_and_dates_and_only_where_there_is_one(tmp_path):
    tone(tmp_path / "corpus/a.wav")
    recipe = load("tiny", (f"corpora.sources=[{{layout: folder, uri: {tmp_path / 'corpus'}}}]",))
    assert "corpora" not in JOB.sections(load("tiny")), "an old run is not another one because there is a new key"
    assert "corpora" in JOB.sections(recipe)

    def fingerprint() -> str:
        return _fingerprint(recipe, JOB.sections(recipe), {}, JOB.files(recipe), JOB.trees(recipe))

    before = fingerprint()
    assert fingerprint() == before
    tone(tmp_path / "corpus/b.wav")
    assert fingerprint() != before


@pytest.mark.ray
def test_workers_see_in_sound_files_what_this_process_sees(ray_cluster, tmp_path):
    paths = [str(tone(tmp_path / f"{n}.wav", 0.1 + n / 100)) for n in range(7)]
    (tmp_path / "letter.wav").write_text("no sound")
    paths += [str(tmp_path / "letter.wav"), str(tmp_path / "gone.wav")]
    expected = inspect(paths)
    assert [facts.error is None for facts in expected] == [True] * 8 + [False] and expected[7].seconds is None
    assert list(inspected_by_workers(paths, load("tiny").resources, together=2)) == expected


def test_an_attempt_after_a_kill_looks_at_what_is_left(tmp_path, monkeypatch):
    """Of three batches of sounds two were looked at, one sound of them in vain; nothing of it stays when it is done."""
    monkeypatch.setattr(manifest, "_FEW", 1)
    monkeypatch.setattr(recordings, "_ROWS_AT_ONCE", 2)
    for name in "abcdef":
        tone(tmp_path / f"corpus/{name}.wav", 0.5)
    lines = [json.dumps({"id": name, "path": f"corpus/{name}.wav"}) for name in "abcdef"]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    gone = (tmp_path / "corpus/b.wav").rename(tmp_path / "b.wav")
    looked_at: list[str] = []

    def look(paths: list[str], resources: object) -> Iterator[recordings.SoundFacts]:
        for path in paths:
            if path.endswith("f.wav") and "killed" not in looked_at:
                looked_at.append("killed")
                raise JobError("killed")
            looked_at.append(Path(path).stem)
        yield from inspect(paths)

    monkeypatch.setattr(manifest, "inspected_by_workers", look)
    settings = (f"data={{shipped_recordings: false, extra_manifests: [{tmp_path / 'm.jsonl'}]}}",)
    place = Workspace(tmp_path / "work")
    with pytest.raises(JobError, match="killed"):
        execute(JOB, load("tiny", settings), place, json=True)
    assert looked_at == [*"abcde", "killed"]
    gone.rename(tmp_path / "corpus/b.wav")
    execute(JOB, load("tiny", settings), place, json=True)
    assert looked_at == [*"abcde", "killed", *"ef"]
    rows = place.read_table("manifest/utterances.parquet").to_pylist()
    assert [(row["id"], row["seconds"]) for row in rows] == [(name, 0.5) for name in "abcdef"]
    assert len({row["sha256"] for row in rows}) == 1 and rows[0]["sha256"]
    assert not place.list("manifest/looked_at")


def test_a_manifest_and_its_recordings_may_lie_on_s3(tmp_path, s3_bucket):
    place = Workspace(f"s3://{s3_bucket}/corpus")
    place.write_bytes("sounds/a.wav", tone(tmp_path / "a.wav").read_bytes())
    rows = [{"id": "a", "path": "sounds/a.wav"}, {"id": "b", "path": f"s3://{s3_bucket}/corpus/sounds/a.wav"}]
    rows += [{"id": "c", "path": "sounds/gone.wav"}]
    place.write_bytes("m.jsonl", "\n".join(map(json.dumps, rows)).encode())
    found = read_manifests([place.path("m.jsonl")])
    assert [row["path"] for row in found.rows] == [place.path("sounds/a.wav")] * 2
    assert [row["seconds"] for row in found.rows] == [0.5, 0.5]
    assert [problem.reason for problem in found.problems] == ["missing_file"]
    with pytest.raises(ManifestError, match="no such file"):
        read_manifests([place.path("gone.jsonl")])
