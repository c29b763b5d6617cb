"""Corpora in the layouts that people have: the rows, where they come from, and what is said of what is broken."""

import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from failing_store import FailingFile, FailingStore

from speechgpt.runtime import buckets, patience
from speechgpt.runtime.config import CorpusSection
from speechgpt.runtime.corpora.names import fields, split_of
from speechgpt.runtime.corpora.outcome import ManifestError, Problem
from speechgpt.runtime.corpora.reading import LAYOUTS, read
from speechgpt.runtime.files import FileFact, read_bytes
from speechgpt.runtime.inside_files import PlaceError, Stretch
from speechgpt.runtime.recordings import read_manifests
from speechgpt.runtime.workspace import Workspace

RATE = 22_050


def sound(seed: int, seconds: float = 0.1, channels: int = 1) -> np.ndarray:
    shape = (int(RATE * seconds), channels)
    return (0.3 * np.random.default_rng(seed).standard_normal(shape)).clip(-1, 1).astype(np.float32)


def sound_bytes(seed: int, format: str = "FLAC", seconds: float = 0.1, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    subtype = None if format == "MP3" else "PCM_16"
    soundfile.write(buffer, sound(seed, seconds, channels), RATE, format=format, subtype=subtype)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(layout: str, uri: Path | str, **known: Any) -> tuple[dict[str, dict], list[Problem]]:
    """({id: row}, problems), each row under its id once."""
    found = [row for _, row in read(CorpusSection(layout=layout, uri=str(uri), **known))]  # type: ignore[arg-type]
    rows = [row for row in found if not isinstance(row, Problem)]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}, [row for row in found if isinstance(row, Problem)]


