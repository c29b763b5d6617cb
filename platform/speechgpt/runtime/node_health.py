"""Whether every node of a cluster has the packages that jobs need: a job of the doctor's own looks, and is removed."""

import json
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING

from speechgpt.runtime import node_probe
from speechgpt.runtime.findings import Finding

if TYPE_CHECKING:
    import httpx

JOB_SECONDS = 180.0


def examine_nodes(client: "httpx.Client", requirements: Sequence[str]) -> Iterator[Finding]:
    """`client` speaks to the dashboard with the token. Raises httpx.HTTPError."""
    name = f"doctor-{uuid.uuid4().hex[:10]}"
    program = resources.files("speechgpt.runtime").joinpath("node_probe.py").read_text()
    entrypoint = shlex.join(["python", "-c", program, json.dumps(list(requirements))])
    sent = client.post("/api/jobs/", json={"submission_id": name, "entrypoint": entrypoint})
    if sent.is_error:
        yield _takes_no_job(sent.text)
        return
    try:
        _wait(client, name)
        log = client.get(f"/api/jobs/{name}/logs").raise_for_status().json()["logs"] or ""
    finally:
        client.post(f"/api/jobs/{name}/stop")
        client.delete(f"/api/jobs/{name}")
    lines = [line for line in log.splitlines() if line.startswith(node_probe.SIGN)]
    if not lines:
        yield _takes_no_job(log)
        return
    yield from judge_packages(json.loads(lines[-1].removeprefix(node_probe.SIGN)))


def judge_packages(nodes: Sequence[tuple[str, Mapping[str, str] | None]]) -> Iterator[Finding]:
    """`nodes` as the probe prints them."""
    for address, unmet in nodes:
        if unmet is None:
            remedy = "look at its log (ray logs raylet.out); restart it if it hangs"
            yield Finding(f"node {address}", "missing", "takes no work: a task without needs did not run", remedy)
        elif unmet:
            found = ", ".join(f"{name}: {version}" for name, version in sorted(unmet.items()))
            remedy = "start the node from this version's image, or pip install there what is named"
            yield Finding(f"packages of {address}", "missing", found, remedy)
    whole = sum(unmet == {} for _, unmet in nodes)
    if whole:
        yield Finding("packages of the nodes", "ok", f"all as required on {whole} of {len(nodes)}")


def _wait(client: "httpx.Client", name: str) -> None:
    """Until the job has ended, or for JOB_SECONDS."""
    deadline = time.monotonic() + JOB_SECONDS
    while time.monotonic() < deadline:
        state = client.get(f"/api/jobs/{name}").raise_for_status().json()["status"]
        if state in ("SUCCEEDED", "FAILED", "STOPPED"):
            return
        time.sleep(1)


def _takes_no_job(reason: str) -> Finding:
    said = (reason.strip().splitlines() or ["it ended without a word"])[-1]
    remedy = "`python` on its nodes must be the one that runs Ray; look at the head's dashboard_agent.log"
    return Finding("jobs", "missing", f"a job that looks at the nodes failed: {said[:300]}", remedy)
