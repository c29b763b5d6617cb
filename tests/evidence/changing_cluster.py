"""A Ray cluster whose nodes come and go, told by lines on standard input; a process of its own, as `two_nodes.py` says.

`add CPUS` and `remove NAME` and `drain NAME SECONDS`; each answers with a line, the name of a node or `ok`.
"""

import socket
import sys
import time

from ray.cluster_utils import Cluster


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    cluster = Cluster()
    nodes = {}

    def add(cpus: int, **settings: object) -> str:
        agent = {"dashboard_agent_listen_port": free_port(), "object_store_memory": 200 << 20}
        for attempt in range(5):
            try:
                node = cluster.add_node(num_cpus=cpus, **agent, **settings)
                break
            except Exception:  # Ray has no class of its own for a node that is slow to start
                if attempt == 4 or not nodes:
                    raise
        name = f"node{len(nodes)}"
        nodes[name] = node
        return name

    try:
        add(int(sys.argv[1]), include_dashboard=False)
        print(cluster.address, flush=True)
        for line in sys.stdin:
            word, *arguments = line.split()
            if word == "add":
                answer = add(int(arguments[0]))
            elif word == "remove":
                cluster.remove_node(nodes[arguments[0]], allow_graceful=False)
                answer = "ok"
            else:
                drain(cluster, nodes[arguments[0]].node_id, float(arguments[1]))
                answer = "ok"
            print(answer, flush=True)
    finally:
        cluster.shutdown()


def drain(cluster: Cluster, node_id: str, seconds: float) -> None:
    """Announce, as clouds and Kubernetes do through Ray's autoscaler, that the node will be taken away."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + seconds) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(node_id, reason, "spot instance reclaimed", deadline)
    assert accepted, why


if __name__ == "__main__":
    main()
