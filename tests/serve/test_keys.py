"""Row 1 of the matrix: keys are random, kept as hashes, compared whole, and change while a service runs."""

import asyncio
import json
import logging
import multiprocessing
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve import keys
from serve.keys import Allowance, Key, KeyFile, KeyRing, KeysError, change, hash_key, new_key, read
from serve.keys_command import app

NOW = 1_800_000_000.0


def kept_key(folder: Path, expires_seconds: float | None = None) -> tuple[str, Key, Path]:
    """A new key, what is kept of it, and the file that holds it alone."""
    token, kept = new_key("me", Allowance(), NOW, expires_seconds)
    file = folder / "keys.json"
    file.write_text(KeyFile(keys=(kept,)).model_dump_json())
    return token, kept, file


def found(ring: KeyRing, token: str) -> Key | None:
    return asyncio.run(ring.find(token))


def run(*arguments: str) -> dict:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_key_opens_and_nothing_like_it(tmp_path: Path) -> None:
    token, kept, file = kept_key(tmp_path)
    other, _ = new_key("you", Allowance(), NOW)
    ring = KeyRing(str(file), hash_key("sk-environment"), 60, lambda: NOW)
    assert found(ring, token) == kept
    assert found(ring, "sk-environment") is not None
    crossed = f"sk-{kept.id}-{other.rpartition('-')[2]}"
    for wrong in ("", "sk-", token[:-1], token + "A", token.upper(), other, crossed, kept.sha256, kept.id, "sk-é"):
        assert found(ring, wrong) is None


def test_a_key_ends_when_it_should(tmp_path: Path) -> None:
    token, kept, file = kept_key(tmp_path, expires_seconds=60)
    now = [NOW]
    ring = KeyRing(str(file), None, 1000, lambda: now[0])
    assert found(ring, token) == kept
    now[0] += 60
    assert found(ring, token) is None


def test_a_file_that_breaks_leaves_the_keys_as_they_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token, kept, file = kept_key(tmp_path)
    ring = KeyRing(str(file), None, 0, lambda: NOW)
    file.write_text('{"format": 1, "keys": [')
    with caplog.at_level(logging.ERROR, "ray.serve"):
        assert found(ring, token) == kept
    assert "keys.json" in caplog.text and kept.sha256 not in caplog.text
    file.write_text(KeyFile().model_dump_json())
    assert found(ring, token) is None
    with pytest.raises(KeysError, match="speechgpt keys add"):
        KeyRing(str(tmp_path / "none.json"), None, 1)


def test_nobody_comes_in_by_a_revoked_key_while_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, kept, file = kept_key(tmp_path)
    now = [NOW]
    ring = KeyRing(str(file), None, 10, lambda: now[0])
    now[0] += 10
    file.write_text(KeyFile().model_dump_json())
    reads = []

    def slowly(address: str) -> KeyFile:
        reads.append(time.sleep(0.2))
        return read(address)

    async def crowd() -> list[Key | None]:
        return await asyncio.gather(*(ring.find(token) for _ in range(8)))

    monkeypatch.setattr(keys, "read", slowly)
    assert asyncio.run(crowd()) == [None] * 8 and len(reads) == 1


def test_a_store_that_does_not_answer_keeps_nobody_waiting_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, kept, file = kept_key(tmp_path)
    ring = KeyRing(str(file), None, 0, lambda: NOW)
    answered = threading.Event()

    def never(address: str) -> KeyFile:
        answered.wait(30)
        return read(address)

    async def one_after_the_other() -> float:
        began = time.monotonic()
        for _ in range(20):
            assert await ring.find(token) == kept
        waited = time.monotonic() - began
        answered.set()
        return waited

    monkeypatch.setattr(keys, "read", never)
    assert asyncio.run(one_after_the_other()) < 5, "a second once, not for each"


def test_the_verb_shows_a_key_once_and_keeps_its_hash(tmp_path: Path) -> None:
    file = str(tmp_path / "deep" / "keys.json")
    made = run("add", "phone app", "--file", file, "--requests-per-minute", "60", "--expires-in", "30d")
    token, text = made["key"], Path(file).read_text()
    assert token not in text and token.rpartition("-")[2] not in text and hash_key(token) in text
    assert made["allowance"]["requests_per_minute"] == 60 and made["expires"] - made["created"] == 30 * 86_400
    assert Path(file).stat().st_mode & 0o777 == 0o600
    plain = CliRunner().invoke(app, ["add", "second"], env={"SPEECHGPT_API_KEYS": file})
    second = plain.stdout.strip()
    [first_kept, second_kept] = read(file).keys
    assert second_kept.sha256 == hash_key(second) and first_kept.id == made["id"]
    listed = run("list", "--file", file)
    assert [(key["name"], key["state"]) for key in listed["keys"]] == [("phone app", "valid"), ("second", "valid")]
    assert "sha256" not in listed["keys"][0]
    ring = KeyRing(file, None, 0)
    assert run("revoke", made["id"], "--file", file)["state"] == "revoked"
    assert found(ring, token) is None and found(ring, second) == second_kept
    table = CliRunner().invoke(app, ["list", "--file", file]).stdout
    assert "revoked" in table and "requests_per_minute 60" in table and "no limits" in table


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["revoke", "abcdef012345"], 1, "no key 'abcdef012345'"),
        (["list"], 1, "no such file"),
        (["add", "me", "--expires-in", "soon"], 2, "30d"),
        (["add", "me", "--requests-per-minute", "0"], 2, "--requests-per-minute"),
    ],
)
def test_the_verb_says_what_is_wrong(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    result = CliRunner().invoke(app, [*arguments, "--file", str(tmp_path / "keys.json")], env={"COLUMNS": "200"})
    assert result.exit_code == code and words in result.stderr


def _add(file: str, name: str) -> None:
    _, key = new_key(name, Allowance(), NOW)
    change(file, lambda found: KeyFile(keys=(*found.keys, key)))


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    writers = [multiprocessing.get_context("fork").Process(target=_add, args=(file, str(n))) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert {key.name for key in read(file).keys} == {str(n) for n in range(8)}


def test_a_bucket_does_as_well(s3_bucket: str) -> None:
    file = f"s3://{s3_bucket}/secrets/keys.json"
    made = run("add", "phone app", "--file", file)
    ring = KeyRing(file, None, 0)
    assert found(ring, made["key"]) is not None
    run("revoke", made["id"], "--file", file)
    assert found(ring, made["key"]) is None
    with pytest.raises(KeysError, match="no such file"):
        read(f"s3://{s3_bucket}/none.json")
