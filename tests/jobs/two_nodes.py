"""A Ray cluster of two nodes in a process of its own; prints its dashboard's address and lives until stdin closes.

Run as a script by the fixture `cluster`: Ray reads its authentication mode once in a process, so the cluster must not
share one with tests that run without a token.
"""

import socket
import sys
from typing import Any

from ray.cluster_utils import Cluster


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def node() -> dict[str, Any]:
    # The default port belongs to one cluster of a machine: the agents of others would not listen, and take no jobs.
    agent = {"dashboard_agent_listen_port": free_port()}
    return {"num_cpus": 2, "object_store_memory": 250 * 1024**2, "wait": False} | agent


if __name__ == "__main__":
    cluster = Cluster()
    try:
        cluster.add_node(include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=free_port(), **node())
        cluster.add_node(**node())
        cluster.wait_for_nodes(timeout=120)
        print(f"http://{cluster.webui_url}", flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()
