"""Speech into units on a real Ray: poison is set aside, the rest is right, a second attempt does what is left."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import sound_files
import soundfile
import tokenize_driver
import torch
from failing_store import FailingStore

from jobs import tokenize_speech
from jobs.encoder_targets import Labelling, TeacherSample
from jobs.fit_units import Featurizer
from jobs.shards import decoded, of_recordings, plan, runs
from jobs.shell import Context, Job, JobError, execute
from jobs.tokenize_speech import UNITS_SCHEMA, Tokenizer, _figures, _from_disk, _refuse_too_many, named, run
from jobs.train_vocoder import ClipFeatures
from speechgpt.recipe import Recipe, load
from speechgpt.runtime import buckets, patience
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.recordings import UTTERANCE_SCHEMA, read_manifests
from speechgpt.runtime.tracking import Run
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech import audio, hubert
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.config import LongAudioSection
from speechgpt.speech.encoder import SpeechEncoder


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([5], [(0, 1)]),
        ([5, 5, 5], [(0, 2), (2, 1)]),
        ([50, 5, 5], [(0, 1), (1, 2)]),
        ([5, 50], [(0, 1), (1, 1)]),
        ([10, 10, 10], [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_runs_stay_within_the_budget_and_cover_everything_once(lengths, expected):
    assert list(runs(lengths, 12)) == expected


@pytest.mark.parametrize("change", ["added", "removed", "longer"])
def test_runs_of_a_corpus_that_changed_are_as_they_were_but_for_those_beside_the_change(change):
    """In 20 corpora of 3000 recordings one is added, left out or longer: other runs are few, and there are not many."""
    draw = np.random.default_rng(5)
    recipe = load("tiny", ("corpora.shard_seconds=300",))

    def cut(rows: list[tuple[str, float]]) -> set[tuple[tuple[str, float], ...]]:
        table = pa.table({"id": [name for name, _ in rows], "seconds": [seconds for _, seconds in rows]})
        found = list(of_recordings(table, recipe))
        assert [first for first, _ in found] == list(accumulate((count for _, count in found), initial=0))[:-1]
        assert sum(count for _, count in found) == len(rows)
        made = [tuple(rows[first : first + count]) for first, count in found]
        assert all(sum(seconds for _, seconds in run) <= 300 for run in made)
        return set(made)

    others = []
    for corpus in range(20):
        rows = [(f"{corpus}-{number:05d}", float(draw.uniform(1, 20))) for number in range(3000)]
        place, before = int(draw.integers(3000)), cut(rows)
        assert len(before) < 1.5 * sum(seconds for _, seconds in rows) / 300
        new = {"added": [rows[place], ("new", 7.0)], "removed": [], "longer": [(rows[place][0], 25.0)]}[change]
        others.append(len(cut([*rows[:place], *new, *rows[place + 1 :]]) - before))
    assert np.mean(others) < 3 and max(others) < 12, "of some 125"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load("tiny", ("data.max_bad_fraction=1",))


@pytest.fixture
def workspace(tmp_path: Path, recipe: Recipe) -> Workspace:
    """A workspace with an untrained encoder."""
    place = Workspace(tmp_path / "work")
    with place.stage("encoder") as folder:
        model = hubert.scratch(recipe.encoder.architecture, seed=1)
        hubert.save(model, folder, layer=2, normalize=True)
        centroids = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
        Codebook(centroids).save(folder)
    return place


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.3 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))).astype(np.float32)


def recordings(workspace: Workspace, *paths: Path) -> None:
    rows = [{"id": path.stem, "path": str(path), "text": "words", "split": "train", "seconds": 1.0} for path in paths]
    workspace.write_table("manifest/utterances.parquet", pa.Table.from_pylist(rows, UTTERANCE_SCHEMA))


def spoken(workspace: Workspace, name: str, *waves: np.ndarray) -> None:
    """A file of `speech/` as the job `synthesize` writes it."""
    rows = [
        {
            "id": f"{name}-{number}",
            "text": "words",
            "voice": "tone",
            "role": "question",
            "category": "plus",
            "question_id": "q",
            "answer": "five",
            "split": "heldout",
            "stranger": True,
            "speaker": "tone",
            "language": "en",
            "seconds": len(wave) / 16000,
            "sha256": "",
            "audio": audio.encode(wave, "flac"),
        }
        for number, wave in enumerate(waves)
    ]
    workspace.write_table(f"speech/part-{name}.parquet", pa.Table.from_pylist(rows))


def tokenize(workspace: Workspace, recipe: Recipe) -> dict:
    return run(Context(recipe, workspace, Progress(silent=True), Run("", "")))


def poison(folder: Path) -> dict[str, Path]:
    """Every kind of bad sound file, by the reason that is expected for it; and two that only look odd."""
    folder.mkdir()
    good = speech(1.0)
    flac = audio.encode(good, "flac")
    files = {name: folder / f"{name}.wav" for name in ("empty", "silent", "too_short", "not_finite", "wide", "fast")}
    files |= {name: folder / f"{name}.flac" for name in ("unreadable", "renamed", "gone")}
    files["empty"].write_bytes(b"")
    soundfile.write(files["silent"], np.zeros(16000, np.float32), 16000)
    soundfile.write(files["too_short"], good[:1], 16000)
    soundfile.write(files["not_finite"], np.where(np.arange(16000) == 7, np.nan, good), 16000, subtype="FLOAT")
    soundfile.write(files["wide"], np.tile(good[:, None], (1, 8)), 16000)
    soundfile.write(files["fast"], np.repeat(good, 6), 96000)
    files["unreadable"].write_bytes(flac[:30])
    files["renamed"].write_text("this is a letter, not a recording")
    return files


@pytest.mark.ray
def test_bad_sound_is_set_aside_by_name_and_the_rest_become_units(ray_cluster, workspace, recipe, tmp_path):
    files = poison(tmp_path / "sounds")
    good = tmp_path / "good.wav"
    soundfile.write(good, speech(0.8), 16000)
    recordings(workspace, *files.values(), good)
    done = tokenize(workspace, recipe)
    units = workspace.read_table("units")
    assert set(units["utterance_id"].to_pylist()) == {"good", "wide", "fast"}
    quarantine = workspace.read_table("quarantine")
    assert quarantine.column_names == ["source", "reason", "detail"]
    reasons = dict(zip(quarantine["source"].to_pylist(), quarantine["reason"].to_pylist(), strict=True))
    assert reasons == {
        str(files["empty"]): "empty",
        str(files["silent"]): "silent",
        str(files["too_short"]): "too_short",
        str(files["not_finite"]): "not_finite",
        str(files["unreadable"]): "unreadable",
        str(files["renamed"]): "unreadable",
        str(files["gone"]): "missing_file",
    }
    assert (done["figures"]["utterances"], done["figures"]["quarantined"]) == (3, 7)


@pytest.mark.ray
def test_units_are_those_of_the_clip_alone_with_everything_known_about_it(ray_cluster, workspace, recipe):
    waves = [speech(seconds, seed) for seed, seconds in enumerate((0.4, 2.0, 1.1, 0.7))]
    spoken(workspace, "a", *waves)
    tokenize(workspace, recipe)
    table = workspace.read_table("units")
    assert table.schema.equals(UNITS_SCHEMA)
    with workspace.fetch("encoder") as directory:
        encoder = SpeechEncoder.load(directory)
    for row, clip in zip(table.to_pylist(), waves, strict=True):
        decoded = audio.decode(audio.encode(clip, "flac"))
        (alone,) = encoder.encode([decoded])
        assert row["units"] == alone.units.tolist()
        assert row["durations"] == alone.durations.tolist()
        assert sum(row["durations"]) == pytest.approx(row["seconds"] * 50, abs=1.001)
        assert (row["role"], row["split"], row["stranger"], row["answer"]) == ("question", "heldout", True, "five")


@pytest.mark.ray
def test_a_second_attempt_does_only_what_is_missing_and_ends_in_the_same_bytes(ray_cluster, workspace, recipe):
    for name in "abc":
        spoken(workspace, name, speech(0.5, ord(name)), speech(0.9, ord(name) + 1))
    tokenize(workspace, recipe)
    whole = workspace.digest("units")
    first, second, _ = workspace.list("units")
    kept = Path(workspace.path(first)).stat().st_mtime_ns
    workspace.delete(second)
    done = tokenize(workspace, recipe)
    assert workspace.digest("units") == whole
    assert Path(workspace.path(first)).stat().st_mtime_ns == kept
    assert done["figures"]["utterances"] == 6, "what was there before counts, too"


@pytest.mark.ray
def test_a_driver_that_is_killed_and_run_again_ends_in_the_bytes_of_one_that_was_not(
    ray_cluster, workspace, recipe, tmp_path
):
    """kill -9, when some of 52 shards are written, and one cannot be: its sound does not come."""
    files = [sound_files.write(tmp_path, f"{n:02d}", sound_files.speech(0.5, n), "flac") for n in range(40)]
    bad = sound_files.poison(tmp_path / "bad")
    recordings(workspace, *files, *map(Path, bad))
    settings = ("data.max_bad_fraction=1", "corpora.shard_seconds=1", "resources.tokenisation={max_actors: 1}")
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, tokenize_driver.__file__, workspace.uri, *settings]
    sound = files[-1].rename(tmp_path / "sound")
    os.mkfifo(files[-1])
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            command, env=os.environ | {"RAY_ADDRESS": address}, stdout=log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 300
        while not workspace.list("units"):
            assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)
        driver.kill()
        driver.wait()
    sound.replace(files[-1])
    shards = plan(workspace, load("tiny", settings))
    assert 0 < len(workspace.list("units")) < len(shards) == 52, "killed in the middle"
    tokenize(workspace, load("tiny", settings))
    whole = {part: workspace.digest(part) for part in ("units", "quarantine")}
    for part in whole:
        workspace.delete(part)
    figures = tokenize(workspace, load("tiny", settings))["figures"]
    assert {part: workspace.digest(part) for part in whole} == whole
    assert (figures["utterances"], figures["quarantined"], figures["shards"]) == (40, 12, 52)


def test_units_are_of_the_device_asked_for_and_not_of_the_node(workspace, recipe, monkeypatch):
    """On a node with a GPU, as this would seem to be one, nothing is put on it unasked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for actor in (Tokenizer, Featurizer, ClipFeatures):
        actor(workspace, recipe)
    TeacherSample(workspace, recipe, Labelling("", 2, encoder="encoder"), asked=1)
    asked = load("tiny", ("resources.tokenisation.gpus=0.5",))
    monkeypatch.setattr(hubert.nn.Module, "to", lambda model, device: pytest.fail(f"to {device}"))
    with pytest.raises(pytest.fail.Exception, match="to cuda"):
        Tokenizer(workspace, asked)


