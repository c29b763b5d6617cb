"""What is deployed: builders for `serve run serve.app:build`, for Serve config files, and for `speechgpt serve`."""

import os
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray.serve import Application, Deployment

from serve.bundles import ENCODER, LANGUAGE_MODEL, VOCODER, Source, find, required_signers
from serve.encoder import Encoder
from serve.gateway import Gateway, Settings
from serve.keys import KEY_VARIABLE, KEYS_VARIABLE, hash_key
from serve.language import LanguageModel
from serve.scaling import deployment
from serve.switch import Route, Target, settled
from serve.vocoder import VocoderDeployment
from speechgpt import recipe
from speechgpt.recipe import Recipe
from speechgpt.runtime import files
from speechgpt.runtime.config import DeploymentSection, ServingSection

BUNDLES = "bundle-"
"""What the names of bundles' applications begin with."""


class Arguments(BaseModel):
    """Of the builders: `serve run serve.app:build bundle=nano recipe=nano`."""

    model_config = ConfigDict(extra="forbid")
    bundle: str = "nano"
    """A directory, `s3://…`, `models:/name@alias` or a shipped name."""
    recipe: str = "nano"
    """Whose `serving` and `generation` sections hold."""


def build(arguments: Arguments) -> Application:
    """Gateway and bundle as one application, which is all that `serve run` can name."""
    chosen, source = _read(arguments)
    parts = _bundle(source, chosen.serving)
    return _gateway(source, chosen, "", *parts)


def build_bundle(arguments: Arguments) -> Application:
    """The bundle's three deployments; no route of its own."""
    chosen, source = _read(arguments)
    return bundle_application(source, chosen.serving)


def build_gateway(arguments: Arguments) -> Application:
    """The gateway alone, for the application that `application_name` names."""
    chosen, source = _read(arguments)
    return gateway_application(source, chosen)


def application_name(source: Source) -> str:
    return f"{BUNDLES}{source.digest[:12]}"


def route(source: Source, application: str) -> Route:
    adapters = list(source.adapters)
    return Route(application=application, digest=source.digest, created=source.created, adapters=adapters)


def bundle_application(
    source: Source,
    serving: ServingSection,
    runtime_env: dict[str, Any] | None = None,
    replicas: Callable[[str], int] = lambda part: 0,
) -> Application:
    """runtime_env: of its replicas, else that of the process which deploys it. replicas: how many of each part it
    begins with, within its limits."""
    _, language, _ = _bundle(source, serving, runtime_env, replicas)
    return language


def gateway_application(source: Source, chosen: Recipe) -> Application:
    return _gateway(source, chosen, application_name(source))


def same_gateway(settings: Settings, runtime_env: dict[str, Any], target: Target) -> Application:
    """A running gateway with another target: deployed over it with the runtime_env that it was deployed with, it
    restarts no replica."""
    section, serving = settings.serving.gateway, settings.serving
    gateway = deployment(Gateway, "Gateway", section, serving, runtime_env).options(user_config=target)
    # A flag of Ray's own, for which it has no public name: with another version, all replicas would be replaced.
    gateway = gateway.options(version=settings.version, _internal=True)
    return gateway.bind(serving, settings.generation, settings.key_hash)


def keys_address(serving: ServingSection) -> str:
    """Of the file of API keys: the recipe's, else the environment's, else ""."""
    address = serving.keys or os.environ.get(KEYS_VARIABLE, "")
    return files.absolute(address) if address else ""


def _read(arguments: Arguments) -> tuple[Recipe, Source]:
    chosen = recipe.load(arguments.recipe)
    return chosen, find(arguments.bundle, chosen.tracking.uri, required_signers(chosen.serving))


def _bundle(
    source: Source,
    serving: ServingSection,
    runtime_env: dict[str, Any] | None = None,
    replicas: Callable[[str], int] = lambda part: 0,
) -> tuple[Application, Application, Application]:
    def part(cls: type, name: str, section: DeploymentSection) -> Deployment:
        return deployment(cls, name, section, serving, runtime_env, replicas(name))

    encoder = part(Encoder, ENCODER, serving.encoder).bind(source, serving)
    vocoder = part(VocoderDeployment, VOCODER, serving.vocoder).bind(source, serving)
    language = part(LanguageModel, LANGUAGE_MODEL, serving.language).bind(source, serving, encoder, vocoder)
    return encoder, language, vocoder


def _gateway(source: Source, chosen: Recipe, application: str, *parts: Application) -> Application:
    key = os.environ.get(KEY_VARIABLE)
    target = settled(source.name, route(source, application))
    gateway = deployment(Gateway, "Gateway", chosen.serving.gateway, chosen.serving).options(user_config=target)
    serving = chosen.serving.model_copy(update={"keys": keys_address(chosen.serving)})
    return gateway.bind(serving, chosen.generation, hash_key(key) if key else None, *parts)
