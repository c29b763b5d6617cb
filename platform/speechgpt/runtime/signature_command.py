"""Sign bundles, and check who signed them."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help=__doc__)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Address = Annotated[str, typer.Argument(help="Directory or s3://….")]


@app.command()
def key(
    file: Annotated[Path, typer.Argument(help="Where the private key goes; keep it where only signers read.")],
    as_json: Json = False,
) -> None:
    """Make a key to sign with; shows its public half, for `serving.trusted_signers`."""
    from speechgpt.runtime import signature

    try:
        signer = signature.name(signature.new_private_key(file).public_key())
    except signature.SignatureError as error:
        raise _failed(error) from None
    typer.echo(json.dumps({"file": str(file), "signer": signer}) if as_json else signer)


@app.command()
def sign(
    bundle: Address,
    key: Annotated[Path, typer.Option(help="Private key, as `speechgpt signature key` made it.")],
    as_json: Json = False,
) -> None:
    """Check a bundle's every byte and put `bundle.sig` into it."""
    from speechgpt.runtime import signature
    from speechgpt.runtime.bundle import BundleError, sign
    from speechgpt.runtime.workspace import WorkspaceError

    try:
        signer, digest = sign(bundle, signature.private_key(key))
    except (signature.SignatureError, BundleError, WorkspaceError) as error:
        raise _failed(error) from None
    told = {"bundle": bundle, "digest": digest, "signer": signer}
    typer.echo(json.dumps(told) if as_json else f"{bundle} ({digest[:12]}) is signed by {signer}")


@app.command()
def verify(
    bundle: Annotated[str, typer.Argument(help="Directory, s3://…, models:/name@alias, or shipped name.")],
    signer: Annotated[list[str], typer.Option(help="Public key that is trusted: ed25519:…")],
    tracking_uri: Annotated[str, typer.Option(help="Of the registry, for models:/….")] = "",
    as_json: Json = False,
) -> None:
    """Check a bundle's every byte, and that one of the signers has signed it."""
    from speechgpt.runtime import signature
    from speechgpt.runtime.bundle import BundleError, load
    from speechgpt.runtime.tracking import TrackingError

    try:
        for trusted in signer:
            signature.public_key(trusted)
    except signature.SignatureError as error:
        raise typer.BadParameter(str(error), param_hint="--signer") from None
    try:
        opened = load(bundle, tracking_uri, signers=tuple(signer))
    except (BundleError, TrackingError) as error:
        raise _failed(error) from None
    told = {"bundle": bundle, "digest": opened.digest, "signer": opened.signer}
    typer.echo(json.dumps(told) if as_json else f"{bundle} ({opened.digest[:12]}) is signed by {opened.signer}")


def _failed(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)