@pytest.mark.ray
def test_too_much_bad_sound_stops_the_job_and_names_it(ray_cluster, workspace, tmp_path):
    files = poison(tmp_path / "sounds")
    recordings(workspace, *files.values())
    with pytest.raises(JobError, match=r"7 of 9 clips.*max_bad_fraction = 0.5") as error:
        tokenize(workspace, load("tiny", ("data.max_bad_fraction=0.5",)))
    assert "silent.wav: silent" in str(error.value)


def test_what_is_set_aside_is_found_by_one_listing(workspace, tmp_path, monkeypatch):
    """However many shards there are: each look at S3 takes its time."""
    recordings(workspace, *(tmp_path / f"{n}.wav" for n in range(20)))
    shards = plan(workspace, load("tiny", ("corpora.shard_seconds=1",)))
    for shard in shards[3:]:
        row = {"source": shard.name, "reason": "silent", "detail": "x"}
        workspace.write_table(shard.quarantine, pa.Table.from_pylist([row]))
    looks = []
    monkeypatch.setattr(Workspace, "exists", lambda *_: pytest.fail("a look for each shard"))
    read = Workspace.list
    monkeypatch.setattr(Workspace, "list", lambda place, rel="": looks.append(rel) or read(place, rel))
    with pytest.raises(JobError, match=f"17 of 20 clips.*(?s:.*){shards[3].name}: silent"):
        _refuse_too_many(workspace, shards, 17, 20, 0.5)
    assert looks.count("quarantine") == 1 and len(looks) <= 1 + 5
    _refuse_too_many(workspace, shards, 10, 20, 0.5)


