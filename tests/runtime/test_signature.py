"""A bundle is served only if somebody who is trusted has vouched for every byte of it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from speechgpt.runtime import bundle, signature
from speechgpt.runtime.bundle import BundleError
from speechgpt.runtime.config import ServingSection
from speechgpt.runtime.signature import SignatureError
from speechgpt.runtime.signature_command import app
from speechgpt.runtime.workspace import Workspace


@pytest.fixture
def written(tmp_path: Path) -> Path:
    parts = {name: tmp_path / "parts" / name for name in ("encoder", "language", "vocoder")}
    for name, folder in parts.items():
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(name.encode())
    bundle.write(tmp_path / "bundle", parts, {"size": 500}, {})
    return tmp_path / "bundle"


def run(*arguments: str) -> dict:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def made(tmp_path: Path, name: str) -> tuple[str, str]:
    """A private key's file, and its public half."""
    told = run("key", str(tmp_path / name))
    return told["file"], told["signer"]


def test_signed_by_the_one_who_is_trusted(tmp_path: Path, written: Path) -> None:
    key, signer = made(tmp_path, "release.pem")
    assert Path(key).stat().st_mode & 0o777 == 0o600
    with pytest.raises(BundleError, match="not signed"):
        bundle.load(written, signers=(signer,))
    assert run("sign", str(written), "--key", key)["signer"] == signer
    assert bundle.load(written, signers=("ed25519:" + "A" * 43 + "=", signer)).signer == signer
    assert bundle.load(written).signer is None
    assert run("verify", str(written), "--signer", signer)["digest"] == bundle.load(written).digest


def test_nobody_else_will_do(tmp_path: Path, written: Path) -> None:
    _, trusted = made(tmp_path, "release.pem")
    mallory, other = made(tmp_path, "mallory.pem")
    run("sign", str(written), "--key", mallory)
    with pytest.raises(BundleError, match=r"signed by ed25519:.* none is trusted"):
        bundle.load(written, signers=(trusted,))
    # Mallory's signature under the trusted name.
    [entry] = json.loads((written / signature.FILE).read_text())
    assert entry["signer"] == other
    (written / signature.FILE).write_text(json.dumps([entry | {"signer": trusted}]))
    with pytest.raises(BundleError, match="does not fit"):
        bundle.load(written, signers=(trusted,))
    result = CliRunner().invoke(app, ["verify", str(written), "--signer", trusted])
    assert result.exit_code == 1 and "does not fit" in result.stderr


def test_a_bundle_that_was_made_anew_is_not_the_signed_one(tmp_path: Path, written: Path) -> None:
    """Whoever can write the bundle can also reseal its index; only a signature shows it."""
    key, signer = made(tmp_path, "release.pem")
    run("sign", str(written), "--key", key)
    signed = (written / signature.FILE).read_bytes()
    parts = {name: tmp_path / "parts" / name for name in ("encoder", "language", "vocoder")}
    (parts["language"] / "model.safetensors").write_bytes(b"poison")
    poisoned = tmp_path / "poisoned"
    bundle.write(poisoned, parts, {"size": 500}, {})
    (poisoned / signature.FILE).write_bytes(signed)
    assert bundle.load(poisoned)
    with pytest.raises(BundleError, match="does not fit"):
        bundle.load(poisoned, signers=(signer,))
    (written / "language" / "model.safetensors").write_bytes(b"poison")
    with pytest.raises(BundleError, match=r"language/model\.safetensors was changed"):
        bundle.load(written, signers=(signer,))


def test_several_sign_and_one_signs_again(tmp_path: Path, written: Path) -> None:
    keys = [made(tmp_path, name) for name in ("a.pem", "b.pem")]
    for key, _ in [*keys, keys[0]]:
        run("sign", str(written), "--key", key)
    assert len(json.loads((written / signature.FILE).read_text())) == 2
    for _, signer in keys:
        assert bundle.load(written, signers=(signer,)).signer == signer


def test_in_a_bucket_and_signed_later(
    tmp_path: Path, written: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a node has downloaded before it was signed is not what it looks at afterwards."""
    monkeypatch.setenv("SPEECHGPT_CACHE", str(tmp_path / "cache"))
    address = f"s3://{s3_bucket}/bundle"
    with Workspace(f"s3://{s3_bucket}").stage("bundle") as folder:
        for file in written.rglob("*"):
            if file.is_file():
                target = folder / file.relative_to(written)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(file.read_bytes())
    key, signer = made(tmp_path, "release.pem")
    with pytest.raises(BundleError, match="not signed"):
        bundle.load(address, signers=(signer,))
    run("sign", address, "--key", key)
    assert bundle.load(address, signers=(signer,)).signer == signer


def test_a_key_is_not_overwritten_and_must_be_one(tmp_path: Path, written: Path) -> None:
    key, _ = made(tmp_path, "release.pem")
    again = CliRunner().invoke(app, ["key", key])
    assert again.exit_code == 1 and "not overwritten" in again.stderr
    (tmp_path / "text.pem").write_text("no key")
    for file in ("text.pem", "none.pem"):
        with pytest.raises(SignatureError, match=file):
            signature.private_key(tmp_path / file)
    absent = CliRunner().invoke(app, ["sign", str(tmp_path / "nowhere"), "--key", key])
    assert absent.exit_code == 1 and "no such directory" in absent.stderr
    (written / signature.FILE).write_text("{}")
    with pytest.raises(BundleError, match=r"signed by nobody|cannot be read"):
        bundle.load(written, signers=("ed25519:" + "A" * 43 + "=",))


def test_what_is_asked_for_must_be_possible() -> None:
    with pytest.raises(ValueError, match="trusted_signers"):
        ServingSection(require_signature=True)
    with pytest.raises(ValueError, match="ed25519:"):
        ServingSection(trusted_signers=("release",))
