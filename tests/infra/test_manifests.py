"""The manifests in infra/ and those that `speechgpt cluster render` makes: current, valid, and made from the recipe."""

import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from jobs.cluster import main
from speechgpt import recipe
from speechgpt.runtime.config import NodeSection, ResourcesSection, ServingSection
from speechgpt.runtime.manifests import USER_ID, ManifestError, TrainingWorkers, check_demand

ROOT = Path(__file__).parents[2]
WORKSPACE = "s3://speechgpt-example/nano"
COMMITTED = {"kuberay": ROOT / "infra/kuberay", "aws": ROOT / "infra/aws"}
SCHEMAS = Path(os.environ.get("SPEECHGPT_KUBERAY_SCHEMAS", ROOT.parent / "shared/schemas/kuberay"))
"""KubeRay's custom resource definitions, which are not in this repository: ray-operator/config/crd/bases of KubeRay."""


def render(directory: Path, target: str, *options: str, source: str = "nano") -> dict[str, list[dict[str, Any]]]:
    """{file name: its documents}"""
    words = ["render", "--recipe", source, "--target", target, "--output", str(directory), *options]
    result = CliRunner().invoke(main, [*words, "--workspace", WORKSPACE])
    assert result.exit_code == 0, result.output
    return {path.name: list(yaml.safe_load_all(path.read_text())) for path in directory.iterdir()}


def pool(ray_cluster: dict[str, Any], name: str) -> dict[str, Any]:
    [group] = [group for group in ray_cluster["workerGroupSpecs"] if group["groupName"] == name]
    return group


@pytest.mark.parametrize("target", COMMITTED)
def test_the_committed_files_are_what_the_recipe_gives(tmp_path: Path, target: str) -> None:
    render(tmp_path, target)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in COMMITTED[target].iterdir()}
    assert committed == made, (
        f"out of date; run: speechgpt cluster render --recipe nano --target {target} "
        f"--workspace {WORKSPACE} --output infra/{target}"
    )


def test_pools_are_the_recipes_resources(tmp_path: Path) -> None:
    overrides = [
        "resources.max_cpu_nodes=7",
        "resources.max_gpu_nodes=3",
        "resources.cpu_node={cpus: 12, memory_gib: 48}",
        "resources.gpu_node={cpus: 24, memory_gib: 96, gpus: 4}",
        "resources.accelerator=A100-80G",
        "resources.idle_minutes=9",
    ]
    files = render(tmp_path, "kuberay", *(word for override in overrides for word in ("--set", override)))
    cluster = files["rayjob.yaml"][-1]["spec"]["rayClusterSpec"]
    cpu, gpu = pool(cluster, "cpu"), pool(cluster, "gpu")
    assert (cpu["maxReplicas"], gpu["maxReplicas"]) == (7, 3)
    assert cpu["template"]["spec"]["containers"][0]["resources"]["limits"] == {"cpu": "12", "memory": "48Gi"}
    assert gpu["template"]["spec"]["containers"][0]["resources"]["requests"]["nvidia.com/gpu"] == "4"
    assert gpu["labels"] == {"ray.io/accelerator-type": "A100-80G"}
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 540


def test_a_recipe_without_gpu_nodes_has_no_gpu_pool(tmp_path: Path) -> None:
    none = ("--set", "resources.max_gpu_nodes=0")
    job = render(tmp_path / "kuberay", "kuberay", *none)["rayjob.yaml"][-1]
    assert [group["groupName"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]] == ["cpu"]
    [cluster] = render(tmp_path / "aws", "aws", *none)["cluster.yaml"]
    assert set(cluster["available_node_types"]) == {"head", "cpu"}


def test_aws_pools_are_the_recipes_resources(tmp_path: Path) -> None:
    overrides = ["resources.node_type_gpu=p4d.24xlarge", "resources.max_gpu_nodes=5", "resources.idle_minutes=9"]
    options = [word for override in overrides for word in ("--set", override)]
    [cluster] = render(tmp_path, "aws", *options, "--region", "eu-central-1", "--image", "registry.example/ours:1")[
        "cluster.yaml"
    ]
    gpu = cluster["available_node_types"]["gpu"]
    assert (gpu["node_config"]["InstanceType"], gpu["max_workers"]) == ("p4d.24xlarge", 5)
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in cluster["available_node_types"]["cpu"]["node_config"]
    assert cluster["idle_timeout_minutes"] == 9
    assert (cluster["provider"]["region"], cluster["docker"]["image"]) == ("eu-central-1", "registry.example/ours:1")


