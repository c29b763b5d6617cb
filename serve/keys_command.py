"""Keys of a service: make, list and revoke them."""

import json
import re
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from serve.keys import KEYS_VARIABLE, Allowance, Key, KeyFile, KeysError, change, new_key, read

app = typer.Typer(no_args_is_help=True, help=__doc__)

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

File = Annotated[
    str, typer.Option("--file", envvar=KEYS_VARIABLE, show_default=False, help="File of the keys: a path or s3://….")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is; for people, shown by `list`.")],
    file: File,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    concurrent_requests: Annotated[int | None, typer.Option(min=1, help="Requests and sessions at a time.")] = None,
    audio_seconds_per_day: Annotated[float | None, typer.Option(min=0.001, help="Seconds of sound to hear.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(min=1, help="Tokens of prompts and answers.")] = None,
    expires_in: Annotated[str | None, typer.Option(help="30d, 12h, 45m or 90s; left out, it does not expire.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key and show it, this once; running services know it within seconds."""
    allowance = Allowance(
        requests_per_minute=requests_per_minute,
        concurrent_requests=concurrent_requests,
        audio_seconds_per_day=audio_seconds_per_day,
        tokens_per_day=tokens_per_day,
    )
    token, key = new_key(name, allowance, time.time(), _seconds(expires_in))
    _changed(file, lambda found: KeyFile(keys=(*found.keys, key)))
    if as_json:
        typer.echo(json.dumps({**_told(key), "key": token}))
        return
    typer.echo(token)
    typer.echo(f"key {key.id} for {name} is in {file}, as its hash; this is the only time that it is shown", err=True)


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(help="As `list` shows it: the part after `sk-`.")],
    file: File,
    as_json: Json = False,
) -> None:
    """Close the service to a key; running services know it within seconds. What has begun is finished."""

    def mark(found: KeyFile) -> KeyFile:
        if not any(key.id == id for key in found.keys):
            raise KeysError(f"keys {file}: there is no key {id!r}; `speechgpt keys list` shows those there are")
        now = int(time.time())
        revoked = (
            key.model_copy(update={"revoked": now}) if key.id == id and key.revoked is None else key
            for key in found.keys
        )
        return KeyFile(keys=tuple(revoked))

    changed = _changed(file, mark)
    [key] = [key for key in changed.keys if key.id == id]
    typer.echo(json.dumps(_told(key)) if as_json else f"key {id} of {key.name} opens nothing any more")


@app.command("list")
def list_keys(file: File, as_json: Json = False) -> None:
    """The keys there are: whose, since when, and what they may."""
    try:
        keys = read(file).keys
    except KeysError as error:
        raise _failed(error) from None
    if as_json:
        typer.echo(json.dumps({"keys": [_told(key) for key in keys]}))
        return
    for key in keys:
        limits = [f"{name} {value:g}" for name, value in key.allowance.model_dump(exclude_none=True).items()]
        typer.echo(f"{key.id}  {_state(key):<8}  {_day(key.created)}  {key.name}  {', '.join(limits) or 'no limits'}")


def _changed(file: str, edit: Any) -> KeyFile:
    try:
        return change(file, edit)
    except KeysError as error:
        raise _failed(error) from None


def _failed(error: KeysError) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)


def _told(key: Key) -> dict[str, Any]:
    """Without the hash: a list of keys is no place for it."""
    return {**key.model_dump(exclude={"sha256"}), "state": _state(key)}


def _state(key: Key) -> str:
    if key.revoked is not None:
        return "revoked"
    return "valid" if key.valid(time.time()) else "expired"


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _seconds(duration: str | None) -> float | None:
    if duration is None:
        return None
    match = re.fullmatch(r"(\d+)([smhd])", duration)
    if match is None or not int(match[1]):
        raise typer.BadParameter(f"{duration!r}: a number and s, m, h or d, such as 30d", param_hint="--expires-in")
    return int(match[1]) * _UNITS[match[2]]
