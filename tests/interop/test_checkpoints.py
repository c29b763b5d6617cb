"""What torch, joblib and scikit-learn write is read as they would; what is damaged is named."""

import argparse
import io
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans

from speechgpt.interop.checkpoints import CheckpointError, RefusedCheckpointError, plain, read
from speechgpt.interop.pickles import Record


def content() -> dict[str, Any]:
    base = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    weights = OrderedDict(
        whole=base,
        part=base[1:3, ::2],
        turned=base.T,
        half=base.half(),
        brain=base.bfloat16(),
        long=torch.arange(7),
        flags=torch.tensor([True, False]),
        none=torch.zeros(0, 3),
        scalar=torch.tensor(2.5),
        parameter=torch.nn.Parameter(base[0].clone()),
    )
    weights._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return {
        "model": weights,
        "args": argparse.Namespace(arch="hubert", layers=[1, 2], nested={"a": (1, None)}),
        "score": np.float64(1.5),
        "table": np.arange(6, dtype=">i2").reshape(2, 3).T,
        "names": {"a", "b"},
        "big": 1 << 100,
        "bytes": b"\x00\xff",
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_is_read_as_torch_does(zipped: bool, protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save(content(), file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    theirs, ours = torch.load(file, weights_only=False), read(file)
    assert ours["model"].keys() == theirs["model"].keys()
    for name, tensor in theirs["model"].items():
        assert ours["model"][name].dtype == tensor.dtype
        assert torch.equal(ours["model"][name], tensor), name
    assert plain(ours["args"]) == {"arch": "hubert", "layers": [1, 2], "nested": {"a": [1, None]}}
    np.testing.assert_array_equal(ours["table"], theirs["table"])
    assert {key: ours[key] for key in ("score", "names", "big", "bytes")} == {
        key: theirs[key] for key in ("score", "names", "big", "bytes")
    }
    assert ours["model"]["whole"].data_ptr() == ours["model"]["turned"].data_ptr(), "shared storage was copied"


def test_a_tensor_may_be_changed_and_the_file_is_not(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"a": torch.ones(3)}, file)
    before = file.read_bytes()
    read(file)["a"].mul_(5)
    assert file.read_bytes() == before


@pytest.mark.parametrize("compress", [0, ("zlib", 1), ("gzip", 6), ("bz2", 3), ("lzma", 3), ("xz", 3)])
@pytest.mark.parametrize("kind", [MiniBatchKMeans, KMeans])
def test_a_joblib_model(kind: type, compress: Any, tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    model = kind(5, n_init=1, random_state=np.random.RandomState(0)).fit(points)
    joblib.dump(model, tmp_path / "km.bin", compress=compress)
    found = read(tmp_path / "km.bin")
    assert found.kind == f"sklearn.cluster._kmeans.{kind.__name__}"
    np.testing.assert_array_equal(found.state["cluster_centers_"], model.cluster_centers_)
    np.testing.assert_array_equal(found.state["labels_"], model.labels_)
    assert found.state["n_clusters"] == 5


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8", "?", "<U7", "<c8"])
def test_arrays_keep_type_order_and_sharing(dtype: str, order: str, tmp_path: Path) -> None:
    array = np.asarray(np.arange(12).reshape(3, 4) % 5, dtype=dtype, order=order)
    joblib.dump({"a": array, "empty": array[:0], "one": array[0, 0], "deep": [array.T]}, tmp_path / "a")
    found, theirs = read(tmp_path / "a"), joblib.load(tmp_path / "a")
    for ours, wanted in ((found["a"], array), (found["empty"], array[:0]), (found["deep"][0], theirs["deep"][0])):
        np.testing.assert_array_equal(ours, wanted)
        assert ours.dtype.kind == wanted.dtype.kind
    assert found["one"] == array[0, 0]


def test_other_classes_of_a_checkpoint_stay_records() -> None:
    held = Record("fairseq.data.dictionary.Dictionary", state={"symbols": ["<s>"]})
    assert plain({"task": held})["task"] is held


def test_a_configuration_within_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with pytest.raises(CheckpointError, match="nested too deeply"):
        plain(loop)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_off_anywhere_is_named(zipped: bool, tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(content(), stream, _use_new_zipfile_serialization=zipped)
    whole, file = stream.getvalue(), tmp_path / "cut.pt"
    for length in range(1, len(whole), 97):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as error:
            read(file)
        assert str(error.value).startswith(f"{file}: ")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_an_error_in_words_or_reads_as_something_else(zipped: bool, tmp_path: Path) -> None:
    """Whatever byte is wrong, the reader neither crashes nor raises anything but its own error."""
    stream = io.BytesIO()
    torch.save(
        {"model": {"a": torch.arange(5.0)}, "args": argparse.Namespace(x=1)},
        stream,
        _use_new_zipfile_serialization=zipped,
    )
    whole, file = stream.getvalue(), tmp_path / "damaged.pt"
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[int(draw.integers(len(whole)))] ^= int(draw.integers(1, 256))
        file.write_bytes(damaged)
        try:
            read(file)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_changed_weights_are_noticed_by_the_checksum(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"a": torch.full((1000,), 1.5)}, file)
    data = bytearray(file.read_bytes())
    data[data.index(b"\x00\x00\xc0\x3f" * 4) + 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checksum of '.*/data/0'"):
        read(file)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"RIFF\x24\0\0\0WAVE", "wav"),
        (b"\x93NUMPY\x01\0v\0", "numpy array"),
        (b"ZF0x10", "joblib file of a version before 0.10"),
        (b"\x04\x22\x4d\x18" + b"\0" * 20, "LZ4"),
        (struct.pack("<Q", 2) + b"{}" + b"\0" * 40, "safetensors"),
        (b"not a checkpoint", "no pickle"),
        (b"\x80\x02]q\x00.more", "4 bytes follow"),
        (b"\x78\x9cnonsense", "not zlib"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_checkpoint_is_told_apart(data: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "hubert.pt"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason):
        read(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pt: No such file"):
        read(tmp_path / "absent.pt")


def rezipped(tmp_path: Path, change: Any) -> Path:
    """A torch file whose entries `change` has had in hand: {name: bytes} -> [(name, bytes)]."""
    stream = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, stream)
    with zipfile.ZipFile(stream) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    file = tmp_path / "model.pt"
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in change(entries):
            archive.writestr(name, data)
    return file


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda e: e.items(), None, ""),
        (lambda e: [*e.items(), ("../../etc/cron.d/x", b"")], RefusedCheckpointError, "outside of it"),
        (lambda e: [*e.items(), ("/etc/passwd", b"")], RefusedCheckpointError, "outside of it"),
        (lambda e: [*e.items(), ("archive/data.pkl", b"N.")], RefusedCheckpointError, "two entries"),
        (lambda e: [*e.items(), ("archive/constants.pkl", b"N.")], CheckpointError, "TorchScript"),
        (lambda e: [i for i in e.items() if "/data/" not in i[0]], CheckpointError, "lacks archive/data/0"),
        (lambda e: [(n, d[:-4] if "/data/0" in n else d) for n, d in e.items()], CheckpointError, "with 12 bytes"),
        (lambda e: [(n, b"big" if "byteorder" in n else d) for n, d in e.items()], CheckpointError, "byte order"),
        (lambda e: [("word/document.xml", b"")], CheckpointError, "not torch's"),
        (
            lambda e: [(n, d.replace(b"X\x01\0\0\x000", b"X\x05\0\0\x00../..")) for n, d in e.items()],
            RefusedCheckpointError,
            r"name '\.\./\.\.'",
        ),
    ],
)
def test_archives_that_are_not_what_torch_writes(change: Any, error: Any, reason: str, tmp_path: Path) -> None:
    file = rezipped(tmp_path, change)
    if error is None:
        assert read(file)["a"].tolist() == [0, 1, 2, 3]
        return
    with pytest.raises(error, match=reason):
        read(file)


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"N." + b"\0" * (1 << 20))
    with pytest.raises(RefusedCheckpointError, match="compressed"):
        read(file)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("size", "stride", "offset"), [((1 << 40,), (0,), 0), ((5,), (1,), 0), ((2, 3), (3, 1), 0), ((4,), (1,), 1)]
)
def test_a_tensor_larger_than_its_storage_is_refused(size: Any, stride: Any, offset: int, tmp_path: Path) -> None:
    class Claim:
        def __reduce__(self) -> tuple:
            arguments = (torch.arange(4.0).storage(), offset, size, stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    torch.save({"a": Claim()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="in a storage of 4"):
        read(tmp_path / "model.pt")
