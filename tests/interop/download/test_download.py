"""`speechgpt download`: artefacts from mirrors and folders, what a second run does, and what is said."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from speechgpt.interop import published
from speechgpt.interop.download import main
from speechgpt.interop.published import Artefact

WEIGHTS, CONFIG = random.Random(0).randbytes(50_000), b'{"hop": 320}'
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two small artefacts instead of the real ones, and a cache of the test's own."""
    monkeypatch.delenv("SPEECHGPT_MIRROR", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("SPEECHGPT_CACHE", str(tmp_path / "cache"))
    facts = {"source": "https://example.org/", "licence": "MIT", "terms": "Be kind."}
    weights = {"name": "parts/g_1", "urls": ["https://example.org/v/g_1"], "sha256": SHA256, "sha256_from": "us"}
    config = {"name": "config.json", "urls": ["https://example.org/v/config.json"]}
    entries = {
        "vocoder": Artefact.model_validate({**facts, "title": "A vocoder", "files": [config, weights]}),
        "base": Artefact.model_validate({**facts, "title": "A base", "files": []}),
    }
    monkeypatch.setattr(published, "table", lambda: entries)


def download(*words: str | Path) -> Result:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture
def mirror(host: Any) -> Any:
    host.files.update({"/v/g_1": WEIGHTS, "/v/config.json": CONFIG})
    return host


def test_an_artefact_from_a_mirror(mirror: Any, tmp_path: Path) -> None:
    done = download("vocoder", "--to", tmp_path, "--mirror", mirror.url, "--json")
    assert done.exit_code == 0, done.output
    [artefact] = json.loads(done.stdout)["artefacts"]
    assert "MIT" in done.stderr and "Be kind." in done.stderr
    proofs = {file["name"]: (file["proof"], file["sha256"]) for file in artefact["files"]}
    assert proofs == {
        "config.json": ("none", hashlib.sha256(CONFIG).hexdigest()),
        "parts/g_1": ("published", SHA256),
    }
    folder = Path(artefact["directory"])
    assert folder == tmp_path / "vocoder"
    assert (folder / "parts" / "g_1").read_bytes() == WEIGHTS and (folder / "config.json").read_bytes() == CONFIG
    assert {file.name for file in folder.rglob("*") if file.is_file()} == {"g_1", "config.json", "download.json"}


def test_people_are_told_what_is_unverified(mirror: Any, tmp_path: Path) -> None:
    done = download("vocoder", "--to", tmp_path, "--mirror", mirror.url)
    assert "UNVERIFIED" in done.stdout and hashlib.sha256(CONFIG).hexdigest() in done.stdout
    assert "sha256 as published" in done.stdout


def test_a_second_run_asks_for_nothing(mirror: Any, tmp_path: Path) -> None:
    download("vocoder", "--to", tmp_path, "--mirror", mirror.url)
    mirror.asked.clear()
    done = download("vocoder", "--to", tmp_path, "--mirror", mirror.url, "--json")
    files = json.loads(done.stdout)["artefacts"][0]["files"]
    assert [(file["downloaded"], file["proof"]) for file in files] == [(False, "earlier"), (False, "published")]
    assert mirror.asked == []


@pytest.mark.parametrize("name", ["config.json", "parts/g_1"])
def test_a_file_that_was_changed_here_comes_anew(mirror: Any, tmp_path: Path, name: str) -> None:
    download("vocoder", "--to", tmp_path, "--mirror", mirror.url)
    changed = tmp_path / "vocoder" / name
    before = changed.read_bytes()
    changed.write_bytes(before + b" ")
    done = download("vocoder", "--to", tmp_path, "--mirror", mirror.url)
    assert done.exit_code == 0 and "not what was published" in done.stderr
    assert changed.read_bytes() == before


def test_what_was_brought_before_a_failure_stays(mirror: Any, tmp_path: Path) -> None:
    del mirror.files["/v/g_1"]
    done = download("vocoder", "--to", tmp_path, "--mirror", mirror.url, "--json")
    assert done.exit_code == 1 and "404" in done.stderr and done.stdout == ""
    assert (tmp_path / "vocoder" / "config.json").read_bytes() == CONFIG
    mirror.files["/v/g_1"] = WEIGHTS
    mirror.asked.clear()
    assert download("vocoder", "--to", tmp_path, "--mirror", mirror.url).exit_code == 0
    assert [path for path, _ in mirror.asked] == ["/v/g_1"]


def test_wrong_bytes_end_the_command(mirror: Any, tmp_path: Path) -> None:
    mirror.files["/v/g_1"] = b"x" * len(WEIGHTS)
    done = download("vocoder", "--to", tmp_path, "--mirror", mirror.url)
    assert done.exit_code == 1 and SHA256 in done.stderr and f"{mirror.url}/v/g_1" in done.stderr
    assert not [file for file in tmp_path.rglob("*") if "g_1" in file.name]


def test_the_environment_names_a_mirror(mirror: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPEECHGPT_MIRROR", mirror.url)
    done = download("vocoder", "--json")
    assert Path(json.loads(done.stdout)["artefacts"][0]["directory"]) == tmp_path / "cache" / "published" / "vocoder"


@pytest.mark.parametrize("layout", ["vocoder/{}", "example.org/v/{}", "v/{}", "{}"])
def test_an_artefact_from_a_folder(tmp_path: Path, layout: str) -> None:
    for name, content in (("config.json", CONFIG), ("parts/g_1", WEIGHTS)):
        name = name if layout in ("vocoder/{}", "{}") else Path(name).name
        place = tmp_path / "stick" / layout.format(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    done = download("vocoder", "--to", tmp_path / "here", "--mirror", tmp_path / "stick")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "here" / "vocoder" / "parts" / "g_1").read_bytes() == WEIGHTS


def test_wrong_and_missing_files_of_a_folder(tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    (stick / "config.json").write_bytes(CONFIG)
    missing = download("vocoder", "--to", tmp_path / "here", "--mirror", stick)
    assert missing.exit_code == 1 and str(stick / "v" / "g_1") in missing.stderr
    (stick / "g_1").write_bytes(WEIGHTS[:-1])
    (stick / "parts").mkdir()
    (stick / "parts" / "g_1").write_bytes(WEIGHTS[:-1])
    wrong = download("vocoder", "--to", tmp_path / "here", "--mirror", stick)
    assert wrong.exit_code == 1 and SHA256 in wrong.stderr
    assert not [file for file in (tmp_path / "here").rglob("*") if "g_1" in file.name]


def test_a_place_that_cannot_be_written_to(mirror: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = download("vocoder", "--to", tmp_path / "file", "--mirror", mirror.url)
    assert done.exit_code == 1 and "Not a directory" in done.stderr


def test_what_is_not_handed_on_says_what_to_do(tmp_path: Path) -> None:
    done = download("base", "--to", tmp_path)
    assert done.exit_code == 1 and "Be kind." in done.stderr


@pytest.mark.parametrize("words", [(), ("vocodr",), ("vocoder", "--mirror", "/no/such/folder")])
def test_wrong_usage(words: tuple[str, ...]) -> None:
    assert download(*words).exit_code == 2


def test_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    shown = download("--list")
    assert shown.exit_code == 0
    for name in published.table():
        assert name in shown.stdout
    assert set(json.loads(download("--list", "--json").stdout)) == set(published.table())
