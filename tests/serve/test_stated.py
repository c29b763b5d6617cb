"""What comes of a Serve config file's two applications, by what the gateway that is there already goes by."""

from pathlib import Path
from typing import Any

import pytest
from ray.serve import Application

from serve import app
from serve.bundles import find
from serve.switch import Target, settled
from speechgpt.runtime.bundle import BundleError


@pytest.fixture
def arguments(tiny_bundle: Path) -> app.Arguments:
    return app.Arguments(bundle=str(tiny_bundle), recipe="tiny")


@pytest.fixture
def running(arguments: app.Arguments, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A gateway's target on another bundle than the stated one."""
    route = app.route(find(arguments.bundle, ""), "bundle-promoted")
    target = settled("tiny", {**route, "digest": "promoted"})
    target["stated"] = {"bundle": arguments.bundle, "address": arguments.bundle}
    monkeypatch.setattr(app, "gateway_target", lambda: target)
    monkeypatch.setattr(app, "deployments", lambda: {("bundle-promoted", "Encoder"), (app.STATED, "Encoder")})
    return target


def config(application: Application) -> Any:
    return application._bound_deployment._deployment_config


def test_the_first_gateway_goes_to_the_stated_bundle(arguments: app.Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "gateway_target", lambda: None)
    target = config(app.build_gateway(arguments)).user_config
    assert target["serving"] == app.route(find(arguments.bundle, ""), app.STATED)
    assert config(app.build_bundle(arguments)).autoscaling_config.min_replicas == 1


def test_built_again_the_gateway_keeps_its_target_and_the_bundle_rests(
    arguments: app.Arguments, running: Target
) -> None:
    running["watch"] = "a promotion that is under way"
    assert config(app.build_gateway(arguments)).user_config == running
    assert config(app.build_bundle(arguments)).autoscaling_config.min_replicas == 0


def test_another_statement_holds(arguments: app.Arguments, running: Target) -> None:
    running["stated"] = {"bundle": "models:/other@champion", "address": "models:/other/1"}
    assert config(app.build_gateway(arguments)).user_config["serving"]["application"] == app.STATED
    assert config(app.build_bundle(arguments)).autoscaling_config.min_replicas == 1


def test_a_promoted_bundle_that_is_gone_is_not_asked(arguments: app.Arguments, running: Target) -> None:
    running["serving"]["application"] = "bundle-gone"
    assert config(app.build_gateway(arguments)).user_config["serving"]["application"] == app.STATED


def test_a_bundle_that_is_no_longer_what_the_gateway_says_is_refused(arguments: app.Arguments, running: Target) -> None:
    running["serving"]["application"] = app.STATED
    with pytest.raises(BundleError, match="promote it, or shut Serve down"):
        app.build_bundle(arguments)