def test_ray_accepts_the_aws_file(tmp_path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    [cluster] = render(tmp_path, "aws")["cluster.yaml"]
    complete = prepare_config(cluster)
    validate_config(complete)
    assert complete["setup_commands"] == [], "Ray's default installs its nightly build"
    with pytest.raises(jsonschema.ValidationError):
        validate_config(complete | {"idle_minutes": 5})


@pytest.mark.parametrize(("file", "definition"), [("rayjob.yaml", "rayjobs"), ("rayservice.yaml", "rayservices")])
def test_kuberay_accepts_the_manifests(tmp_path: Path, file: str, definition: str) -> None:
    if not SCHEMAS.is_dir():
        pytest.skip("no KubeRay definitions here: set SPEECHGPT_KUBERAY_SCHEMAS to KubeRay's config/crd/bases")
    schema = strict_schema(SCHEMAS / f"ray.io_{definition}.yaml")
    manifest = render(tmp_path, "kuberay")[file][-1]
    jsonschema.validate(manifest, schema)
    manifest["spec"]["headGroupSpec"] = {}
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpec"):
        jsonschema.validate(manifest, schema)


def strict_schema(definition: Path) -> dict[str, Any]:
    """The v1 schema of a custom resource, in which, unlike in Kubernetes' own checking, an unknown key is an error."""

    def close(schema: Any) -> None:
        for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
            close(part)
        if not isinstance(schema, dict):
            return
        if schema.pop("x-kubernetes-int-or-string", False):
            schema["type"] = ["integer", "string"]
        if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
            schema.setdefault("additionalProperties", False)

    versions = yaml.load(definition.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    [schema] = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    close(schema["properties"]["spec"])
    return schema


@pytest.mark.parametrize("file", ["rayjob.yaml", "rayservice.yaml"])
def test_every_pod_is_shut_tight_and_authenticated(tmp_path: Path, file: str) -> None:
    """What must hold whatever KubeRay's schemas say, also where they are not at hand."""
    spec = render(tmp_path, "kuberay")[file][-1]["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    for pod in pods:
        [container] = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] == USER_ID
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)


def test_the_service_is_one_that_serve_can_start(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve import app, guard

    manifest = render(tmp_path, "kuberay", "--set", "serving.port=9001")["rayservice.yaml"][-1]
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    [application] = config.applications
    module, builder = application.import_path.split(":")
    assert (module, callable(getattr(app, builder))) == ("serve.app", True)
    assert app.Arguments(**application.args).bundle == "models:/speechgpt-nano@champion"
    [container] = pool(manifest["spec"]["rayClusterConfig"], "cpu")["template"]["spec"]["containers"]
    assert config.http_options.port == 9001
    assert container["ports"] == [{"name": "serve", "containerPort": 9001}]
    assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 9001}
    environment = {variable["name"]: variable for variable in container["env"]}
    callback = environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]["value"]
    assert callable(getattr(guard, callback.removeprefix("serve.guard:")))
    assert environment[app.KEY_VARIABLE]["valueFrom"]["secretKeyRef"]["key"] == app.KEY_VARIABLE


def test_a_recipe_that_the_image_lacks_goes_along(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: tiny\nname: mine\nengine: {workers: 3}\n")
    for file, documents in render(tmp_path / "out", "kuberay", source=str(mine)).items():
        config_map, manifest = documents
        sent = tmp_path / file
        sent.write_text(config_map["data"]["recipe.yaml"])
        assert recipe.load(sent) == recipe.load(mine)
        spec = manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]
        for pod in (spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])):
            assert {"name": "recipe", "configMap": {"name": config_map["metadata"]["name"]}} in pod["spec"]["volumes"]
    assert (
        "--recipe /etc/speechgpt/recipe.yaml"
        in render(tmp_path / "out", "kuberay", source=str(mine))["rayjob.yaml"][1]["spec"]["entrypoint"]
    )


@pytest.mark.parametrize(
    ("resources", "training", "blamed"),
    [
        (ResourcesSection(), TrainingWorkers(2, cpus=9, gpus=0), "engine.cpus_per_worker asks for 9 CPUs"),
        (ResourcesSection(), TrainingWorkers(33, cpus=1, gpus=0), "engine.workers: 33 run at once.*room for 32"),
        (ResourcesSection(), TrainingWorkers(3, cpus=1, gpus=1), "engine.workers: 3 run at once.*room for 2"),
        (ResourcesSection(max_gpu_nodes=0), TrainingWorkers(1, cpus=1, gpus=1), "resources.max_gpu_nodes is 0"),
        (
            ResourcesSection(gpu_node=NodeSection(gpus=2)),
            TrainingWorkers(1, cpus=1, gpus=4),
            "resources.gpu_node has 8 and 2",
        ),
    ],
)
def test_workers_that_no_node_could_hold_are_refused(
    resources: ResourcesSection, training: TrainingWorkers, blamed: str
) -> None:
    with pytest.raises(ManifestError, match=blamed):
        check_demand(resources, ServingSection(), training)


def test_refusal_is_wrong_usage_and_leaves_nothing(tmp_path: Path) -> None:
    words = [
        "render",
        "--recipe",
        "nano",
        "--target",
        "aws",
        "--output",
        str(tmp_path / "out"),
        "--set",
        "engine.workers=99",
    ]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "engine.workers" in result.output
    assert not (tmp_path / "out").exists()
