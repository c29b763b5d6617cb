"""How many nodes of each type a cluster has, once a second, as JSON lines: {"at": seconds since 1970, "nodes": …}."""

import json
import sys
import time
from collections import Counter

from ray.autoscaler.v2.sdk import get_cluster_status


def main() -> None:
    while True:
        try:
            status = get_cluster_status(sys.argv[1])
        except Exception as error:  # noqa: BLE001  a busy head may not answer for a moment
            print(error, file=sys.stderr)
        else:
            living = [node.ray_node_type_name for node in status.active_nodes + status.idle_nodes]
            coming = [node.ray_node_type_name for node in status.pending_nodes]
            coming += [launch.ray_node_type_name for launch in status.pending_launches for _ in range(launch.count)]
            print(json.dumps({"at": time.time(), "nodes": Counter(living), "coming": Counter(coming)}), flush=True)
        time.sleep(1)


if __name__ == "__main__":
    main()
