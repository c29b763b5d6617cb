"""The table of published files: complete, well-formed, and honest about what is not known."""

import re
from collections import Counter

import pytest
from pydantic import ValidationError

from speechgpt.interop.published import PublishedFile, UnknownArtefact, find, table

HASH = "0" * 64


def test_everything_that_the_published_system_needs_is_there() -> None:
    wanted = {"mhubert", "mhubert-kmeans", "unit-hifigan", "text2unit", "speechinstruct-chain"}
    wanted |= {"speechinstruct-cross-modal", "llama-7b"} | {f"speechgpt-7b-{stage}" for stage in ("ma", "cm", "com")}
    assert wanted <= set(table())


def test_every_entry_says_its_terms_and_has_each_file_once() -> None:
    addresses: Counter[str] = Counter()
    for name, artefact in table().items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert artefact.licence and artefact.terms and artefact.title
        names = [file.name for file in artefact.files]
        assert len(names) == len(set(names))
        for file in artefact.files:
            addresses.update(file.urls)
            assert not any("{" in url for url in file.urls)
    assert addresses and set(addresses.values()) == {1}


def test_the_licensed_base_is_not_handed_on() -> None:
    assert find("llama-7b").files == ()


def test_names_are_found_whatever_their_case_and_others_are_listed() -> None:
    assert find("SpeechGPT-7B-cm").files
    with pytest.raises(UnknownArtefact, match="mhubert-kmeans"):
        find("hubert")


@pytest.mark.parametrize(
    "wrong",
    [
        {"urls": ["http://example.org/x"]},
        {"urls": []},
        {"name": "../x"},
        {"name": "/x"},
        {"name": ".x"},
        {"sha256": HASH},
        {"sha256": HASH[1:], "sha256_from": "somebody"},
        {"bytes": 3},
        {"sha265": HASH},
    ],
)
def test_a_wrong_row_is_refused(wrong: dict[str, object]) -> None:
    right = {"name": "x", "urls": ["https://example.org/{name}"]}
    assert PublishedFile.model_validate(right).urls == ("https://example.org/x",)
    with pytest.raises(ValidationError):
        PublishedFile.model_validate(right | wrong)
