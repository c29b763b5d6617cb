"""A bundle loads only if every byte of it is the one that was written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from speechgpt.runtime import bundle
from speechgpt.runtime.bundle import Bundle, BundleError
from speechgpt.runtime.workspace import Workspace


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / "parts" / name for name in ("encoder", "language", "vocoder", "adapter")}
    for name, folder in folders.items():
        (folder / "deep").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"part": name}))
        (folder / "deep" / "model.safetensors").write_bytes(name.encode() * 10)
    return folders


@pytest.fixture
def written(tmp_path: Path, parts: dict[str, Path]) -> Bundle:
    return bundle.write(tmp_path / "bundle", parts, {"name": "nano", "size": 500}, {"train-base": {"digest": "d"}})


def test_what_is_written_loads(written: Bundle) -> None:
    loaded = bundle.load(written.directory)
    assert loaded == written
    assert loaded.manifest["unit_vocabulary"] == {"name": "nano", "size": 500}
    assert loaded.manifest["lineage"] == {"train-base": {"digest": "d"}}
    assert loaded.manifest["versions"]["transformers"]
    assert len(loaded.manifest["files"]) == 8
    encoder = loaded.part("encoder")
    assert encoder is not None
    assert json.loads((encoder / "config.json").read_text()) == {"part": "encoder"}


def test_the_adapter_is_optional(tmp_path: Path, parts: dict[str, Path]) -> None:
    del parts["adapter"]
    bundle.write(tmp_path / "bundle", parts, {}, {})
    assert bundle.load(tmp_path / "bundle").part("adapter") is None


def test_the_digest_is_of_content_not_of_history(tmp_path: Path, parts: dict[str, Path], written: Bundle) -> None:
    again = bundle.write(tmp_path / "again", parts, {"name": "nano", "size": 500}, {"train-base": {"digest": "other"}})
    assert again.digest == written.digest
    other_units = bundle.write(tmp_path / "other", parts, {"name": "nano", "size": 501}, {})
    assert other_units.digest != written.digest


def test_every_single_byte_counts(written: Bundle) -> None:
    """Flip one bit in the middle of each file, the index among them."""
    files = sorted(file for file in written.directory.rglob("*") if file.is_file())
    assert len(files) == 9
    for file in files:
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(BundleError, match=file.relative_to(written.directory).as_posix()):
            bundle.load(written.directory)
        file.write_bytes(content)
    bundle.load(written.directory)


def _remove(directory: Path) -> None:
    (directory / "vocoder/config.json").unlink()


def _add(directory: Path) -> None:
    (directory / "vocoder/extra.bin").write_bytes(b"")


def _add_space(directory: Path) -> None:
    index = directory / "bundle.json"
    index.write_bytes(index.read_bytes() + b" ")


def _drop_index(directory: Path) -> None:
    (directory / "bundle.json").unlink()


def _edit_lineage(directory: Path) -> None:
    index = directory / "bundle.json"
    index.write_bytes(index.read_bytes().replace(b'"digest": "d"', b'"digest": "e"'))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_remove, "vocoder/config.json is missing"),
        (_add, "vocoder/extra.bin is not named"),
        (_add_space, "bundle.json was changed"),
        (_drop_index, "bundle.json is missing"),
        (_edit_lineage, "bundle.json was changed"),
    ],
)
def test_other_changes_are_named(written: Bundle, change: Callable[[Path], None], named: str) -> None:
    change(written.directory)
    with pytest.raises(BundleError, match=named):
        bundle.load(written.directory)


def test_a_part_that_would_be_unpickled_is_refused(tmp_path: Path, parts: dict[str, Path]) -> None:
    (parts["language"] / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"pytorch_model\.bin"):
        bundle.write(tmp_path / "bundle", parts, {}, {})


def test_missing_and_unknown_parts_are_named(tmp_path: Path, parts: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match="missing: vocoder"):
        bundle.write(tmp_path / "a", {name: folder for name, folder in parts.items() if name != "vocoder"}, {}, {})
    with pytest.raises(BundleError, match="speaker"):
        bundle.write(tmp_path / "b", {**parts, "speaker": tmp_path}, {}, {})


def test_a_name_that_is_nothing_says_what_would_be(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"s3://…, models:/name@alias or a shipped name"):
        bundle.load(str(tmp_path / "none"))


def test_from_s3_it_is_fetched_once_for_each_state(
    tmp_path: Path, s3_bucket: str, parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECHGPT_CACHE", str(tmp_path / "cache"))
    workspace = Workspace(f"s3://{s3_bucket}/run")

    def publish(size: int) -> Bundle:
        with workspace.stage("bundles/tiny") as folder:
            return bundle.write(folder, parts, {"size": size}, {})

    first = publish(500)
    address = workspace.path("bundles/tiny")
    loaded = bundle.load(address)
    assert loaded.digest == first.digest
    assert bundle.load(address).directory == loaded.directory
    second = publish(600)
    assert bundle.load(address).digest == second.digest != first.digest


def test_shipped_bundles_load() -> None:
    for name in bundle.shipped():
        assert bundle.load(name).part("vocoder")
