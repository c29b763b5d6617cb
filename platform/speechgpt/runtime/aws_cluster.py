"""A recipe's resources as the files of `ray up` on AWS: a cluster that trains, and one that serves.

The head is on demand. Training takes GPU nodes from the spot market first and on demand when there are none; serving
takes them on demand, so that no caller waits for a machine that was taken away. Two clusters, because Ray cannot keep a
training off idle serving nodes, and because a service should outlive an experiment.
"""

from speechgpt.runtime import proxies
from speechgpt.runtime.config import ResourcesSection, ServingSection
from speechgpt.runtime.manifests import API_KEY, Manifest, Release, serving_nodes

HEAD_PROFILE, NODE_PROFILE = "speechgpt-head", "speechgpt-node"
"""Instance profiles; aws_account.py makes them."""
_HEAD_INSTANCE = "m6i.xlarge"
_DISK_GIB = 150
ENVIRONMENT_FILE = "~/.speechgpt/environment"
"""`SPEECHGPT_API_KEY=…` and `MLFLOW_…` of a serving cluster's nodes."""


def training_cluster(release: Release, resources: ResourcesSection, region: str) -> Manifest:
    """Pools that grow from nothing to the most the recipe allows."""
    pools: Manifest = {}
    if resources.max_cpu_nodes:
        pools["cpu"] = _pool(resources.node_type_cpu, 0, resources.max_cpu_nodes)
    if resources.max_gpu_nodes:
        on_demand = _pool(resources.node_type_gpu, 0, resources.max_gpu_nodes)
        spot = {"InstanceMarketOptions": {"MarketType": "spot"}}
        # Ray's autoscaler takes the higher priority first, unless the cloud has just refused a machine of it.
        pools["gpu-spot"] = on_demand | {"priority": 1, "node_config": on_demand["node_config"] | spot}
        pools["gpu-on-demand"] = on_demand | {"priority": 0}
    return _cluster(release, release.instance, pools, resources, region)


def serving_cluster(release: Release, resources: ResourcesSection, serving: ServingSection, region: str) -> Manifest:
    """Pools that never shrink below what the least number of replicas needs."""
    cpu_nodes, gpu_nodes = serving_nodes(resources, serving)
    on_gpus = any(getattr(section, "gpus", 0) for _, section in serving)
    pools: Manifest = {}
    if resources.max_cpu_nodes:
        pools["cpu"] = _pool(resources.node_type_cpu, cpu_nodes, resources.max_cpu_nodes)
    if resources.max_gpu_nodes and on_gpus:
        pools["gpu"] = _pool(resources.node_type_gpu, gpu_nodes, resources.max_gpu_nodes)
    cluster = _cluster(release, f"{release.instance}-serving", pools, resources, region)
    # The key of callers: a file of the machine that runs `ray up`, which only its owner reads, and so on the nodes.
    cluster["file_mounts"][ENVIRONMENT_FILE] = ENVIRONMENT_FILE
    read = f"set -a; . {ENVIRONMENT_FILE}; set +a; : ${{{API_KEY}:?is missing in {ENVIRONMENT_FILE}}}; "
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        cluster[commands][-1] = read + cluster[commands][-1]
    told = proxies.environment(serving)
    cluster["docker"]["run_options"] += [f"--env {name}={value}" for name, value in told.items()]
    return cluster


def _cluster(release: Release, name: str, pools: Manifest, resources: ResourcesSection, region: str) -> Manifest:
    head = {"resources": {"CPU": 0}, "node_config": _instance(_HEAD_INSTANCE, HEAD_PROFILE)}
    start = "ulimit -n 65536; ray start --disable-usage-stats --metrics-export-port=8080"
    gpu_nodes = resources.max_gpu_nodes if any(pool.startswith("gpu") for pool in pools) else 0
    return {
        "cluster_name": name,
        # Spot and on-demand GPU nodes share the recipe's limit.
        "max_workers": (resources.max_cpu_nodes if "cpu" in pools else 0) + gpu_nodes,
        "idle_timeout_minutes": resources.idle_minutes,
        # Stopped machines would keep their disks, and a spot machine cannot be stopped.
        "provider": {"type": "aws", "region": region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": release.image,
            "container_name": "speechgpt",
            "pull_before_run": True,
            "run_options": ["--ulimit nofile=65536:65536", "--env RAY_AUTH_MODE=token"],
        },
        "available_node_types": {"head": head, **pools},
        "head_node_type": "head",
        # The token of the machine that runs `ray up`; made there by `ray get-auth-token --generate`.
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        # The image has everything; Ray's defaults would install its nightly build.
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            # The dashboard stays on the head's loopback; `ray dashboard` brings it through SSH.
            f"{start} --head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1"
            " --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
    }


def _pool(instance_type: str, least: int, most: int) -> Manifest:
    # Resources left empty are filled in by `ray up` from the instance type.
    node_config = _instance(instance_type, NODE_PROFILE)
    return {"min_workers": least, "max_workers": most, "resources": {}, "node_config": node_config}


def _instance(instance_type: str, profile: str) -> Manifest:
    disk = {"VolumeSize": _DISK_GIB, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    return {
        "InstanceType": instance_type,
        # Where the keys to storage come from.
        "IamInstanceProfile": {"Name": profile},
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        # The role's keys answer only to IMDSv2, which a forged request cannot speak; a container is one hop further.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
