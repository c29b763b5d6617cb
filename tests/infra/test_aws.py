"""AWS: the files of `ray up`, the account's bucket and roles, and what `cluster up|status` do."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from jobs import ray_up
from jobs.cluster import main
from serve import traces
from speechgpt import recipe
from speechgpt.runtime import aws_account, proxies
from speechgpt.runtime.aws_cluster import HEAD_PROFILE, NODE_PROFILE

ACCOUNT = "123456789012"


def render(directory: Path, *options: str) -> dict[str, dict[str, Any]]:
    result = CliRunner().invoke(main, ["render", "--target", "aws", "--output", str(directory), *options])
    assert result.exit_code == 0, result.output
    return {path.name: yaml.safe_load(path.read_text()) for path in directory.iterdir()}


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty AWS account in this process."""
    moto = pytest.importorskip("moto")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with moto.mock_aws():
        yield


def test_pools_are_the_recipes_resources(tmp_path: Path) -> None:
    overrides = ["resources.node_type_gpu=p4d.24xlarge", "resources.max_gpu_nodes=5", "resources.idle_minutes=9"]
    options = [word for override in overrides for word in ("--set", override)]
    cluster = render(tmp_path, *options, "--region", "eu-central-1", "--image", "registry.example/ours:1")[
        "cluster.yaml"
    ]
    spot, on_demand = (cluster["available_node_types"][name] for name in ("gpu-spot", "gpu-on-demand"))
    for node_type in (spot, on_demand):
        assert (node_type["node_config"]["InstanceType"], node_type["max_workers"]) == ("p4d.24xlarge", 5)
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in on_demand["node_config"]
    assert "InstanceMarketOptions" not in cluster["available_node_types"]["cpu"]["node_config"]
    assert cluster["max_workers"] == 4 + 5, "spot and on-demand share the recipe's limit"
    assert cluster["idle_timeout_minutes"] == 9
    assert (cluster["provider"]["region"], cluster["docker"]["image"]) == ("eu-central-1", "registry.example/ours:1")


def test_without_gpu_nodes_there_is_no_gpu_pool(tmp_path: Path) -> None:
    for file in ("cluster.yaml", "serving.yaml"):
        cluster = render(tmp_path, "--set", "resources.max_gpu_nodes=0")[file]
        assert set(cluster["available_node_types"]) == {"head", "cpu"}


