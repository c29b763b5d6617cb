"""What is wrong with a Ray cluster, asked of its dashboard: token, versions, clock, and each node's stores and disks.

Plain HTTP with the token, so that a cluster can be examined from a machine whose Ray is another version than its own.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from speechgpt.runtime.findings import Finding, Grade

TIMEOUT_SECONDS = 10
SKEW_SECONDS = 60.0
SKEW_LIMIT_SECONDS = 900.0
"""Further apart, S3 refuses every request (RequestTimeTooSkewed)."""
FULL = 0.9
DISK_LEFT = 0.05


def token() -> tuple[str, str]:
    """(Ray's token or an empty string, where it comes from), looked for in Ray's own order."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given, "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip(), str(path)
    except OSError:
        return "", str(path)


def examine_cluster(address: str) -> Iterator[Finding]:
    """Everything about the cluster whose dashboard is at `address`; where it does not answer, only that."""
    import httpx

    secret, place = token()
    yield judge_token(secret, place)
    url = address if "://" in address else f"http://{address}"
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_SECONDS, trust_env=False) as client:
            version = client.get("/api/version")
            if version.status_code in (401, 403):
                yield _refused(url, place if secret else "")
                return
            version.raise_for_status()
            yield judge_version(version.json()["ray_version"], metadata.version("ray"))
            yield judge_clock("cluster's clock", version.headers.get("date", ""), datetime.now(UTC))
            yield judge_openness(url, answers_strangers(url))
            nodes = client.get("/nodes", params={"view": "summary"})
            nodes.raise_for_status()
            yield from judge_nodes(nodes.json()["data"]["summary"])
    except (httpx.HTTPError, KeyError, json.JSONDecodeError) as error:
        remedy = "is the cluster up, and is this its dashboard (http://HEAD:8265, through a tunnel or port-forward)?"
        yield Finding("Ray cluster", "missing", f"{url} does not answer as Ray does: {error!r}", remedy)


def answers_strangers(url: str) -> bool:
    """Whether the dashboard tells anything to who sends no token."""
    import httpx

    try:
        reply = httpx.get(f"{url}/api/version", timeout=TIMEOUT_SECONDS, trust_env=False)
    except httpx.HTTPError:
        return False
    return reply.is_success


def judge_token(secret: str, place: str) -> Finding:
    """Before it is sent anywhere: is there one, and is it the owner's alone?"""
    if not secret:
        remedy = "copy the head's (`ray get-auth-token` there shows it) to this file, or set RAY_AUTH_TOKEN"
        return Finding("Ray token", "note", f"none in {place}", remedy)
    path = Path(place)
    if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        return Finding("Ray token", "note", f"{place} can be read by other users of this machine", f"chmod 600 {place}")
    return Finding("Ray token", "ok", f"from {place}")


def judge_version(theirs: str, ours: str) -> Finding:
    if theirs == ours:
        return Finding("Ray version", "ok", theirs)
    found = f"{theirs} on the cluster, {ours} here"
    return Finding("Ray version", "missing", found, f'pip install "ray=={theirs}" here, or an image with {ours} there')


def judge_clock(subject: str, date: str, now: datetime) -> Finding:
    """`date` is an HTTP Date header; whole seconds."""
    try:
        skew = abs((parsedate_to_datetime(date) - now).total_seconds())
    except (TypeError, ValueError):
        return Finding(subject, "note", "unknown: the reply has no date", "compare it by hand: date -u on both")
    if skew < SKEW_SECONDS:
        return Finding(subject, "ok", f"within {SKEW_SECONDS:.0f} s of this machine's")
    grade: Grade = "missing" if skew > SKEW_LIMIT_SECONDS else "note"
    remedy = "set both clocks by NTP (timedatectl set-ntp true); S3 refuses requests that are 15 minutes off"
    return Finding(subject, grade, f"{skew:.0f} s from this machine's", remedy)


def judge_openness(url: str, answers_strangers: bool) -> Finding:
    if not answers_strangers:
        return Finding("Ray authentication", "ok", "who has no token is refused")
    remedy = "start it with RAY_AUTH_MODE=token; until then everyone who reaches it may run any code on it"
    return Finding("Ray authentication", "missing", f"{url} answers without a token", remedy)


def judge_nodes(nodes: list[Mapping[str, Any]]) -> Iterator[Finding]:
    """From the dashboard's summary of its nodes."""
    living = [node for node in nodes if node.get("raylet", {}).get("state") == "ALIVE"]
    yield Finding("nodes", "ok" if living else "missing", f"{len(living)} alive", "" if living else "start one")
    dead = [node for node in nodes if node.get("raylet", {}).get("state") == "DEAD"]
    for node in dead:
        raylet = node["raylet"]
        reason = raylet.get("stateMessage") or "no reason given"
        if "EXPECTED_TERMINATION" in reason or "drain" in reason.lower():
            continue
        remedy = "look at its log (ray logs raylet.out); out of memory: fewer actors a node, or larger nodes"
        yield Finding(f"node {_name(node)}", "note", f"dead: {reason}", remedy)
    for node in living:
        yield from _judge_node(node)


def _judge_node(node: Mapping[str, Any]) -> Iterator[Finding]:
    raylet, name = node["raylet"], _name(node)
    used, left = int(raylet.get("objectStoreUsedMemory", 0)), int(raylet.get("objectStoreAvailableMemory", 0))
    if used + left and used / (used + left) > FULL:
        found = f"{used / (used + left):.0%} of {(used + left) / 2**30:.1f} GiB in use: Ray spills to disk"
        yield Finding(f"object store of {name}", "note", found, "fewer or smaller blocks at once, or more nodes")
    for mount, disk in (node.get("disk") or {}).items():
        free, total = int(disk["free"]), int(disk["total"])
        if total and free / total < DISK_LEFT:
            remedy = "Ray stops placing tasks there at 95 %: remove old /tmp/ray/session_*, or a larger disk"
            yield Finding(f"disk of {name}", "missing", f"{free / 2**30:.1f} GiB free at {mount}", remedy)
    gpus = float((raylet.get("resourcesTotal") or {}).get("GPU", 0))
    if gpus and not node.get("gpus"):
        remedy = "its driver answers nobody (nvidia-smi there): reinstall it, or run the container with --gpus all"
        yield Finding(f"GPU of {name}", "missing", f"{gpus:g} claimed, none seen", remedy)


def _name(node: Mapping[str, Any]) -> str:
    return str(node.get("ip") or node["raylet"].get("nodeManagerAddress") or node.get("hostname", "?"))


def _refused(url: str, place: str) -> Finding:
    found = f"{url} refuses the token from {place}" if place else f"{url} wants a token"
    remedy = "`ray get-auth-token` on its head shows the right one; put it into RAY_AUTH_TOKEN or ~/.ray/auth_token"
    return Finding("Ray token", "missing", found, remedy)
