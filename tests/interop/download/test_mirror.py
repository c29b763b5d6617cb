"""Mirrors: whose host is asked, and which addresses never are."""

from pathlib import Path

import pytest

from speechgpt.interop.mirror import AddressError, Mirror

ENCODER = "https://dl.fbaipublicfiles.com/hubert/model.pt"
HUB_FILE = "https://huggingface.co/fnlp/text2unit/resolve/main/text2unit.pt"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPEECHGPT_MIRROR", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


def test_a_mirror_takes_the_hosts_place() -> None:
    mirror = Mirror.of("https://mirror.example.org/models/")
    assert mirror.url(ENCODER) == "https://mirror.example.org/models/hubert/model.pt"
    assert mirror.url(HUB_FILE) == "https://mirror.example.org/models/fnlp/text2unit/resolve/main/text2unit.pt"
    assert Mirror.of(None).url(ENCODER) == ENCODER


def test_the_hubs_own_variable_is_for_its_files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org")
    mirror = Mirror.of(None)
    assert mirror.url(HUB_FILE) == "https://hub.example.org/fnlp/text2unit/resolve/main/text2unit.pt"
    assert mirror.url(ENCODER) == ENCODER


def test_the_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEECHGPT_MIRROR", "https://one.example.org")
    assert Mirror.of(None).address == "https://one.example.org"
    assert Mirror.of("https://two.example.org").address == "https://two.example.org"


@pytest.mark.parametrize("address", ["ftp://example.org", "https://", "/no/such/folder"])
def test_a_mirror_that_cannot_be_one(address: str) -> None:
    with pytest.raises(AddressError, match="mirror"):
        Mirror.of(address)


def test_plain_http_is_for_this_machine_and_the_named_mirror() -> None:
    mirror = Mirror.of("http://mirror.internal:8080/x")
    for url in ("https://example.org/a", "http://127.0.0.1:1/a", "http://[::1]/a", "http://localhost/a"):
        mirror.check(url)
    mirror.check("http://mirror.internal:8080/other")
    for url in ("http://mirror.internal/x", "http://example.org/a", "http://127.0.0.1.example.org/a", "https:///x"):
        with pytest.raises(AddressError):
            mirror.check(url)


def test_a_folder_is_looked_through_in_every_usual_layout(tmp_path: Path) -> None:
    mirror = Mirror.of(str(tmp_path))
    places = [place.relative_to(tmp_path) for place in mirror.candidates("mhubert", "model.pt", (ENCODER,))]
    assert places == [
        Path("mhubert/model.pt"),
        Path("dl.fbaipublicfiles.com/hubert/model.pt"),
        Path("hubert/model.pt"),
        Path("model.pt"),
    ]
