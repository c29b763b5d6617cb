"""What is deployed: a gateway and a bundle, each an application, by builders for Serve config files (`speechgpt cluster
render`) and for `speechgpt serve`; or both as one, for `serve run serve.app:build`.

What a config file states is what a service starts with. From then on promotions say what serves: whenever Serve builds
the gateway again (a config that is deployed once more, a controller that is new), it goes by what it went by.
"""

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
from serve.records import GATEWAY, deployments, gateway_target
from serve.scaling import deployment
from serve.switch import Route, Stated, Target, settled
from serve.vocoder import VocoderDeployment
from speechgpt import recipe
from speechgpt.recipe import Recipe
from speechgpt.runtime import files
from speechgpt.runtime.bundle import BundleError
from speechgpt.runtime.config import DeploymentSection, ServingSection
from speechgpt.runtime.manifests import STATED

BUNDLES = "bundle-"
"""What the names of bundles' applications begin with."""


class Arguments(BaseModel):
    """Of the builders: `args` in a Serve config, `serve run serve.app:build bundle=nano recipe=nano`."""

    model_config = ConfigDict(extra="forbid")
    bundle: str = "nano"
    """A directory, `s3://…`, `models:/name@alias` or a shipped name."""
    recipe: str = "nano"
    """Whose `serving` and `generation` sections hold."""


def build(arguments: Arguments) -> Application:
    """Gateway and bundle as one application, all that `serve run` can name; no promotion changes its bundle."""
    chosen = recipe.load(arguments.recipe)
    source = _find(arguments.bundle, chosen)
    return _gateway(chosen, settled(source.name, route(source, "")), bundle_application(source, chosen.serving))


def build_bundle(arguments: Arguments) -> Application:
    """The bundle's three deployments, for the application `STATED`; no route of its own. Raises BundleError."""
    chosen, running = recipe.load(arguments.recipe), _running(arguments)
    # The version that the gateway knows, not what an alias has come to name: it says in each reply which one answers.
    source = _find(running["stated"]["address"] if running else arguments.bundle, chosen)
    serving = chosen.serving
    if running and running["serving"]["application"] != STATED:
        # Another one was promoted to its place, so nobody asks this one, and it must not take what that one needs.
        idle = {
            name: section.model_copy(update={"min_replicas": 0})
            for name, section in serving
            if isinstance(section, DeploymentSection)
        }
        serving = serving.model_copy(update=idle)
    elif running and running["serving"]["digest"] != source.digest:
        raise BundleError(
            f"bundle {source.address} is now {source.digest[:12]}, but the gateway was deployed with "
            f"{running['serving']['digest'][:12]}: promote it, or shut Serve down and deploy again"
        )
    return bundle_application(source, serving)


def build_gateway(arguments: Arguments) -> Application:
    """The gateway alone, for the application `STATED` or whichever a promotion has put in its place."""
    chosen, target = recipe.load(arguments.recipe), _running(arguments)
    if target is None:
        source = _find(arguments.bundle, chosen)
        target = settled(source.name, route(source, STATED))
        target["stated"] = Stated(bundle=arguments.bundle, address=source.address)
    return _gateway(chosen, target)


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

    def part(cls: type, name: str, section: DeploymentSection) -> Deployment:
        return deployment(cls, name, section, serving, runtime_env, replicas(name))

    encoder = part(Encoder, ENCODER, serving.encoder).bind(source, serving)
    vocoder = part(VocoderDeployment, VOCODER, serving.vocoder).bind(source, serving)
    return part(LanguageModel, LANGUAGE_MODEL, serving.language).bind(source, serving, encoder, vocoder)


def gateway_application(source: Source, chosen: Recipe) -> Application:
    return _gateway(chosen, settled(source.name, route(source, application_name(source))))


def same_gateway(settings: Settings, runtime_env: dict[str, Any], target: Target) -> Application:
    """A running gateway with another target: deployed over it with the runtime_env that it was deployed with, it
    restarts no replica."""
    section, serving = settings.serving.gateway, settings.serving
    gateway = deployment(Gateway, GATEWAY, section, serving, runtime_env).options(user_config=target)
    # A flag of Ray's own, for which it has no public name: with another version, all replicas would be replaced.
    gateway = gateway.options(version=settings.version, _internal=True)
    return gateway.bind(serving, settings.generation, settings.key_hash)


def keys_address(serving: ServingSection) -> str:
    """Of the file of API keys: the recipe's, else the environment's, else ""."""
    address = serving.keys or os.environ.get(KEYS_VARIABLE, "")
    return files.absolute(address) if address else ""


def _find(bundle: str, chosen: Recipe) -> Source:
    return find(bundle, chosen.tracking.uri, required_signers(chosen.serving))


def _running(arguments: Arguments) -> Target | None:
    """What the gateway that is deployed here goes by, if it was stated the same bundle and what it goes to is there."""
    target: Target | None = gateway_target()
    if target is None or target.get("stated", {}).get("bundle") != arguments.bundle:
        return None
    there = {application for application, _ in deployments()}
    return target if target["serving"]["application"] in there else None


def _gateway(chosen: Recipe, target: Target, *bundle: Application) -> Application:
    key = os.environ.get(KEY_VARIABLE)
    gateway = deployment(Gateway, GATEWAY, chosen.serving.gateway, chosen.serving).options(user_config=target)
    serving = chosen.serving.model_copy(update={"keys": keys_address(chosen.serving)})
    return gateway.bind(serving, chosen.generation, hash_key(key) if key else None, *bundle)