def test_serving_nodes_are_on_demand_and_never_fewer_than_the_replicas_need(tmp_path: Path) -> None:
    files = render(tmp_path, "--set", "serving.language.gpus=1", "--set", "serving.language.min_replicas=2")
    gpu = files["serving.yaml"]["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (2, 2)
    assert "InstanceMarketOptions" not in gpu["node_config"]
    assert files["serving.yaml"]["cluster_name"] != files["cluster.yaml"]["cluster_name"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "SPEECHGPT_API_KEY:?" in files["serving.yaml"][commands][-1], "no key, no service"
    from ray.serve.schema import ServeDeploySchema

    applications = ServeDeploySchema.model_validate(files["serve.yaml"]).applications
    assert [application.import_path for application in applications] == [
        "serve.app:build_gateway",
        "serve.app:build_bundle",
    ]


def test_what_proxies_must_know_is_in_the_environment_of_every_serving_node(tmp_path: Path) -> None:
    files = render(tmp_path, "--set", "serving.traces={share: 0.5, export: otlp}", "--set", "serving.port=9001")
    chosen = recipe.load("nano", ("serving.traces={share: 0.5, export: otlp}",))
    told = {f"--env {name}={value}" for name, value in proxies.environment(chosen.serving).items()}
    assert told <= {*files["serving.yaml"]["docker"]["run_options"]}
    assert not told & {*files["cluster.yaml"]["docker"]["run_options"]}
    assert files["serve.yaml"]["tracing_config"] == traces.configured(chosen.serving.traces).model_dump()


def test_a_recipe_that_the_image_lacks_is_mounted_where_the_service_reads_it(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: tiny\nname: mine\n")
    files = render(tmp_path / "out", "--recipe", str(mine))
    for application in files["serve.yaml"]["applications"]:
        sent = files["serving.yaml"]["file_mounts"][application["args"]["recipe"]]
        assert recipe.load(sent) == recipe.load(mine)


@pytest.mark.parametrize("file", ["cluster.yaml", "serving.yaml"])
def test_ray_accepts_the_file(tmp_path: Path, file: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    complete = prepare_config(render(tmp_path)[file])
    validate_config(complete)
    assert complete["setup_commands"] == [], "Ray's default installs its nightly build"
    with pytest.raises(jsonschema.ValidationError):
        validate_config(complete | {"idle_minutes": 5})


def test_rays_autoscaler_takes_spot_first_and_on_demand_when_spot_was_refused(tmp_path: Path) -> None:
    """Ray's own scheduler decides, with the file's node types; instance sizes are those `ray up` would fill in."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.core.generated.autoscaler_pb2 import ResourceRequest, ResourceRequestByCount

    types = render(tmp_path)["cluster.yaml"]["available_node_types"]
    known = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=0,
            max_worker_nodes=node_type.get("max_workers", 0),
            priority=node_type.get("priority", 0),
            resources={"CPU": 8, "GPU": 1} if name.startswith("gpu") else {"CPU": 16},
            launch_config_hash=name,
        )
        for name, node_type in types.items()
        if name != "head"
    }
    need = [ResourceRequestByCount(request=ResourceRequest(resources_bundle={"GPU": 1.0}), count=1)]

    def launched(refused: dict[str, float]) -> list[str]:
        request = SchedulingRequest(
            node_type_configs=known,
            max_num_nodes=6,
            disable_launch_config_check=True,
            resource_requests=need,
            recoverable_resource_availabilities=refused,
        )
        reply = ResourceDemandScheduler(None).schedule(request)
        return [launch.instance_type for launch in reply.to_launch]

    assert launched({}) == ["gpu-spot"]
    assert launched({"gpu-spot": 0.2}) == ["gpu-on-demand"]


def test_the_account_gets_bucket_and_roles_and_a_second_run_changes_nothing(cloud: None) -> None:
    wanted = aws_account.plan("speech-bucket", "eu-central-1", ACCOUNT)
    session = boto3.Session(region_name="eu-central-1")
    steps = list(aws_account.apply(wanted, session))
    assert "bucket speech-bucket made in eu-central-1" in steps
    again = list(aws_account.apply(wanted, session))
    assert not [step for step in again if " made" in step]

    s3, iam = session.client("s3"), session.client("iam")
    blocked = s3.get_public_access_block(Bucket="speech-bucket")["PublicAccessBlockConfiguration"]
    assert all(blocked.values())
    assert s3.get_bucket_versioning(Bucket="speech-bucket")["Status"] == "Enabled"
    rules = {rule["ID"]: rule for rule in s3.get_bucket_lifecycle_configuration(Bucket="speech-bucket")["Rules"]}
    assert rules["abandoned-uploads"]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    assert "false" in s3.get_bucket_policy(Bucket="speech-bucket")["Policy"]
    for name in (HEAD_PROFILE, NODE_PROFILE):
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        assert [role["RoleName"] for role in profile["Roles"]] == [name]
        assert iam.get_role_policy(RoleName=name, PolicyName="speechgpt")["PolicyDocument"] == wanted.roles[name]


def test_rights_are_the_least() -> None:
    wanted = aws_account.plan("speech-bucket", "eu-central-1", ACCOUNT)
    nodes = wanted.roles[NODE_PROFILE]["Statement"]
    assert all(statement["Resource"].startswith("arn:aws:s3:::speech-bucket") for statement in nodes)
    for statement in wanted.roles[HEAD_PROFILE]["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        if statement["Resource"] == "*":
            assert actions == ["ec2:Describe*"], "what changes something names what it changes"
        assert not {"*", "s3:*", "iam:*", "ec2:*"} & set(actions)
    [passing] = [s for s in wanted.roles[HEAD_PROFILE]["Statement"] if s["Action"] == "iam:PassRole"]
    assert passing["Resource"] == f"arn:aws:iam::{ACCOUNT}:role/{NODE_PROFILE}"


def test_a_dry_run_prints_the_plan_and_makes_nothing(cloud: None) -> None:
    words = ["account", "--bucket", "speech-bucket", "--region", "eu-central-1", "--dry-run"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == aws_account.plan("speech-bucket", "eu-central-1", ACCOUNT).document()
    assert boto3.client("s3", region_name="eu-central-1").list_buckets()["Buckets"] == []
    assert boto3.client("iam").list_roles()["Roles"] == []


def test_a_role_that_others_may_take_is_refused(cloud: None) -> None:
    trust = {
        **aws_account.TRUST,
        "Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}],
    }
    boto3.client("iam").create_role(RoleName=NODE_PROFILE, AssumeRolePolicyDocument=json.dumps(trust))
    result = CliRunner().invoke(main, ["account", "--bucket", "speech-bucket", "--region", "eu-central-1"])
    assert result.exit_code == 1
    assert "trusts others than EC2" in result.output


def test_a_name_that_no_bucket_can_have_is_said_in_words(cloud: None) -> None:
    result = CliRunner().invoke(main, ["account", "--bucket", "no such name", "--region", "eu-central-1"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "cannot look at bucket no such name" in result.output


def test_nothing_starts_without_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render(tmp_path)
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    refused = CliRunner().invoke(main, ["up", str(tmp_path / "cluster.yaml")])
    assert refused.exit_code == 1
    assert "ray get-auth-token --generate" in refused.output
    token = home / ".ray/auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("secret")
    token.chmod(0o644)
    assert "chmod 600" in ray_up.lacking(tmp_path / "cluster.yaml")[0]
    token.chmod(0o600)
    assert ray_up.lacking(tmp_path / "cluster.yaml") == []
    assert "SPEECHGPT_API_KEY" in ray_up.lacking(tmp_path / "serving.yaml")[0]


def test_status_tells_the_clusters_machines_and_no_others(cloud: None, tmp_path: Path) -> None:
    render(tmp_path, "--region", "eu-central-1")
    ec2 = boto3.client("ec2", region_name="eu-central-1")
    image = ec2.describe_images()["Images"][0]["ImageId"]
    for cluster, pool in (("speechgpt-nano", "gpu-spot"), ("speechgpt-nano", "head"), ("other", "head")):
        tags = [{"Key": "ray-cluster-name", "Value": cluster}, {"Key": "ray-user-node-type", "Value": pool}]
        specification = [{"ResourceType": "instance", "Tags": tags}]
        ec2.run_instances(
            ImageId=image, InstanceType="m6i.xlarge", MinCount=1, MaxCount=1, TagSpecifications=specification
        )
    result = CliRunner().invoke(main, ["status", str(tmp_path / "cluster.yaml"), "--json"])
    told = json.loads(result.stdout)
    assert told["cluster"] == "speechgpt-nano"
    assert [(node["pool"], node["type"], node["state"]) for node in told["nodes"]] == [
        ("head", "m6i.xlarge", "running"),
        ("gpu-spot", "m6i.xlarge", "running"),
    ]
