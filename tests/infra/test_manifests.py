"""The manifests in infra/ and those that `speechgpt cluster render` makes: current, valid, and made from the recipe."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from jobs.cluster import main
from speechgpt import recipe
from speechgpt.runtime import proxies
from speechgpt.runtime.config import GpuNodeSection, PoolSection, ResourcesSection, ServingSection
from speechgpt.runtime.manifests import USER_ID, ManifestError, TrainingWorkers, check_demand

ROOT = Path(__file__).parents[2]
WORKSPACE = "s3://speechgpt-example/nano"
COMMITTED = [
    (target, recipe_name, f"infra/{target}/{directory}")
    for target in ("kuberay", "aws")
    for recipe_name, directory in (("nano", "nano"), ("speechgpt-7b", "7b"))
]
KUBERAY_FILES = {"rayjob.yaml": "rayjobs", "rayservice.yaml": "rayservices", "raycluster.yaml": "rayclusters"}
CLUSTER_KEYS = {"rayjob.yaml": "rayClusterSpec", "rayservice.yaml": "rayClusterConfig"}
SCHEMAS = Path(os.environ.get("SPEECHGPT_KUBERAY_SCHEMAS", ROOT.parent / "shared/schemas/kuberay"))
"""KubeRay's custom resource definitions, which are not in this repository: ray-operator/config/crd/bases of KubeRay."""


def render(directory: Path, target: str, *options: str, source: str = "nano") -> dict[str, list[dict[str, Any]]]:
    """{file name: its documents}"""
    words = ["render", "--recipe", source, "--target", target, "--output", str(directory), *options]
    if "--workspace" not in options:
        words += ["--workspace", WORKSPACE]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return {path.name: list(yaml.safe_load_all(path.read_text())) for path in directory.iterdir()}


def pool(ray_cluster: dict[str, Any], name: str) -> dict[str, Any]:
    [group] = [group for group in ray_cluster["workerGroupSpecs"] if group["groupName"] == name]
    return group


def ray_cluster_of(manifest: dict[str, Any], file: str) -> dict[str, Any]:
    return manifest["spec"][CLUSTER_KEYS[file]] if file in CLUSTER_KEYS else manifest["spec"]


