"""What `speechgpt doctor` has a cluster run on each of its nodes: which required packages are absent there, or others.

Its text is sent as it stands, to Python there: it may import nothing of this package.
"""

import json
import logging
import sys
from importlib import metadata

SIGN = "speechgpt-nodes "
NODE_SECONDS = 60.0


def lacking(requirements: list[str]) -> dict[str, str]:
    """{requirement: version that is there, or "absent"} of those that are not met."""
    from packaging.requirements import Requirement

    unmet = {}
    for requirement in map(Requirement, requirements):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "absent"
        if version == "absent" or not requirement.specifier.contains(version, prereleases=True):
            unmet[str(requirement)] = version
    return unmet


def main(requirements: list[str]) -> None:
    """Prints of each node [address, unmet requirements, or null where it ran nothing for a minute], on one line."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    ask = ray.remote(num_cpus=0)(lacking)
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[ask.options(scheduling_strategy=there).remote(requirements)] = node["NodeManagerAddress"]
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
    found = [(address, ray.get(reply) if reply in answered else None) for reply, address in asked.items()]
    sys.stdout.write(f"{SIGN}{json.dumps(found)}\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