def test_the_recipe_knows_every_layout_and_no_other():
    assert set(get_args(CorpusSection.model_fields["layout"].annotation)) == set(LAYOUTS)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-clean-100", "train"), ("train.clean.100-00000-of-00009.parquet", "train"), ("Dev", "dev"),
        ("validation", "valid"), ("validation-00000-of-00001.parquet", "valid"), ("valid_1", "valid"),
        ("training", "train"), ("TRAIN", "train"), ("train_other_500", "train"), ("test.other", "test"),
        ("val", "valid"), ("development", "dev"), ("evaluation", "eval"), ("heldout", "heldout"),
        ("Held-out", "heldout"),
        ("validated", None), ("trainer", None), ("latest", None), ("XL", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_a_split_is_known_by_its_name(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("given", "row"),
    [
        ({"subset": "DEV"}, {"split": "DEV"}),
        ({"subset": "train-clean"}, {"split": "train-clean"}),
        ({"subset": "XL"}, {"subset": "XL"}),
        ({"subset": ["{XL}", "{L}"]}, {"subset": ["{XL}", "{L}"]}),
        ({"split": "gold", "subset": "dev"}, {"split": "gold", "subset": "dev"}),
    ],
)
def test_a_subset_is_a_split_where_it_is_called_one(given, row):
    assert fields(given) == row


def test_folder(tmp_path):
    put(tmp_path / "b/x.FLAC", sound_bytes(1))
    put(tmp_path / "b/x.wav", sound_bytes(2, "WAV"))
    put(tmp_path / "a.wav", sound_bytes(3, "WAV"))
    put(tmp_path / "a.txt", " hello\n there ")
    put(tmp_path / "c.wav", sound_bytes(4, "WAV"))
    put(tmp_path / "c.lab", b"\xff\xfe")
    put(tmp_path / "notes.pdf", "no sound")
    rows, problems = rows_of("folder", tmp_path, language="nl", speaker="me")
    assert set(rows) == {"a.wav", "b/x.FLAC", "b/x.wav"}
    assert rows["a.wav"] == {
        "id": "a.wav", "path": str(tmp_path / "a.wav"), "text": "hello there", "language": "nl", "speaker": "me"
    }  # fmt: skip
    assert "text" not in rows["b/x.wav"]
    assert problems == [Problem(str(tmp_path / "c.lab"), "unreadable_row", problems[0].detail)]


@pytest.mark.parametrize("part", ["", "train-clean-100", "train-clean-100/19"])
def test_librispeech(tmp_path, part):
    chapter = tmp_path / "LibriSpeech/train-clean-100/19/198"
    put(chapter / "19-198-0000.flac", sound_bytes(1))
    put(chapter / "19-198-0002.flac", sound_bytes(2))
    put(chapter / "19-198.trans.txt", "19-198-0000 NORTHANGER ABBEY\n19-198-0001 LOST\n")
    rows, problems = rows_of("librispeech", tmp_path / "LibriSpeech" / part)
    assert not problems
    known = {"speaker": "19", "language": "en", "split": "train"}
    path = str(chapter / "19-198-0000.flac")
    assert rows["19-198-0000"] == {"id": "19-198-0000", "path": path, "text": "NORTHANGER ABBEY"} | known
    assert set(rows) == {"19-198-0000", "19-198-0001", "19-198-0002"}, "with no sound, with no text: both are told"
    assert rows["19-198-0002"] == {"id": "19-198-0002", "path": str(chapter / "19-198-0002.flac")} | known


def test_ljspeech(tmp_path):
    for number in (1, 2, 9):
        put(tmp_path / f"wavs/LJ00{number}.wav", sound_bytes(number, "WAV"))
    put(tmp_path / "metadata.csv", 'LJ001|Dr. "Who"|Doctor "Who"\nLJ002|Plain\nLJ003\n')
    rows, (problem,) = rows_of("ljspeech", tmp_path, speaker="LJ", language="en")
    assert {name: row.get("text") for name, row in rows.items()} == {
        "LJ001": 'Doctor "Who"', "LJ002": "Plain", "LJ009": None
    }  # fmt: skip
    assert rows["LJ001"]["path"] == str(tmp_path / "wavs/LJ001.wav")
    assert problem.source == f"{tmp_path}/metadata.csv:3"


def test_common_voice(tmp_path):
    header = "client_id\tpath\tsentence\tup_votes\tage\tlocale"
    put(tmp_path / "train.tsv", f'{header}\nab\tcv_1.mp3\tsay "hi\t2\t\tcy\nab\tcv_2.mp3\tcut off\n')
    put(tmp_path / "dev.tsv", f"{header}\ncd\tcv_3.mp3\tthree\t2\ttwenties\tcy\n")
    put(tmp_path / "invalidated.tsv", f"{header}\ncd\tcv_4.mp3\tfour\t2\t\tcy\n")
    put(tmp_path / "clip_durations.tsv", "clip\tduration[ms]\ncv_1.mp3\t2500\n")
    rows, (problem,) = rows_of("common-voice", tmp_path)
    assert rows["cv_1"] == {
        "id": "cv_1", "path": str(tmp_path / "clips/cv_1.mp3"), "text": 'say "hi', "speaker": "ab", "language": "cy",
        "split": "train", "up_votes": "2", "seconds": 2.5,
    }  # fmt: skip
    assert (set(rows), rows["cv_3"]["split"], rows["cv_3"]["age"]) == ({"cv_1", "cv_3"}, "dev", "twenties")
    assert problem.source == f"{tmp_path}/train.tsv:3"
    assert set(rows_of("common-voice", tmp_path / "invalidated.tsv")[0]) == {"cv_4"}


def cut(name: str, start: float, duration: float, **changed: Any) -> dict:
    recording = {
        "id": "rec", "sources": [{"type": "file", "channels": [0, 1], "source": "audio/two.flac"}],
        "sampling_rate": RATE, "duration": 1.0, "channel_ids": [0, 1],
    }  # fmt: skip
    told = [
        {"id": "s", "text": "one", "speaker": "ann", "language": "en"},
        {"id": "t", "text": "two", "speaker": "ann"},
    ]
    return {
        "id": name, "type": "MonoCut", "start": start, "duration": duration, "channel": 1, "supervisions": told,
        "recording": recording,
    } | changed  # fmt: skip


def test_lhotse(tmp_path):
    put(tmp_path / "audio/two.flac", sound_bytes(1, seconds=1.0, channels=2))
    mono = {"id": "m", "sources": [{"type": "file", "channels": [0], "source": "audio/two.flac"}], "duration": 1.0}
    cuts = [
        cut("c1", 0.25, 0.5),
        cut("c2", 0, 1.0, channel=0, recording=mono, supervisions=[]),
        cut("c3", 0, 1.0, type="MixedCut"),
        cut("c4", 0, 1.0, recording=None),
        cut("c5", 0, 1.0, recording=mono | {"sources": [{"type": "command", "source": "sph2pipe"}]}),
    ]
    packed = gzip.compress("\n".join(map(json.dumps, cuts)).encode() + b"\nno json\n")
    put(tmp_path / "cuts.jsonl.gz", packed)
    rows, problems = rows_of("lhotse", tmp_path / "cuts.jsonl.gz")
    assert rows["c2"]["path"] == str(tmp_path / "audio/two.flac") and rows["c2"]["text"] is None
    assert (rows["c1"]["text"], rows["c1"]["speaker"], rows["c1"]["language"]) == ("one two", "ann", "en")
    heard, rate = soundfile.read(io.BytesIO(read_bytes(rows["c1"]["path"])), dtype="float32")
    whole, _ = soundfile.read(io.BytesIO(read_bytes(rows["c2"]["path"])), dtype="float32")
    first, stop = round(0.25 * RATE), round(0.75 * RATE)
    assert rate == RATE and np.array_equal(heard, whole[first:stop, 1])
    assert [(problem.source.rpartition(":")[2], problem.reason) for problem in problems] == [
        ("3", "unsupported_cut"), ("4", "missing_key"), ("5", "unsupported_cut"), ("6", "unreadable_row")
    ]  # fmt: skip
    put(tmp_path / "cuts.jsonl.gz", packed[:-12])
    assert rows_of("lhotse", tmp_path / "cuts.jsonl.gz")[1][-1].detail.startswith("the compressed file is damaged")


def test_a_lhotse_cut_is_read_from_the_file_of_its_channel_or_not_at_all(tmp_path):
    def file(name: str, *channels: int) -> dict:
        return {"type": "file", "channels": list(channels), "source": f"{name}.wav"}

    files = {"id": "r", "sources": [file("left", 0), file("right", 1), file("pair", 5, 4)], "duration": 1.0}
    slow, other = ({"name": name, "kwargs": {}} for name in ("Speed", "Resample"))
    cuts = [
        cut("right", 0, 1.0, channel=1, recording=files),
        cut("second", 0.5, 0.5, channel=4, recording=files | {"transforms": [other]}),
        cut("both", 0, 1.0, type="MultiCut", channel=[4, 5], recording=files),
        cut("apart", 0, 1.0, type="MultiCut", channel=[0, 1], recording=files),
        cut("none", 0, 1.0, channel=7, recording=files),
        cut("fast", 0, 1.0, recording=files | {"transforms": [slow]}),
    ]
    put(tmp_path / "cuts.jsonl", "\n".join(map(json.dumps, cuts)))
    rows, problems = rows_of("lhotse", tmp_path)
    assert {name: row["path"].removeprefix(f"{tmp_path}/") for name, row in rows.items()} == {
        "right": "right.wav", "second": "pair.wav#t=0.5,1&channel=1", "both": "pair.wav"
    }  # fmt: skip
    assert {problem.reason for problem in problems} == {"unsupported_cut"}
    for problem, said in zip(problems, (r"apart: .*\[0, 1\]", r"none: .*\[7\]", "fast: .*Speed"), strict=True):
        assert re.match(said, problem.detail)


def test_a_stretch_of_which_the_file_or_the_store_gives_less_is_an_error():
    whole, wanted = sound_bytes(1, "MP3", seconds=4.0), Stretch(1.8, 2.5)
    assert soundfile.info(io.BytesIO(wanted.read("a.mp3", io.BytesIO(whole)))).frames == round(0.7 * RATE)
    with pytest.raises(PlaceError, match=r"a\.mp3#t=1\.8,2\.5: the file ends after 0\.[0-6]"):
        wanted.read("a.mp3", io.BytesIO(whole[: len(whole) // 2]))
    for format in ("MP3", "FLAC", "WAV"):
        whole = sound_bytes(1, format, seconds=4.0)
        for asked in (0, 1):
            with pytest.raises(OSError, match="SLOW_DOWN"):
                wanted.read("a", FailingFile(whole, asked))


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            file.addfile(facts, io.BytesIO(content))
    return path


MEMBERS = {
    "spk/a.flac": sound_bytes(1),
    "spk/a.json": b'{"text": "hello", "speaker_id": 7, "snr": 12.5, "duration": 0.1}',
    "spk/b.txt": b"before its sound",
    "spk/b.wav": sound_bytes(2, "WAV"),
    "spk/c.txt": b"no sound",
    "spk/d.opus": b"",
    "spk/e.mp3": b"x" * 10,
    "spk/e.json": b"{",
}


def test_webdataset(tmp_path):
    tar(tmp_path / "shards/000.tar", MEMBERS)
    tar(tmp_path / "shards/nl/000.tar", {"spk/a.flac": sound_bytes(3)})
    rows, problems = rows_of("webdataset", tmp_path / "shards")
    a, b, other = (rows[name] for name in ("000/spk/a", "000/spk/b", "nl/000/spk/a"))
    assert (a["text"], a["speaker"], a["snr"], a["seconds"]) == ("hello", "7", 12.5, 0.1)
    assert b["text"] == "before its sound"
    assert read_bytes(a["path"]) == MEMBERS["spk/a.flac"] and read_bytes(b["path"]) == MEMBERS["spk/b.wav"]
    assert read_bytes(other["path"]) == sound_bytes(3), "keys may begin anew in each tar"
    assert [(p.source, p.reason) for p in problems] == [
        (f"{tmp_path}/shards/000.tar:spk/c", "missing_key"),
        (f"{tmp_path}/shards/000.tar:spk/d", "missing_file"),
        (f"{tmp_path}/shards/000.tar:spk/e", "unreadable_row"),
    ]


def test_a_tar_that_is_cut_off_gives_what_is_before_the_cut(tmp_path):
    whole = tar(tmp_path / "whole.tar", {f"{n}.wav": sound_bytes(n, "WAV") for n in range(5)}).read_bytes()
    put(tmp_path / "cut.tar", whole[: 2 * len(whole) // 5])
    found = read_manifests([], [CorpusSection(layout="webdataset", uri=str(tmp_path / "cut.tar"))])
    kept = [row["id"] for row in found.rows]
    assert 1 <= len(kept) < 5 and kept == [str(n) for n in range(len(kept))]
    assert found.problems
    # 512 bytes of header, then the sound: tarfile takes such a header for the end.
    third = whole.index(b"3.wav\0")
    for damaged in (whole[:third] + b"?" * 512 + whole[third + 512 :], whole[: third + 100]):
        put(tmp_path / "cut.tar", damaged)
        rows, (problem,) = rows_of("webdataset", tmp_path / "cut.tar")
        assert (list(rows), problem.source) == (["0", "1", "2"], f"{tmp_path}/cut.tar:2")
        assert f"byte {third} " in problem.detail
    put(tmp_path / "cut.tar", whole.rstrip(b"\0") + bytes(512 - len(whole.rstrip(b"\0")) % 512))
    rows, problems = rows_of("webdataset", tmp_path / "cut.tar")
    assert len(rows) == 5 and not problems, "some writers leave the zeros out"
    put(tmp_path / "packed.tar.gz", gzip.compress(whole))
    with pytest.raises(ManifestError, match="gunzip it first"):
        rows_of("webdataset", tmp_path / "packed.tar.gz")


def sounds_table(**columns: Any) -> pa.Table:
    sounds = [{"bytes": sound_bytes(n), "path": None} for n in range(5)] + [{"bytes": None, "path": "beside.wav"}]
    return pa.table({"audio": sounds, "sentence": [f"text {n}" for n in range(6)]} | columns)


def check_sounds(rows: dict[str, dict], folder: Path) -> None:
    put(folder / "beside.wav", sound_bytes(9, "WAV"))
    read_back = [read_bytes(rows[name]["path"]) for name in sorted(rows)]
    assert read_back == [*(sound_bytes(n) for n in range(5)), sound_bytes(9, "WAV")]
    assert [rows[name]["text"] for name in sorted(rows)] == [f"text {n}" for n in range(6)]


def test_parquet(tmp_path):
    pq.write_table(sounds_table(), tmp_path / "train-00000-of-00001.parquet", row_group_size=2)
    rows, problems = rows_of("parquet", tmp_path)
    assert not problems and {row["split"] for row in rows.values()} == {"train"}
    check_sounds(rows, tmp_path)
    (tmp_path / "fr").mkdir()
    pq.write_table(sounds_table().slice(0, 5), tmp_path / "fr/train-00000-of-00001.parquet")
    rows, _ = rows_of("parquet", tmp_path)
    assert (len(rows), min(rows)) == (11, "fr/train-00000-of-00001-00000001")
    # As the hub names its files: what is for validation must not be learnt from.
    (tmp_path / "hub").mkdir()
    pq.write_table(sounds_table(), tmp_path / "hub/validation-00000-of-00001.parquet")
    rows, _ = rows_of("parquet", tmp_path / "hub")
    assert {row["split"] for row in rows.values()} == {"valid"}
    table = pa.table({"wav": [sound_bytes(1, "WAV")], "id": ["mine"]})
    pq.write_table(table, tmp_path / "plain.parquet")
    rows, _ = rows_of("parquet", tmp_path / "plain.parquet", prefix="p/")
    assert read_bytes(rows["p/mine"]["path"]) == sound_bytes(1, "WAV")
    pq.write_table(table.select(["wav"]), tmp_path / "plain.parquet")
    assert set(rows_of("parquet", tmp_path / "plain.parquet")[0]) == {"plain-00000001"}
    pq.write_table(table.select(["id"]), tmp_path / "plain.parquet")
    with pytest.raises(ManifestError, match=r"no column of sounds.*'id'"):
        rows_of("parquet", tmp_path / "plain.parquet")


def saved_to_disk(folder: Path, table: pa.Table, batch: int = 4, **options: Any) -> Path:
    """As `datasets.Dataset.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(folder / name, table.schema, **options) as stream:
        stream.write_table(table, max_chunksize=batch)
    put(folder / "state.json", json.dumps({"_data_files": [{"filename": name}], "_split": "train"}))
    put(folder / "dataset_info.json", "{}")
    return folder


def test_huggingface(tmp_path):
    put(tmp_path / "ds/dataset_dict.json", '{"splits": ["train", "validation"]}')
    folder = saved_to_disk(tmp_path / "ds/train", sounds_table())
    saved_to_disk(tmp_path / "ds/validation", sounds_table())
    rows, problems = rows_of("huggingface", tmp_path / "ds")
    assert not problems
    assert min(rows) == "train/data-00000-of-00001-00000001"
    assert [row["split"] for _, row in sorted(rows.items())] == ["train"] * 6 + ["valid"] * 6
    check_sounds({name: row for name, row in rows.items() if row["split"] == "train"}, folder)
    packed = saved_to_disk(tmp_path / "packed", sounds_table(), options=pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(ManifestError, match="compressed Arrow"):
        rows_of("huggingface", packed)
    shard = folder / "data-00000-of-00001.arrow"
    put(shard, shard.read_bytes()[:-3000])
    rows, (problem,) = rows_of("huggingface", folder)
    assert len(rows) == 4 and problem.source == f"{shard}:5"
    shard.unlink()
    with pytest.raises(ManifestError, match="there is no such file"):
        rows_of("huggingface", folder)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_corpus_that_is_not_there_or_another_is_named(tmp_path, layout):
    with pytest.raises(ManifestError, match=r"gone: no such file or directory.*corpora\.sources"):
        rows_of(layout, tmp_path / "gone")
    put(tmp_path / "other/readme.md", "no corpus")
    with pytest.raises(ManifestError, match=str(tmp_path / "other")):
        rows_of(layout, tmp_path / "other")


def test_tars_and_tables_are_asked_for_again_where_the_store_fails(tmp_path, monkeypatch):
    store = FailingStore(tmp_path)
    monkeypatch.setattr(patience, "_PAUSES", (0.0,) * 8)
    monkeypatch.setattr(buckets, "filesystem", lambda uri: store)
    tar(tmp_path / "b/a.tar", {"a.wav": sound_bytes(1, "WAV")})
    pq.write_table(sounds_table().slice(0, 2), tmp_path / "b/a.parquet")
    for layout, count in (("webdataset", 1), ("parquet", 2)):
        files = [FileFact("s3://b/a.tar", 0, 0), FileFact("s3://b/a.parquet", 0, 0)]
        assert len(list(LAYOUTS[layout]("s3://b", files))) == count
    assert min(store.opened.values()) > 1


def test_every_layout_reads_the_same_from_s3(tmp_path, s3_bucket):
    """And the manifest made of it is the same but for the addresses."""
    top = tmp_path / "corpora"
    put(top / "folder/a.wav", sound_bytes(1, "WAV"))
    put(top / "librispeech/dev-clean/1/2/1-2-3.flac", sound_bytes(2))
    put(top / "librispeech/dev-clean/1/2/1-2.trans.txt", "1-2-3 HELLO\n")
    put(top / "ljspeech/wavs/L.wav", sound_bytes(3, "WAV"))
    put(top / "ljspeech/metadata.csv", "L|hello|hello\n")
    put(top / "common-voice/test.tsv", "path\tsentence\nx.flac\thello\n")
    put(top / "common-voice/clips/x.flac", sound_bytes(4))
    put(top / "lhotse/audio/two.flac", sound_bytes(5, seconds=1.0, channels=2))
    put(top / "lhotse/cuts.jsonl", json.dumps(cut("c1", 0.25, 0.5)))
    tar(top / "webdataset/0.tar", {"a.wav": sound_bytes(6, "WAV"), "a.txt": b"hello"})
    (top / "parquet").mkdir()
    pq.write_table(sounds_table().slice(0, 5), top / "parquet/0.parquet")
    saved_to_disk(top / "huggingface", sounds_table().slice(0, 5))
    remote = Workspace(f"s3://{s3_bucket}/corpora")
    for file in sorted(top.rglob("*")):
        if file.is_file():
            remote.write_bytes(file.relative_to(top).as_posix(), file.read_bytes())

    def manifest(base: str) -> list[dict]:
        sources = [CorpusSection(layout=name, uri=f"{base}/{name}", prefix=f"{name}/") for name in LAYOUTS]  # type: ignore[arg-type]
        found = read_manifests([], sources)
        assert not found.problems
        return [row | {"path": row["path"].removeprefix(base)} for row in found.rows]

    local = manifest(str(top))
    assert {row["id"].partition("/")[0] for row in local} == set(LAYOUTS)
    assert {row["rate"] for row in local} == {RATE} and all(row["seconds"] > 0.09 for row in local)
    assert manifest(remote.path()) == local
