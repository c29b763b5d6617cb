"""Ray's own AutoscalingCluster (nodes of Ray's fake multi-node provider, real processes), on a host of `hosts.py`.

Run there as a script, with the node types as JSON: {"types": {name: type as in a cluster.yaml}, "settings": {key of a
cluster.yaml: value}, "refused": [types that this cloud has none of], "v2": whether Ray's second autoscaler decides}.
It ends when the head is up. Never on the machine itself: it stops every Ray that it finds.
"""

import json
import sys
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE
from ray.cluster_utils import AutoscalingCluster

HEAD_TYPE = "ray.head.default"
OBJECT_STORE = 150 << 20


class ScarceProvider(FakeMultiNodeProvider):
    """A cloud that has none of some machines, and says so as AWS does."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: Any, labels: Any
    ) -> None:
        if tags[TAG_RAY_USER_NODE_TYPE] in self.provider_config["refused"]:
            raise NodeLaunchException("InsufficientInstanceCapacity", "no such machines in this zone", None)
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        """Clears away what a node that was too slow to start has left: the original would forget its processes."""
        try:
            super()._create_node_with_resources_and_labels(*arguments)
        except Exception as error:
            name = f"{self._next_node_id:05d}"
            for process in psutil.process_iter(["environ"]):
                if ((process.info["environ"] or {}).get("RAY_OVERRIDE_NODE_ID_FOR_TESTING") or "").endswith(name):
                    process.kill()
            raise NodeLaunchException("Slow", str(error), None) from error


class FakeCluster(AutoscalingCluster):
    """Ray's wheel lacks the file that the original takes its defaults from."""

    def _generate_config(
        self,
        head_resources: dict[str, float],
        worker_node_types: dict[str, Any],
        autoscaler_v2: bool = False,
        **config_kwargs: Any,
    ) -> dict[str, Any]:
        provider = {
            "type": "external",
            "module": "autoscaling_cluster.ScarceProvider",
            "refused": config_kwargs.pop("refused"),
            # The nodes share one address.
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        }
        if autoscaler_v2:
            provider |= {"launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID}
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        nothing: dict[str, Any] = {"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": []}
        nothing |= {"file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": []}
        for when in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"):
            nothing[f"{when}_commands"] = []
        return {
            "cluster_name": "fake",
            "max_workers": 8,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 1,
            "provider": provider,
            "available_node_types": {**worker_node_types, HEAD_TYPE: head},
            "head_node_type": HEAD_TYPE,
        } | {**nothing, **config_kwargs}


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    FakeCluster(
        {"CPU": 0, "object_store_memory": OBJECT_STORE},
        wanted["types"],
        autoscaler_v2=wanted["v2"],
        refused=wanted.get("refused", []),
        **wanted.get("settings", {}),
    ).start()
