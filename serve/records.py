"""What the Serve controller of this cluster knows; Ray has no public calls for it. All of them block."""

from typing import TYPE_CHECKING, Any

import ray
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

if TYPE_CHECKING:
    from ray.serve._private.client import ServeControllerClient

GATEWAY = "Gateway"
"""Name of the gateway's deployment, in whatever application."""


def details() -> dict[str, Any]:
    """As `serve status` shows it, as JSON (`ray.serve.schema.ServeInstanceDetails`)."""
    return _client().get_serve_details()


def deployments() -> set[tuple[str, str]]:
    """(application, deployment) of all that there are. `serve.status` and `details` show none of an application while
    Serve builds it, be it again, with all its replicas at work."""
    from ray.serve.context import _get_global_client

    # A cluster that only trains has none.
    client = _get_global_client(raise_if_no_controller_running=False)
    found = ray.get(client._controller.list_deployment_ids.remote()) if client else []
    return {(deployment.app_name, deployment.name) for deployment in found}


def gateway_application() -> str | None:
    """The application of this cluster's gateway."""
    return next((application for application, name in sorted(deployments()) if name == GATEWAY), None)


def gateway_target() -> Any:
    """The gateway's `user_config`; None without a gateway."""
    from ray.serve._private.common import DeploymentID

    application = gateway_application()
    if application is None:
        return None
    wanted = DeploymentID(name=GATEWAY, app_name=application)
    config = ray.get(_client()._controller.get_deployment_config.remote(wanted))
    return config and config.user_config


def stated() -> dict[str, ServeApplicationSchema]:
    """The applications of the config file that was deployed last. Serve applies it again whenever its controller is
    started anew."""
    return ray.get(_client()._controller.get_app_configs.remote())


def state(applications: list[ServeApplicationSchema]) -> None:
    """As if a config file with these were deployed."""
    _client().deploy_apps(ServeDeploySchema(applications=applications))


def _client() -> "ServeControllerClient":
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None, "Serve runs here"
    return client