def test_long_recordings_are_split_over_shards_by_what_they_hold(tmp_path):
    place = Workspace(tmp_path)
    rows = [{"id": f"u{n:03d}", "path": "x", "seconds": 100.0 if n else None} for n in range(20)]
    place.write_table("manifest/utterances.parquet", pa.Table.from_pylist(rows, UTTERANCE_SCHEMA))
    shards = plan(place, load("tiny"))
    held = sorted((shard.first, shard.count) for shard in shards)
    assert held == [(0, 5), (5, 4), (9, 4), (13, 4), (17, 3)], "of six at most, and begun where ids say so"
    assert [shard.units for shard in shards] == sorted(shard.units for shard in shards)
    assert all(shard.units.startswith("units/part-recordings-") for shard in shards)


def test_a_name_says_what_a_shard_holds(tmp_path, monkeypatch):
    """Another sound or text is another name, of its own shard alone; how the manifest was read and written is of no
    account, nor is a column that has nothing for its clips."""
    from jobs import shards

    place = Workspace(tmp_path)
    rows = [{"id": f"u{n:03d}", "path": f"/{n}.wav", "sha256": f"{n:064x}", "seconds": 100.0} for n in range(20)]

    def names(changed: dict[str, object], group_rows: int | None = None) -> dict[int, str]:
        """{first clip of a shard: its name}"""
        made = pa.Table.from_pylist([*rows[:7], rows[7] | changed, *rows[8:]], UTTERANCE_SCHEMA)
        place.write_table("manifest/utterances.parquet", made, group_rows)
        found = plan(place, load("tiny"))
        assert found == sorted(found, key=lambda shard: shard.name)
        return {shard.first: shard.name for shard in found}

    before = names({})
    own = max(first for first in before if first <= 7)
    assert len(set(before.values())) == len(before) >= 4
    for changed in ({"path": "/other.wav"}, {"sha256": "f" * 64}, {"text": "a transcript"}, {"split": "heldout"}):
        assert {first for first, name in names(changed).items() if name != before[first]} == {own}
    monkeypatch.setattr(shards, "_ROWS_AT_ONCE", 3)
    assert names({}, group_rows=4) == before
    made = place.read_table("manifest/utterances.parquet").append_column("note", pa.array([None] * 19 + ["late"]))
    place.write_table("manifest/utterances.parquet", made)
    changed = {shard.first for shard in plan(place, load("tiny")) if shard.name != before[shard.first]}
    assert changed == {max(before)}


