"""`speechgpt serve`: a bundle behind OpenAI's API, on the cluster at RAY_ADDRESS or a private one."""

import ipaddress
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from serve.bundles import Source
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.config import ServingSection

GATEWAY = "gateway"


class ServeError(RuntimeError):
    """A service that must not or cannot be started; the message says what to do."""


def main(
    bundle: Annotated[str, typer.Argument(help="Directory, s3://…, models:/name@alias, or shipped name.")] = "nano",
    recipe: Annotated[str, typer.Option(help="Whose `serving` and `generation` sections hold.")] = "nano",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: serving.port=9000.")] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; others than loopback need keys (`speechgpt keys`).")
    ] = None,
    port: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Serve a bundle until Ctrl-C."""
    from rich.console import Console

    from serve.bundles import find, required_signers
    from speechgpt.recipe import RecipeError, load
    from speechgpt.runtime.bundle import BundleError
    from speechgpt.runtime.tracking import TrackingError

    console = Console(stderr=True)
    given = {"serving.host": host, "serving.port": port}
    overrides = (*(set_ or ()), *(f"{key}={value}" for key, value in given.items() if value is not None))
    try:
        chosen = load(recipe, overrides)
        check_address(chosen.serving.host, chosen.serving.port, has_keys=has_keys(chosen.serving))
        with console.status("checking the bundle"):
            source = find(bundle, chosen.tracking.uri, required_signers(chosen.serving))
        with console.status(f"starting {source.name} {source.digest[:12]}"):
            start(source, chosen)
    except (RecipeError, ServeError, BundleError, TrackingError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, RecipeError) else 1) from None
    told_to_stop = _on_signals()
    url = f"http://{chosen.serving.host}:{chosen.serving.port}"
    console.print(f"{source.name} ({source.digest[:12]}) is served at {url}/v1; talk to it at {url}/; Ctrl-C stops it")
    console.print(f"another bundle takes its place by `speechgpt promote BUNDLE --address {cluster_address()}`")
    told_to_stop.wait()
    with console.status("finishing what has begun"):
        stop(source)


def has_keys(serving: "ServingSection") -> bool:
    """Whether the service will be closed to those without a key. Raises ServeError for a file of keys that is wrong."""
    from serve.app import keys_address
    from serve.keys import KEY_VARIABLE, KeysError, read

    address = keys_address(serving)
    try:
        if address:
            read(address)
    except KeysError as error:
        raise ServeError(str(error)) from None
    return bool(address or os.environ.get(KEY_VARIABLE))


def check_address(host: str, port: int, *, has_keys: bool) -> None:
    """Raises ServeError for an address that strangers can reach while no key is asked for, and for one that is taken.

    Ray's proxy would share a taken port with whoever has it.
    """
    from serve.keys import KEY_VARIABLE, KEYS_VARIABLE

    if not _is_loopback(host) and not has_keys:
        raise ServeError(
            f"host {host} can be reached from other machines: make keys with `speechgpt keys add` and name "
            f"their file in serving.keys or {KEYS_VARIABLE}, set {KEY_VARIABLE}, or use --host 127.0.0.1"
        )
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1" if _is_any(host) else host, port)) == 0:
            raise ServeError(f"port {port} of {host} is taken: choose another with --port")


def start(source: "Source", chosen: "Recipe") -> None:
    """Returns when every deployment is warm. Raises ServeError."""
    from ray import serve

    from serve import app, traces
    from serve.vllm_engine import VllmMissingError, check_installed
    from speechgpt.runtime import proxies
    from speechgpt.runtime.cluster import connect

    serving = chosen.serving
    if serving.language.engine == "vllm":
        try:
            check_installed()
        except VllmMissingError as error:
            raise ServeError(str(error)) from None
    try:
        tracing = traces.configured(serving.traces)
    except traces.ExporterMissingError as error:
        raise ServeError(str(error)) from None
    connect(chosen.resources)
    if GATEWAY not in serve.status().applications:
        # What a service that came to an unclean end has left.
        _remove_bundles(but=app.application_name(source))
    serve.start(
        http_options={"host": serving.host, "port": serving.port, "request_timeout_s": serving.request_timeout_seconds},
        controller_options={"runtime_env": {"env_vars": proxies.environment(serving)}},
        tracing_config=tracing,
    )
    try:
        serve.run(app.bundle_application(source, serving), name=app.application_name(source), route_prefix=None)
        serve.run(app.gateway_application(source, chosen), name=GATEWAY, route_prefix="/")
    except RuntimeError as error:
        raise ServeError(f"the deployments did not start: {error}") from error


def cluster_address() -> str:
    """Where other processes find the Ray cluster that this one is in."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def stop(source: "Source") -> None:
    """End the gateway, and with it `source` or whichever bundle has taken its place; each replica finishes its requests
    first. A private cluster ends with this process."""
    from ray import serve

    from serve import app

    serve.delete(GATEWAY)
    serve.delete(app.application_name(source))
    _remove_bundles()


def _remove_bundles(but: str = "") -> None:
    from ray import serve

    from serve import app

    for name in serve.status().applications:
        if name.startswith(app.BUNDLES) and name != but:
            serve.delete(name)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_any(host: str) -> bool:
    return host in ("0.0.0.0", "::", "")


def _on_signals() -> threading.Event:
    """Set by SIGINT or SIGTERM from now on."""
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    return told
