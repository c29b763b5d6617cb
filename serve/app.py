"""What is deployed: builders for `serve run serve.app:build`, for Serve config files, and for `speechgpt serve`."""

import os

from pydantic import BaseModel, ConfigDict
from ray.serve import Application

from serve.bundles import ENCODER, LANGUAGE_MODEL, VOCODER, Source, find, required_signers
from serve.encoder import Encoder
from serve.gateway import Gateway, Target
from serve.keys import KEY_VARIABLE, KEYS_VARIABLE, hash_key
from serve.language import LanguageModel
from serve.scaling import deployment
from serve.vocoder import VocoderDeployment
from speechgpt import recipe
from speechgpt.recipe import Recipe
from speechgpt.runtime import files
from speechgpt.runtime.config import ServingSection


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
    return f"bundle-{source.digest[:12]}"


def bundle_application(source: Source, serving: ServingSection) -> Application:
    _, language, _ = _bundle(source, serving)
    return language


def gateway_application(source: Source, chosen: Recipe) -> Application:
    return _gateway(source, chosen, application_name(source))


def keys_address(serving: ServingSection) -> str:
    """Of the file of API keys: the recipe's, else the environment's, else ""."""
    address = serving.keys or os.environ.get(KEYS_VARIABLE, "")
    return files.absolute(address) if address else ""


def _read(arguments: Arguments) -> tuple[Recipe, Source]:
    chosen = recipe.load(arguments.recipe)
    return chosen, find(arguments.bundle, chosen.tracking.uri, required_signers(chosen.serving))


def _bundle(source: Source, serving: ServingSection) -> tuple[Application, Application, Application]:
    encoder = deployment(Encoder, ENCODER, serving.encoder, serving).bind(source, serving)
    vocoder = deployment(VocoderDeployment, VOCODER, serving.vocoder, serving).bind(source, serving)
    language = deployment(LanguageModel, LANGUAGE_MODEL, serving.language, serving).bind(
        source, serving, encoder, vocoder
    )
    return encoder, language, vocoder


def _gateway(source: Source, chosen: Recipe, application: str, *parts: Application) -> Application:
    key = os.environ.get(KEY_VARIABLE)
    target = Target(application=application, name=source.name, digest=source.digest, created=source.created)
    gateway = deployment(Gateway, "Gateway", chosen.serving.gateway, chosen.serving).options(user_config=target)
    serving = chosen.serving.model_copy(update={"keys": keys_address(chosen.serving)})
    return gateway.bind(serving, chosen.generation, hash_key(key) if key else None, *parts)