@pytest.mark.ray
def test_of_a_corpus_that_has_changed_the_shards_of_those_clips_alone_are_made(ray_cluster, workspace, tmp_path):
    """A clip more, one less, another transcript: the rest is not touched, and all is as if made at once."""
    settings = ("data.max_bad_fraction=1", "corpora.shard_seconds=1")
    sounds = [sound_files.write(tmp_path, f"{n:02d}", sound_files.speech(0.2, n), "flac") for n in range(60)]
    (tmp_path / "97.flac").write_text("this is a letter, not a recording")
    listed = tmp_path / "listed.json"
    listing = Job("manifest", "manifest", lambda context: _listed(context, listed), files=lambda recipe: [str(listed)])
    job = dataclasses.replace(tokenize_speech.JOB, reads=("manifest",))

    def corpus(place: Workspace, *files: Path, text: str = "") -> dict[str, int]:
        """{file of units or of the quarantine: when it was written}."""
        listed.write_text(json.dumps([[file.stem, str(file), text] for file in files]))
        for each in (listing, job):
            execute(each, load("tiny", settings), place, json=True)
        names = [name for name in (*place.list("units"), *place.list("quarantine")) if "_done" not in name]
        return {name: Path(place.path(name)).stat().st_mtime_ns for name in names}

    few = corpus(workspace, *sounds[:50])
    more = corpus(workspace, *sounds[3:20], *sounds[30:], tmp_path / "97.flac")
    assert 0.2 * len(few) < len(few.items() & more.items()) < len(few)
    assert workspace.read_table("quarantine")["reason"].to_pylist() == ["unreadable"]
    anew = Workspace(tmp_path / "anew")
    with anew.stage("encoder") as folder:
        for file in Path(workspace.path("encoder")).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    assert corpus(anew, *sounds[3:20], *sounds[30:], tmp_path / "97.flac").keys() == more.keys()
    assert all(anew.digest(part) == workspace.digest(part) for part in ("units", "quarantine"))
    others = corpus(workspace, *sounds[3:20], *sounds[30:], text="another")
    assert not more.items() & others.items() and not workspace.list("quarantine")