def pods_of(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


@pytest.mark.parametrize(("target", "source", "directory"), COMMITTED)
def test_the_committed_files_are_what_the_recipe_gives(
    tmp_path: Path, target: str, source: str, directory: str
) -> None:
    workspace = f"s3://speechgpt-example/{Path(directory).name}"
    render(tmp_path, target, "--workspace", workspace, source=source)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / directory).iterdir()}
    assert committed == made, (
        f"out of date; run: speechgpt cluster render --recipe {source} --target {target} "
        f"--workspace {workspace} --output {directory}"
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
    job = render(tmp_path, "kuberay", "--set", "resources.max_gpu_nodes=0")["rayjob.yaml"][-1]
    assert [group["groupName"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]] == ["cpu"]


def test_a_service_keeps_the_gpu_nodes_that_its_least_replicas_need(tmp_path: Path) -> None:
    options = ("--set", "serving.language.gpus=1", "--set", "serving.language.min_replicas=2")
    files = render(tmp_path, "kuberay", *options)
    assert pool(files["rayservice.yaml"][-1]["spec"]["rayClusterConfig"], "gpu")["minReplicas"] == 2
    assert pool(files["rayjob.yaml"][-1]["spec"]["rayClusterSpec"], "gpu")["minReplicas"] == 0


@pytest.mark.parametrize(("file", "definition"), KUBERAY_FILES.items())
def test_kuberay_accepts_the_manifests(tmp_path: Path, file: str, definition: str) -> None:
    if not SCHEMAS.is_dir():
        pytest.skip("no KubeRay definitions here: set SPEECHGPT_KUBERAY_SCHEMAS to KubeRay's config/crd/bases")
    schema = strict_schema(SCHEMAS / f"ray.io_{definition}.yaml")
    manifest = render(tmp_path, "kuberay")[file][-1]
    jsonschema.validate(manifest, schema)
    ray_cluster_of(manifest, file)["headGroupSpec"] = {}
    with pytest.raises(jsonschema.ValidationError, match="template"):
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


@pytest.mark.parametrize("file", KUBERAY_FILES)
def test_every_pod_is_shut_tight_and_authenticated(tmp_path: Path, file: str) -> None:
    """What must hold whatever KubeRay's schemas say, also where they are not at hand."""
    manifest = render(tmp_path, "kuberay")[file][-1]
    cluster = ray_cluster_of(manifest, file)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    submitter = manifest["spec"].get("submitterPodTemplate")
    for pod in [*pods_of(cluster), *([submitter] if submitter else [])]:
        [container] = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] == USER_ID
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    for group in cluster["workerGroupSpecs"]:
        assert group["template"]["spec"]["automountServiceAccountToken"] is False
    for pod in pods_of(cluster):
        [container] = pod["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)


def test_every_key_of_kubernetes_own_kinds_is_known_to_it(tmp_path: Path) -> None:
    """Each pod, too, in the form of a Pod: KubeRay's definitions hold them, Kubernetes' schema is the stricter one."""
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    files = render(tmp_path, "kuberay")
    checked = [*files["guards.yaml"], *files["redis.yaml"]]
    for file in KUBERAY_FILES:
        manifest = files[file][-1]
        checked += [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **pod["metadata"]}, "spec": pod["spec"]}
            for pod in pods_of(ray_cluster_of(manifest, file))
        ]
    for document in checked:
        validator.validate(document, "1.33", strict=True)
    kinds = [document["kind"] for document in checked]
    assert {"NetworkPolicy", "PodDisruptionBudget", "StatefulSet", "Service", "Pod"} == set(kinds)
    checked[0]["spec"]["ingres"] = []
    with pytest.raises(validator.ValidationError):
        validator.validate(checked[0], "1.33", strict=True)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Kubernetes' own rule, for what is used here."""
    named = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return named and all(labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", []))


def test_the_guards_find_the_pods_that_they_are_for(tmp_path: Path) -> None:
    files = render(tmp_path, "kuberay")
    found = {
        document["metadata"]["name"].removeprefix("speechgpt-nano-"): document for document in files["guards.yaml"]
    }
    labels = {
        file.removeprefix("ray").removesuffix(".yaml"): ray_cluster_of(files[file][-1], file)["workerGroupSpecs"][0][
            "template"
        ]["metadata"]["labels"]
        for file in KUBERAY_FILES
    }
    labels["redis"] = files["redis.yaml"][1]["spec"]["template"]["metadata"]["labels"]
    labels["submitter"] = files["rayjob.yaml"][-1]["spec"]["submitterPodTemplate"]["metadata"]["labels"]

    def guarded(policy: str) -> set[str]:
        return {name for name, marks in labels.items() if selects(found[policy]["spec"]["podSelector"], marks)}

    assert guarded("nodes") == guarded("metrics") == guarded("operator") == {"job", "service", "cluster"}
    assert guarded("callers") == {"service"}
    assert guarded("redis") == {"redis"}
    # The submitter and every node are among those who may come in.
    [rule] = found["nodes"]["spec"]["ingress"]
    assert all(selects(rule["from"][0]["podSelector"], marks) for marks in labels.values())
    other = render(tmp_path / "other", "kuberay", source="tiny")["redis.yaml"][1]["spec"]["template"]["metadata"]
    assert not selects(rule["from"][0]["podSelector"], other["labels"]), "another recipe's pods stay out"


def test_what_must_outlive_its_head_has_redis_and_a_job_has_not(tmp_path: Path) -> None:
    files = render(tmp_path, "kuberay")
    service = ray_cluster_of(files["rayservice.yaml"][-1], "rayservice.yaml")["gcsFaultToleranceOptions"]
    standing = files["raycluster.yaml"][-1]["spec"]["gcsFaultToleranceOptions"]
    assert service["redisAddress"] == f"{files['redis.yaml'][0]['metadata']['name']}:6379"
    assert service["externalStorageNamespace"] != standing["externalStorageNamespace"]
    assert set(service["redisPassword"]) == {"valueFrom"}
    assert "gcsFaultToleranceOptions" not in ray_cluster_of(files["rayjob.yaml"][-1], "rayjob.yaml")


def test_a_job_of_its_own_and_a_queue_that_admits_it_whole(tmp_path: Path) -> None:
    files = render(tmp_path, "kuberay", "--job", "tokenize", "--job", "train chain", "--queue", "research")
    assert {"rayjob-tokenize.yaml", "rayjob-train-chain.yaml"} <= set(files)
    job = files["rayjob-train-chain.yaml"][-1]
    assert job["metadata"]["name"] == "speechgpt-nano-train-chain"
    assert job["spec"]["entrypoint"] == f"speechgpt train chain --recipe nano --workspace {WORKSPACE}"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    assert [(group["replicas"], group["minReplicas"]) for group in cluster["workerGroupSpecs"]] == [(4, 4), (2, 2)]
    refused = CliRunner().invoke(
        main, ["render", "--target", "kuberay", "--output", str(tmp_path), "--workspace", WORKSPACE, "--job", "serve"]
    )
    assert refused.exit_code == 2


def test_kustomize_builds_what_is_named(tmp_path: Path) -> None:
    files = render(tmp_path, "kuberay")
    [kustomization] = files["kustomization.yaml"]
    assert all((tmp_path / name).is_file() for name in kustomization["resources"])
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl here: that kustomize accepts the directory was not tried")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text("namespace: speech\nresources: [../base]\n")
    shutil.copytree(tmp_path, tmp_path / "base", ignore=shutil.ignore_patterns("overlay", "base"))
    built = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    documents = list(yaml.safe_load_all(built.stdout))
    assert {document["metadata"]["namespace"] for document in documents} == {"speech"}
    assert len(documents) == sum(len(files[name]) for name in kustomization["resources"])


def test_the_service_is_one_that_serve_can_start(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve import app, edge, run

    manifest = render(tmp_path, "kuberay", "--set", "serving.port=9001")["rayservice.yaml"][-1]
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    assert config.tracing_config is None, "the recipe asks for none"
    stated = [(application.name, application.route_prefix) for application in config.applications]
    assert stated == [(run.GATEWAY, "/"), (app.STATED, None)]
    assert app.STATED.startswith(app.BUNDLES), "a promotion finds it"
    for application in config.applications:
        module, builder = application.import_path.split(":")
        assert (module, callable(getattr(app, builder))) == ("serve.app", True)
        assert app.Arguments(**application.args).bundle == "models:/speechgpt-nano@champion"
    [container] = pool(manifest["spec"]["rayClusterConfig"], "cpu")["template"]["spec"]["containers"]
    assert config.http_options.port == 9001
    assert {"name": "serve", "containerPort": 9001} in container["ports"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 9001}
    environment = {variable["name"]: variable for variable in container["env"]}
    callback = environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]["value"]
    assert callable(getattr(edge, callback.removeprefix("serve.edge:")))
    assert environment[proxies.MAX_BODY_VARIABLE]["value"] == str(15 << 20)
    assert environment[app.KEY_VARIABLE]["valueFrom"]["secretKeyRef"]["key"] == app.KEY_VARIABLE


def test_traces_that_the_recipe_asks_for_take_effect_on_every_node(tmp_path: Path) -> None:
    from serve import traces

    wanted = "serving.traces={share: 0.25, export: otlp}"
    manifest = render(tmp_path, "kuberay", "--set", wanted)["rayservice.yaml"][-1]
    section = recipe.load("nano", (wanted,)).serving.traces
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert config["tracing_config"] == traces.configured(section).model_dump()
    for pod in pods_of(manifest["spec"]["rayClusterConfig"]):
        told = {entry["name"]: entry.get("value") for entry in pod["spec"]["containers"][0]["env"]}
        # Ray's proxies, and replicas that start after the controller has forgotten its configuration.
        assert told["RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"] == config["tracing_config"]["exporter_import_path"]
        assert told["RAY_SERVE_TRACING_SAMPLING_RATIO"] == told[proxies.TRACE_SHARE_VARIABLE] == "0.25"


def test_a_recipe_that_the_image_lacks_goes_along(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: tiny\nname: mine\nengine: {workers: 3}\n")
    rendered = render(tmp_path / "out", "kuberay", source=str(mine))
    for file in KUBERAY_FILES:
        config_map, manifest = rendered[file]
        sent = tmp_path / file
        sent.write_text(config_map["data"]["recipe.yaml"])
        assert recipe.load(sent) == recipe.load(mine)
        for pod in pods_of(ray_cluster_of(manifest, file)):
            assert {"name": "recipe", "configMap": {"name": config_map["metadata"]["name"]}} in pod["spec"]["volumes"]
    assert "--recipe /etc/speechgpt/recipe.yaml" in rendered["rayjob.yaml"][1]["spec"]["entrypoint"]


@pytest.mark.parametrize(
    ("resources", "training", "blamed"),
    [
        (ResourcesSection(), TrainingWorkers(2, cpus=9, gpus=0), "engine.cpus_per_worker asks for 9 CPUs"),
        (ResourcesSection(), TrainingWorkers(33, cpus=1, gpus=0), "engine.workers: 33 run at once.*room for 32"),
        (ResourcesSection(), TrainingWorkers(3, cpus=1, gpus=1), "engine.workers: 3 run at once.*room for 2"),
        (ResourcesSection(max_gpu_nodes=0), TrainingWorkers(1, cpus=1, gpus=1), "resources.max_gpu_nodes is 0"),
        (
            ResourcesSection(gpu_node=GpuNodeSection(gpus=2)),
            TrainingWorkers(1, cpus=1, gpus=4),
            "resources.gpu_node has 8 and 2",
        ),
        (
            ResourcesSection(text_to_unit=PoolSection(cpus=9)),
            TrainingWorkers(1, cpus=1, gpus=0),
            "resources.text_to_unit asks for 9 CPUs",
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


def test_a_serving_node_lives_until_its_longest_request_is_answered(tmp_path: Path) -> None:
    """Serve's replicas, Ray's drain of the node and Kubernetes' patience, in this order."""
    from ray._private import ray_constants

    from serve.scaling import options

    override = "serving.request_timeout_seconds=200.5"
    serving = recipe.load("nano", (override,)).serving
    replica = options(serving.language, serving)["graceful_shutdown_timeout_s"]
    service = render(tmp_path, "kuberay", "--set", override)["rayservice.yaml"][-1]
    for pod in pods_of(service["spec"]["rayClusterConfig"])[1:]:
        [container] = pod["spec"]["containers"]
        told = {variable["name"]: variable.get("value") for variable in container["env"]}
        drain = float(told["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert replica <= drain < pod["spec"]["terminationGracePeriodSeconds"] <= drain + 60
    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"), "Ray reads this variable"
