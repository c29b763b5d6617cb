"""A cluster of hosts with addresses of their own: head, worker, storage, and those who come from outside.

The hosts are namespaces of this machine (tests/material/hosts.py), the programs the real ones: the image's entry point,
Ray with its token, PostgreSQL, MLflow, an S3 server, Redis, Serve.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest
import yaml
from hosts import Host, wait_until

ROOT = Path(__file__).parents[2]
MATERIAL = ROOT / "tests/material"
PYTHON = sys.executable
ENTRYPOINT = ROOT / "infra/images/entrypoint"
RECIPE = os.environ.get("EVIDENCE_RECIPE", "nano")

pytestmark = hosts.MARKS


class Net:
    """Hosts on one network, with one scratch directory that only they know."""

    def __init__(self, names: tuple[str, ...]) -> None:
        # Not pytest's own directory, which PostgreSQL's user cannot enter.
        self.scratch = Path(tempfile.mkdtemp(prefix="speechgpt-hosts-"))
        self.scratch.chmod(0o755)
        self.switch = Host("switch", self.scratch)
        self.hosts = {name: Host(name, self.scratch) for name in names}
        self.environment = hosts.environment(self.scratch)
        hosts.plug(self.switch, list(self.hosts.values()))

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def address(self, name: str) -> str:
        return self[name].address

    def start_node(self, name: str, role: str, *words: str, **settings: str) -> None:
        """Start the image's `head` or `worker` and wait until the cluster has it.

        Tries several times: Ray gives a node 30 seconds to start, which a busy machine may not have, and no more.
        """
        known, log = self.environment | settings, self.scratch / f"{name}.log"
        command = (str(ENTRYPOINT), role, "--object-store-memory", str(150 << 20), *words)
        for _ in range(5):
            process = self[name].start(*command, log=log, env=known)
            ended = process.poll
            wait_until(lambda ended=ended: self.has(name) or ended() is not None, 400, lambda: self.logs(name))
            # Ray may give the node up in the moment in which it comes.
            time.sleep(5)
            if process.poll() is None:
                return
        pytest.fail(f"{name} did not start: {self.logs(name)}")

    def start_head(self, *words: str, **settings: str) -> None:
        self.start_node("head", "head", *words, DASHBOARD_HOST=self.address("head"), **settings)

    def start_worker(self, name: str, *words: str, **settings: str) -> None:
        self.start_node(name, "worker", *words, RAY_HEAD=f"{self.address('head')}:6379", **settings)

    def ask(self, name: str, program: str, *words: str, timeout: float = 120, **settings: str) -> str:
        """The last line that a Python program prints on a host."""
        known = {key: value for key, value in (self.environment | settings).items() if value}
        done = self[name].run(PYTHON, "-c", program, *words, env=known, cwd=self.scratch, timeout=timeout)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return (done.stdout.strip().splitlines() or [""])[-1]

    def speechgpt(self, name: str, *words: str, timeout: float = 600, **settings: str) -> Any:
        command = [PYTHON, "-m", "speechgpt.cli", *words, "--address", f"http://{self.address('head')}:8265"]
        return self[name].run(*command, env=self.environment | settings, cwd=self.scratch, timeout=timeout)

    def answers(self, name: str) -> bool:
        return self.status(name, "/api/version", token=True) == 200

    def status(self, name: str, path: str, token: bool, host: str = "head", port: int = 8265) -> int:
        """HTTP status that somebody on a host gets; 0 where nothing listens."""
        return self.get(name, path, token, host, port)[0]

    def get(self, name: str, path: str, token: bool, host: str = "head", port: int = 8265) -> tuple[int, str]:
        """(HTTP status, body)"""
        url = f"http://{self.address(host)}:{port}{path}"
        header = f"Authorization: Bearer {Path(self.environment['RAY_AUTH_TOKEN_PATH']).read_text()}"
        words = ["curl", "-s", "-m", "20", "-w", "\n%{http_code}", *(["-H", header] if token else [])]
        body, _, status = self[name].run(*words, url).stdout.rpartition("\n")
        return int(status or 0), body

    def living(self) -> list[str]:
        """Addresses of the cluster's nodes, as its dashboard has them."""
        status, body = self.get("client", "/nodes?view=summary", token=True)
        if status != 200:
            return []
        raylets = [node["raylet"] for node in json.loads(body)["data"]["summary"]]
        return sorted(raylet["nodeManagerAddress"] for raylet in raylets if raylet.get("state") == "ALIVE")

    def has(self, *names: str) -> bool:
        return {self.address(name) for name in names} <= set(self.living())

    def logs(self, *names: str) -> str:
        return "\n".join((self.scratch / f"{name}.log").read_text()[-3000:] for name in names)

    def close(self) -> None:
        for host in (*self.hosts.values(), self.switch):
            host.kill()
        shutil.rmtree(self.scratch, ignore_errors=True)