def _listed(context: Context, listed: Path) -> dict:
    rows = [
        {"id": name, "path": path, "text": text, "split": "train", "seconds": 0.2}
        for name, path, text in json.loads(listed.read_text())
    ]
    context.workspace.write_table("manifest/utterances.parquet", pa.Table.from_pylist(rows, UTTERANCE_SCHEMA))
    return {"figures": {}, "outputs": ["manifest/utterances.parquet"]}


def test_units_of_another_maker_are_others(workspace, recipe):
    """Another encoder, other settings of it; of speech also another way to speak the same prompts."""
    spoken(workspace, "a", speech(0.5))
    recordings(workspace, Path("x.wav"))

    def names(*overrides: str, voices: str = "") -> dict[str, str]:
        context = Context(
            load("tiny", overrides), workspace, Progress(silent=True), Run("", ""), None, {"synthesize": voices}
        )
        spoke, recorded = named(plan(workspace, context.recipe), context)
        return {"speech": spoke.units, "recordings": recorded.units}

    before = names()
    assert names("codebook.iterations=3", "encoder.batch_seconds=7") == before
    assert [names(voices="louder")[kind] == before[kind] for kind in before] == [False, True]
    for setting in ("data.max_seconds=9", "encoder.precision=bfloat16", "encoder.long={mode: pauses}"):
        assert not set(names(setting).values()) & set(before.values())
    Codebook(torch.randn(32, 64, generator=torch.Generator().manual_seed(2))).save(workspace.path("encoder"))
    assert not set(names().values()) & set(before.values())


@pytest.mark.ray
def test_a_sound_that_was_missing_is_looked_for_again(ray_cluster, workspace, tmp_path):
    """Where a disk was not there, and the job ended for it, an attempt with the disk goes through."""
    recipe = load("tiny", ("data.max_bad_fraction=0", "corpora.shard_seconds=1"))
    files = [sound_files.write(tmp_path, f"{n}", sound_files.speech(0.5, n), "flac") for n in range(3)]
    recordings(workspace, *files)
    files[1].rename(tmp_path / "away")
    with pytest.raises(JobError, match="missing_file"):
        tokenize(workspace, recipe)
    (tmp_path / "away").rename(files[1])
    assert tokenize(workspace, recipe)["figures"]["utterances"] == 3
    assert sorted(workspace.read_table("units")["utterance_id"].to_pylist()) == ["0", "1", "2"]
    assert not workspace.list("quarantine")


