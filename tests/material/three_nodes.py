"""A Ray cluster of a head and two more nodes in a process of its own; prints its address, and obeys standard input.

A line `lose` takes one of the nodes away as a vanished machine does, `join` brings another. It lives until its
standard input closes.
"""

import socket
import sys
from typing import Any

from ray.cluster_utils import Cluster


def node() -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        # The default port belongs to one cluster of a machine.
        agent = {"dashboard_agent_listen_port": int(probe.getsockname()[1])}
    return {"num_cpus": 1, "object_store_memory": 100 * 1024**2, "wait": False} | agent


if __name__ == "__main__":
    cluster = Cluster()
    try:
        cluster.add_node(include_dashboard=False, **node())
        others = [cluster.add_node(**node()) for _ in range(2)]
        cluster.wait_for_nodes(timeout=300)
        print(cluster.address, flush=True)
        for line in sys.stdin:
            if line.strip() == "lose":
                cluster.remove_node(others.pop(), allow_graceful=False)
            elif line.strip() == "join":
                others.append(cluster.add_node(**node()))
            print("done", flush=True)
    finally:
        cluster.shutdown()