@pytest.fixture
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    made = Net(request.param)
    yield made
    made.close()


def start_storage(net: Net) -> dict[str, str]:
    """The stack of `speechgpt stack` and Redis on the host `storage`; the environment of their clients."""
    storage, address = net["storage"], net.address("storage")
    command = [PYTHON, "-m", "speechgpt.runtime.stack", "up", "--directory", str(net.scratch / "stack")]
    done = storage.run(*command, env=net.environment)
    assert done.returncode == 0, done.stderr
    told = dict(line.removeprefix("export ").split("=", 1) for line in done.stdout.split("\n") if "=" in line)
    storage.start(PYTHON, str(MATERIAL / "forward.py"), address, "9000", "5000", log=net.scratch / "forward.log")
    wait_until(lambda: "ready" in (net.scratch / "forward.log").read_text(), 60, "no way to the stack")
    return {name: value.replace("127.0.0.1", address) for name, value in told.items()}


def start_redis(net: Net) -> dict[str, str]:
    """Redis on the host `storage`; what the head must know (KubeRay sets the same)."""
    password, address = secrets.token_hex(16), net.address("storage")
    settings = net.scratch / "redis.conf"
    settings.write_text(f"bind {address}\nrequirepass {password}\nsave ''\ndir {net.scratch}\n")
    net["storage"].start("redis-server", str(settings), log=net.scratch / "redis.log")
    wait_until(lambda: "Ready to accept" in (net.scratch / "redis.log").read_text(), 60, "Redis did not start")
    return {
        "RAY_REDIS_ADDRESS": f"{address}:6379",
        "REDIS_PASSWORD": password,
        "RAY_external_storage_namespace": "speechgpt-test",
    }


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs Redis: apt-get install redis-server")
@pytest.mark.parametrize("net", [("storage", "head", "worker", "client", "guest")], indirect=True)
def test_from_a_submitted_pipeline_to_a_service_that_outlives_its_head(net: Net, record_property: Any) -> None:
    """On hosts of their own a submitted pipeline ends with a service that answers while the head is killed and back."""
    clients = start_storage(net)
    redis = start_redis(net)
    key = secrets.token_hex(16)
    net.environment |= clients | {
        "SPEECHGPT_API_KEY": key,
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.edge:proxy_middlewares",
        # As KubeRay sets it for workers of a cluster with GCS fault tolerance.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    }
    head_words = ("--redis-password", redis.pop("REDIS_PASSWORD"))
    began = time.monotonic()
    net.start_head(*head_words, **redis)
    net.start_worker("worker", "--num-cpus", "4")
    record_property("cluster of two hosts, seconds", round(time.monotonic() - began))

    began = time.monotonic()
    words = ("submit", "pipeline", "--recipe", RECIPE, "--workspace", f"s3://speechgpt/{RECIPE}", "--json")
    done = net.speechgpt("client", *words, timeout=3600)
    assert done.returncode == 0, done.stderr[-6000:]
    record_property(f"submitted pipeline `{RECIPE}`, seconds", round(time.monotonic() - began))

    began = time.monotonic()
    config = served(net)
    deploy = [str(Path(PYTHON).with_name("serve")), "deploy", str(config), "--address"]
    asked = net["client"].run(*deploy, f"http://{net.address('head')}:8265", env=net.environment)
    assert asked.returncode == 0, asked.stderr
    service = f"http://{net.address('worker')}:8000"
    wait_until(lambda: ready(net, service), 600, lambda: applications(net) + net.logs("head", "worker"))
    record_property("service of the promoted bundle, seconds", round(time.monotonic() - began))
    stranger = json.loads(net.ask("guest", QUESTION, service, "", timeout=200))
    assert stranger["status"] == 401, "who has no key is refused"
    answer = json.loads(net.ask("guest", QUESTION, service, key, timeout=200))
    assert answer["status"] == 200 and answer["digest"], answer

    with asking(net, service, key) as replies:
        before = wait_until(lambda: len(replies) >= 3 and len(replies), 200, "no replies")
        net["head"].kill()
        killed = time.monotonic()
        assert not net.answers("client"), "the head is gone"
        wait_until(lambda: len(replies) >= before + 10, 300, "no replies while the head is gone")
        without = replies[before:]
        net.hosts["head"] = Host("new-head", net.scratch)
        hosts.connect(net.switch, net["head"], "10.77.0.2")
        net.start_head(*head_words, **redis)
        record_property("head away, seconds", round(time.monotonic() - killed))
        wait_until(lambda: net.has("head", "worker"), 400, lambda: net.logs("head", "worker"))
        after = len(replies)
        wait_until(lambda: len(replies) >= after + 5, 300, "no replies after the head came back")
    record_property("replies while the head was away", dict(Counter(without)))
    record_property("replies from the kill to the end", dict(Counter(replies[before:])))
    assert set(replies) == {200}, Counter(replies)
    wait_until(lambda: "RUNNING" in applications(net), 300, lambda: applications(net))
    listed = json.loads(net.speechgpt("client", "list", "--json").stdout)["jobs"]
    assert [job["status"] for job in listed] == ["SUCCEEDED"], "what the head knew of its jobs is still known"
    again = net.speechgpt("client", *words, timeout=600)
    assert "already succeeded" in again.stderr, again.stderr
    manifest = ("submit", "manifest", "--recipe", "tiny", "--workspace", "s3://speechgpt/other", "--json")
    assert net.speechgpt("client", *manifest).returncode == 0, "the new head takes jobs"


def served(net: Net) -> Path:
    """What `speechgpt cluster render` makes of the recipe for `serve deploy`."""
    words = [
        "-m",
        "jobs.cluster",
        "render",
        "--recipe",
        RECIPE,
        "--target",
        "aws",
        "--output",
        str(net.scratch / "aws"),
    ]
    done = net["client"].run(PYTHON, *words, env=net.environment, cwd=net.scratch)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((net.scratch / "aws/serve.yaml").read_text())["proxy_location"] == "EveryNode"
    return net.scratch / "aws/serve.yaml"


def ready(net: Net, service: str) -> bool:
    done = net["guest"].run("curl", "-s", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", f"{service}/readyz")
    return done.stdout == "200"


def applications(net: Net) -> str:
    command = [str(Path(PYTHON).with_name("serve")), "status", "--address", f"http://{net.address('head')}:8265"]
    return net["client"].run(*command, env=net.environment).stdout


QUESTION = """
import json, sys
import httpx
asked = {"model": "speechgpt", "messages": [{"role": "user", "content": "what is two plus three"}], "max_tokens": 8}
headers = {"authorization": f"Bearer {sys.argv[2]}"} if sys.argv[2] else {}
known = httpx.get(f"{sys.argv[1]}/v1/models", headers=headers, timeout=60)
if known.status_code == 200:
    asked["model"] = known.json()["data"][0]["id"]
reply = httpx.post(f"{sys.argv[1]}/v1/chat/completions", json=asked, headers=headers, timeout=120)
print(json.dumps({"status": reply.status_code, "digest": reply.headers.get("x-speechgpt-bundle"), "said": reply.text}))
"""

ASKING = """
import sys, time
import httpx
headers = {"authorization": f"Bearer {sys.argv[2]}"}
with httpx.Client(headers=headers, timeout=120) as client:
    model = client.get(f"{sys.argv[1]}/v1/models").json()["data"][0]["id"]
    asked = {"model": model, "messages": [{"role": "user", "content": "what is two plus three"}], "max_tokens": 8}
    while True:
        try:
            print(client.post(f"{sys.argv[1]}/v1/chat/completions", json=asked).status_code, flush=True)
        except httpx.HTTPError as error:
            print(0, flush=True)
        time.sleep(0.5)
"""


class asking:
    """HTTP status of one question after the other, from the host `guest`, as they come."""

    def __init__(self, net: Net, service: str, key: str) -> None:
        self._command = net["guest"].entered([PYTHON, "-u", "-c", ASKING, service, key])
        self._environment = net.environment
        self.replies: list[int] = []

    def __enter__(self) -> list[int]:
        self._process = subprocess.Popen(self._command, env=self._environment, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()
        return self.replies

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.replies.append(int(line))

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


@pytest.mark.parametrize("net", [("head", "worker", "client")], indirect=True)
def test_without_the_token_nobody_joins_asks_or_sees_anything(net: Net, record_property: Any) -> None:
    """From other hosts nothing of a cluster's dashboards, agents and GCS answers without the token."""
    net.start_head("--metrics-export-port", "0")
    net.start_worker("worker", "--num-cpus", "1", "--dashboard-agent-listen-port", "52365")

    told = {path: net.status("client", path, token=True) for path in DASHBOARD}
    # 400: the question lacks a node.
    assert [path for path, status in told.items() if status not in (200, 400)] == [], f"with the token: {told}"
    open_to_all = [path for path in DASHBOARD if net.status("client", path, token=False) not in (401, 403)]
    assert open_to_all == [], "answered without a token"
    front = [net.get("client", "/", token=known) for known in (True, False)]
    assert front[0] == front[1], "the front page holds nothing of the cluster"
    for name in ("head", "worker"):
        asked = {path: net.status("client", path, token=False, host=name, port=52365) for path in AGENT}
        assert [path for path, status in asked.items() if status not in (0, 401, 403, 404)] == [], f"{name}: {asked}"

    wrong = net.scratch / "wrong"
    wrong.write_text("not-the-token")
    for settings, says in (
        ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, "token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}, "token"),
    ):
        known = {key: value for key, value in (net.environment | settings).items() if value}
        head = f"{net.address('head')}:6379"
        join = net["client"].run("timeout", "90", "ray", "start", f"--address={head}", "--num-cpus=8", env=known)
        assert join.returncode != 0, join.stdout + join.stderr
        driver = net["client"].run(PYTHON, "-c", JOIN, head, env=known, cwd=net.scratch, timeout=300)
        assert driver.returncode != 0 and says in (driver.stdout + driver.stderr).lower(), driver.stderr[-2000:]
    assert len(net.living()) == 2, "nobody has joined"
    refused = net.speechgpt("client", "list", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode == 1 and "refused the token" in refused.stderr
    listening = net.speechgpt("client", "list", "--json")
    assert json.loads(listening.stdout) == {"jobs": []}
    record_property("paths refused without a token", len(DASHBOARD) + len(AGENT))


DASHBOARD = (
    "/api/version",
    "/api/jobs/",
    "/nodes?view=summary",
    "/api/cluster_status",
    "/api/v0/tasks",
    "/api/v0/actors",
    "/logical/actors",
    "/api/serve/applications/",
    "/api/v0/logs",
)
AGENT = ("/api/job_agent/jobs/", "/api/v0/logs", "/logs/", "/api/local_raylet_healthz/../job_agent/jobs/")

JOIN = """
import sys, ray
ray.init(sys.argv[1], logging_level="error")
print(ray.cluster_resources())
"""


def certificates(directory: Path, addresses: list[str]) -> dict[str, str]:
    """Ray's TLS switches, with an authority and one certificate for all these hosts."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.x509.oid import NameOID

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    now = datetime.datetime.now(datetime.UTC)
    keys = [rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)]
    authority, node = named("authority"), named("ray")

    def certificate(subject: x509.Name, public: Any, is_authority: bool) -> x509.Certificate:
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if not is_authority:
            names = [x509.IPAddress(ipaddress.ip_address(address)) for address in [*addresses, "127.0.0.1"]]
            built = built.add_extension(
                x509.SubjectAlternativeName([*names, x509.DNSName("localhost")]), critical=False
            )
        return built.sign(keys[0], hashes.SHA256())

    written = {
        "ca.crt": certificate(authority, keys[0].public_key(), True).public_bytes(serialization.Encoding.PEM),
        "node.crt": certificate(node, keys[1].public_key(), False).public_bytes(serialization.Encoding.PEM),
        "node.key": keys[1].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        ),
    }
    directory.mkdir()
    for name, content in written.items():
        (directory / name).write_bytes(content)
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(directory / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(directory / "node.key"),
        "RAY_TLS_CA_CERT": str(directory / "ca.crt"),
    }


@pytest.mark.parametrize("net", [("head", "worker", "client")], indirect=True)
def test_with_tls_what_the_hosts_say_to_each_other_is_encrypted(net: Net) -> None:
    """With Ray's TLS switches two hosts work together, and who has the token but no certificate is not let in."""
    plain = dict(net.environment)
    net.environment |= certificates(net.scratch / "tls", [host.address for host in net.hosts.values()])
    net.start_head()
    net.start_worker("worker", "--num-cpus", "2")
    head = f"{net.address('head')}:6379"
    assert net.ask("head", WHERE, timeout=300) == net.address("worker")

    shake = net["client"].run(
        *("openssl", "s_client", "-connect", head, "-CAfile", net.environment["RAY_TLS_CA_CERT"], "-alpn", "h2"),
        input="",
        timeout=60,
    )
    assert "Verify return code: 0 (ok)" in shake.stdout and "subject=CN = ray" in shake.stdout, shake.stdout
    without = net["client"].run("timeout", "90", "ray", "start", f"--address={head}", "--num-cpus=8", env=plain)
    assert without.returncode != 0, without.stdout
    assert len(net.living()) == 2
    done = net.speechgpt("client", "submit", "manifest", "--recipe", "tiny", "--workspace", str(net.scratch / "w"))
    assert done.returncode == 0, done.stderr
    assert "manifest: done in" in done.stdout


WHERE = """
import ray
ray.init("auto", logging_level="error")
@ray.remote(num_cpus=1)
def where():
    return ray.util.get_node_ip_address()
print(ray.get(where.remote()))
"""