@pytest.mark.ray
def test_units_of_other_recordings_do_not_stay(ray_cluster, workspace, recipe, tmp_path):
    files = [sound_files.write(tmp_path, f"{n}", sound_files.speech(0.5, n), "flac") for n in range(2)]
    for file in files:
        recordings(workspace, file)
        tokenize(workspace, recipe)
        assert workspace.read_table("units")["utterance_id"].to_pylist() == [file.stem]


@pytest.mark.parametrize("mode", ["overlapped", "pauses", "published"])
def test_clips_of_any_length_become_units_where_the_recipe_says_how(workspace, tmp_path, mode):
    """Without Ray: the actor is handed its shard."""
    sounds = {"long": speech(4.3), "short": speech(0.8, 1), "stereo": np.stack([speech(3, 2), speech(3, 3)], axis=1)}
    for name, sound in sounds.items():
        soundfile.write(tmp_path / f"{name}.wav", sound, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000, np.float32), 16000)
    recordings(workspace, *(tmp_path / f"{name}.wav" for name in [*sounds, "silent"]))
    shards = plan(workspace, load("tiny", ("data.max_seconds=2",)))

    def tokenized(*overrides: str) -> tuple[dict[str, dict], dict[str, str]]:
        worker = Tokenizer(workspace, load("tiny", ("data.max_seconds=2", *overrides)))
        for shard in shards:
            worker(vars(shard))
        rows = {row["utterance_id"]: row for row in workspace.read_table("units").to_pylist()}
        refused = {Path(row["source"]).stem: row["reason"] for row in workspace.read_table("quarantine").to_pylist()}
        return rows, refused

    rows, refused = tokenized()
    assert set(rows) == {"short"} and refused == {"long": "too_long", "stereo": "too_long", "silent": "silent"}
    short = rows["short"]
    rows, refused = tokenized(f"encoder.long={{mode: {mode}, seconds: 1, context_seconds: 0.5}}")
    assert set(rows) == set(sounds) and refused == {"silent": "silent"}
    assert rows["short"] == short
    assert rows["long"]["seconds"] == 4.3 and rows["stereo"]["seconds"] == 3
    lost = 4 if mode == "published" else 0
    assert sum(rows["long"]["durations"]) == hubert.frame_count(int(4.3 * 16000)) - lost
    section = LongAudioSection(mode=mode, seconds=1, context_seconds=0.5)
    with workspace.fetch("encoder") as directory:
        (alone,) = SpeechEncoder.load(directory, long=section).encode([sounds["stereo"].mean(axis=1)])
    assert rows["stereo"]["units"] == alone.units.tolist(), "mixed down, not one channel after the other"


def test_two_percent_of_poison_is_set_aside_kind_by_kind_and_all_else_becomes_units(workspace, recipe, tmp_path):
    """Without Ray: 12 bad files of 12 kinds among 600, in ten formats."""
    bad = sound_files.poison(tmp_path / "bad")
    good = [sound_files.speech(0.1 + 0.001 * n, n) for n in range(588)]
    (tmp_path / "good").mkdir()
    formats = sound_files.FORMATS
    files = [sound_files.write(tmp_path / "good", f"{n}", wave, formats[n % 10]) for n, wave in enumerate(good)]
    mixed = sorted([*files, *map(Path, bad)], key=lambda file: hashlib.sha256(file.name.encode()).digest())
    recordings(workspace, *mixed)
    worker = Tokenizer(workspace, recipe)
    tallies = [worker(vars(shard)) for shard in plan(workspace, recipe)]
    refused = workspace.read_table("quarantine").to_pylist()
    assert {row["source"]: row["reason"] for row in refused} == bad and len(refused) == 12
    assert {row["source"] for row in workspace.read_table("units").to_pylist()} == set(map(str, files))
    assert _figures(tallies)["reasons"] == dict(sorted(Counter(bad.values()).items()))
    assert _figures(tallies)["utterances"] == 588 and sum(told["clips"] for told in tallies) == 600


@pytest.mark.parametrize("long", [(), ("encoder.long={mode: pauses, seconds: 10}",)], ids=["short", "long"])
def test_a_manifests_own_columns_do_not_stand_in_the_way(workspace, tmp_path, long):
    """Without Ray: columns that are called as the pipeline's own are, with whatever people keep in them."""
    file = sound_files.write(tmp_path, "a", sound_files.speech(0.5), "wav")
    own = {"role": "adult", "category": 3, "question_id": 7, "voice": 2.5, "stranger": True, "units": "metres"}
    audios = (None, "other.wav", {"bytes": None, "path": "other.wav"})
    rows = [{"id": str(n), "path": str(file), "audio": sound} | own for n, sound in enumerate(audios)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"id": "bare", "path": str(file)}])))
    workspace.write_table("manifest/utterances.parquet", read_manifests([str(tmp_path / "m.jsonl")]).table)
    recipe = load("tiny", ("data.max_bad_fraction=0", *long))
    (shard,) = plan(workspace, recipe)
    Tokenizer(workspace, recipe)(vars(shard))
    units = {row["utterance_id"]: row for row in workspace.read_table("units").to_pylist()}
    assert set(units) == {"0", "1", "2", "bare"} and len({tuple(row["units"]) for row in units.values()}) == 1
    named = ("role", "category", "question_id", "voice", "stranger")
    assert [units["1"][name] for name in named] == ["adult", "3", "7", "2.5", True]
    assert [units["bare"][name] for name in named] == ["recording", None, None, None, False]
    assert len(list(decoded(workspace.read_rows(shard.file).to_pylist(), 30))) == 4


def test_a_recording_of_any_length_is_asked_for_again_where_the_store_fails(tmp_path, monkeypatch):
    file = sound_files.write(tmp_path, "a", sound_files.speech(2.0), "wav")
    monkeypatch.setattr(patience, "_PAUSES", (0.0,) * 8)
    store = FailingStore(tmp_path.parent)
    monkeypatch.setattr(buckets, "filesystem", lambda uri: store)
    wave, sha256 = _from_disk(f"s3://{tmp_path.name}/a.wav", tmp_path / "draft")
    assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest() and len(wave) == 32_000


def test_the_long_mode_is_part_of_what_units_depend_on_and_of_nothing_before_them():
    from jobs import train_encoder
    from jobs.shell import _chosen

    plain, long = load("tiny"), load("tiny", ("encoder.long={mode: published}",))
    assert "encoder.long" not in tokenize_speech.JOB.sections(plain)
    assert "encoder.long" in tokenize_speech.JOB.sections(long)
    assert _chosen(plain, train_encoder.JOB.sections) == _chosen(long, train_encoder.JOB.sections)
    named = {name.removeprefix("encoder.") for name in train_encoder.JOB.sections if name.startswith("encoder.")}
    assert named == set(type(plain.encoder).model_fields) - {"long", "precision"}


def test_nothing_to_do_says_what_to_run(tmp_path):
    with pytest.raises(JobError, match="run manifest and synthesize"):
        tokenize(Workspace(tmp_path), load("tiny"))


def test_shards_are_planned_on_s3_as_in_a_directory(tmp_path, s3_bucket):
    places = Workspace(tmp_path), Workspace(f"s3://{s3_bucket}/work")
    for place in places:
        spoken(place, "a", speech(0.5), speech(0.6))
        recordings(place, tmp_path / "x.wav")
    local, remote = (plan(place, load("tiny")) for place in places)
    assert local == remote
    assert [(shard.name[:11], shard.count) for shard in remote] == [("a", 2), ("recordings-", 1)]
