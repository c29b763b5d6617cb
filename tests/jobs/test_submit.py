"""Submitting to a cluster: a real one of two nodes with a token, and what is refused before anything is sent."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.job_client import _Once

TOKEN = "a-token-of-this-test-and-nothing-else"
NOWHERE = "http://127.0.0.1:9"


class Cluster:
    """A running cluster, and the command line as somebody who has its token uses it."""

    def __init__(self, address: str, environment: dict[str, str], scratch: Path) -> None:
        self.address = address
        self.environment = environment
        self.scratch = scratch

    def speechgpt(self, *words: str, address: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        # RAY_ADDRESS names another cluster, as it may in a user's shell: --address must win.
        wanted = self.environment | {"RAY_ADDRESS": NOWHERE} | environment
        known = {name: value for name, value in wanted.items() if value}
        command = [sys.executable, "-m", "speechgpt.cli", *words, "--address", address or self.address]
        return subprocess.run(command, env=known, cwd=self.scratch, capture_output=True, text=True, timeout=500)

    def ray(self, program: str, *words: str) -> str:
        """Run a Python program that speaks to the cluster with the token, in a process of its own."""
        command = [sys.executable, "-c", program, self.address, *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    scratch = tmp_path_factory.mktemp("submit")
    token = scratch / "token"
    token.write_text(TOKEN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # `python` on a node is the one that runs Ray.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
    # The tests of a busy machine fail on what the jobs do, not on how long Ray's dashboard takes to start.
    for limit in ("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT"):
        environment[limit] = "240"
    nodes, address = start_two_nodes(environment)
    with nodes:
        yield Cluster(address, environment, scratch)
        assert nodes.stdin
        nodes.stdin.close()


def start_two_nodes(environment: dict[str, str]) -> tuple[subprocess.Popen[str], str]:
    """Tries three times: Ray gives a node 30 seconds to start, which a busy machine may not have, and no more."""
    command = [sys.executable, str(Path(__file__).with_name("two_nodes.py"))]
    for _ in range(3):
        nodes = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert nodes.stdout
        for line in nodes.stdout:
            if line.startswith("http://"):
                return nodes, line.strip()
        nodes.wait()
    pytest.fail("the cluster of two nodes did not start")


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_runs_once_and_again_when_asked(cluster: Cluster) -> None:
    words = ("submit", "manifest", "--recipe", "tiny", "--workspace", str(cluster.scratch / "once"))
    first = cluster.speechgpt(*words)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "manifest: done in" in first.stdout
    assert (cluster.scratch / "once/manifest/prompts.parquet").exists()

    second = cluster.speechgpt(*words, "--json")
    state = json.loads(second.stdout)
    assert (second.returncode, state["status"], state["job"]) == (0, "SUCCEEDED", "manifest")
    assert "already succeeded" in second.stderr
    assert state["submission_id"].startswith("tiny-manifest-")

    third = cluster.speechgpt(*words, "--json", "--again")
    again = json.loads(third.stdout)
    assert (third.returncode, again["submission_id"]) == (0, state["submission_id"] + "-2")
    assert "manifest: done already" in third.stderr

    listed = json.loads(cluster.speechgpt("list", "--json").stdout)["jobs"]
    assert {state["submission_id"], again["submission_id"]} <= {job["submission_id"] for job in listed}
    assert "manifest: done in" in cluster.speechgpt("logs", state["submission_id"]).stdout
    assert "succeeded" in cluster.speechgpt("status", state["submission_id"]).stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_recipe_file_travels_and_a_failed_job_is_tried_again(cluster: Cluster) -> None:
    parent, mine = cluster.scratch / "parent.yaml", cluster.scratch / "mine.yaml"
    parent.write_text("extends: tiny\ndata: {extra_manifests: [/nowhere/recordings.jsonl]}\n")
    mine.write_text("extends: parent\nname: mine\n")
    words = ("submit", "manifest", "--recipe", "mine.yaml", "--workspace", "fails", "--json")
    first = cluster.speechgpt(*words)
    assert (first.returncode, json.loads(first.stdout)["status"]) == (1, "FAILED")
    assert "/nowhere/recordings.jsonl" in first.stderr
    second = cluster.speechgpt(*words, "--retries", "1")
    assert second.returncode == 1
    assert second.stderr.count("/nowhere/recordings.jsonl") >= 2
    assert json.loads(second.stdout)["submission_id"] == json.loads(first.stdout)["submission_id"] + "-3"


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_but_code_recipe_and_workspace_is_sent(cluster: Cluster) -> None:
    words = ("submit", "manifest", "--recipe", "tiny", "--workspace", str(cluster.scratch / "open"), "--json")
    done = cluster.speechgpt(*words, AWS_SECRET_ACCESS_KEY="secret-of-aws", MLFLOW_TRACKING_PASSWORD="secret-of-mlflow")
    identity = json.loads(done.stdout)["submission_id"]
    seen = cluster.ray(SHOW, identity)
    shown = json.loads(seen)
    assert set(shown["runtime_env"]) == {"working_dir"}
    assert set(shown["metadata"]) == {"job", "recipe", "recipe_sha256", "workspace", "version", "code_sha256"}
    for secret in ("secret-of-aws", "secret-of-mlflow", TOKEN):
        assert secret not in seen + done.stdout + done.stderr


SHOW = """
import sys
from ray.job_submission import JobSubmissionClient
print(JobSubmissionClient(sys.argv[1]).get_job_info(sys.argv[2]).model_dump_json())
"""


@pytest.mark.ray
@pytest.mark.slow
def test_driver_and_workers_of_every_node_run_the_code_that_was_sent(cluster: Cluster, tmp_path: Path) -> None:
    marked = tmp_path / "code.zip"
    seen = cluster.ray(PACK_AND_ASK, str(marked)).strip().splitlines()[-1]
    places = json.loads(seen)
    assert len(places["nodes"]) == 2
    assert all("working_dir_files" in place for place in places["modules"])


PACK_AND_ASK = '''
import sys
from pathlib import Path
from jobs.job_client import connect, follow
from speechgpt.runtime.code_archive import write_code_archive

ASK = """
import json, ray, speechgpt
ray.init(logging_level="error")
@ray.remote(num_cpus=2)
def where():
    import speechgpt, time
    time.sleep(3)
    return speechgpt.__file__, ray.get_runtime_context().get_node_id()
found = ray.get([where.remote() for _ in range(2)])
modules = [speechgpt.__file__] + [place for place, _ in found]
print(json.dumps({"modules": modules, "nodes": sorted({node for _, node in found})}))
"""
client, archive = connect(sys.argv[1]), Path(sys.argv[2])
write_code_archive(archive, ("speechgpt", "jobs", "serve"), "speechgpt-ray", {"ask.py": ASK.encode()})
identity = client.submit_job(entrypoint="python ask.py", runtime_env={"working_dir": str(archive)})
log = []
assert follow(client, identity, log.append, notice=print) == "SUCCEEDED", "".join(log)
print("".join(log))
'''

SLEEPER = """
import sys
from ray.job_submission import JobSubmissionClient
entrypoint = "python -u -c 'import time; [print(\\"line\\", i, flush=True) or time.sleep(0.25) for i in range(%s)]'"
print(JobSubmissionClient(sys.argv[1]).submit_job(entrypoint=entrypoint % sys.argv[3], submission_id=sys.argv[2]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_log_outlives_its_connection_and_no_line_comes_twice(cluster: Cluster) -> None:
    cluster.ray(SLEEPER, "lines", "40")
    host, port = cluster.address.removeprefix("http://").split(":")
    with Wire((host, int(port))) as wire:
        cut = threading.Thread(target=wire.cut_after, args=(lambda: b"line 8\n" in wire.carried,))
        cut.start()
        done = cluster.speechgpt("logs", "lines", "--follow", address=wire.address)
        cut.join()
    assert done.returncode == 0, done.stderr
    assert wire.cuts == 1
    assert "lost" in done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("line ")] == [f"line {i}" for i in range(40)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_running_job_is_attached_to_and_can_be_stopped(cluster: Cluster) -> None:
    cluster.ray(SLEEPER, "long", "4000")
    words = ("submit", "manifest", "--recipe", "tiny", "--workspace", "unused", "--submission-id", "long")
    attached = cluster.speechgpt(*words, "--detach", "--json")
    assert attached.returncode == 0
    assert "attaching" in attached.stderr
    assert json.loads(attached.stdout)["status"] in ("PENDING", "RUNNING")
    stopped = cluster.speechgpt("stop", "long", "--json")
    assert (stopped.returncode, json.loads(stopped.stdout)["status"]) == (0, "STOPPED")
    assert cluster.speechgpt("logs", "long", "--follow").returncode == 1


@pytest.mark.ray
@pytest.mark.slow
def test_without_the_clusters_token_nothing_is_told(cluster: Cluster, tmp_path: Path) -> None:
    submit = ("submit", "manifest", "--recipe", "tiny", "--workspace", "unused")
    for words in (submit, ("list",), ("stop", "lines")):
        wrong = cluster.speechgpt(*words, RAY_AUTH_TOKEN="another-token")
        assert (wrong.returncode, wrong.stdout) == (1, "")
        assert "refused the token" in wrong.stderr
        assert "RAY_AUTH_TOKEN" in wrong.stderr
        assert "Traceback" not in wrong.stderr
    nobody = cluster.speechgpt("list", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path))
    assert nobody.returncode == 1
    assert "refused the token" in nobody.stderr
    by_file = cluster.speechgpt("list", "--json", RAY_AUTH_MODE="")
    assert by_file.returncode == 0, "a token that is there is sent without RAY_AUTH_MODE, too"


@pytest.mark.ray
@pytest.mark.evidence
def test_a_rotated_token_shuts_the_old_one_out(cluster: Cluster, tmp_path: Path) -> None:
    """As the handbook rotates it: a new token into the file, and the cluster started again."""
    file = tmp_path / "token"
    environment = cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(file)}
    for token, old in (("the-first-token", "no-token-yet"), ("the-second-token", "the-first-token")):
        file.write_text(token)
        nodes, address = start_two_nodes(environment)
        with nodes:
            ours = Cluster(address, environment, tmp_path)
            assert ours.speechgpt("list").returncode == 0
            refused = ours.speechgpt("submit", "manifest", "--recipe", "tiny", "--workspace", "w", RAY_AUTH_TOKEN=old)
            assert refused.returncode == 1
            assert "refused the token" in refused.stderr and "RAY_AUTH_TOKEN" in refused.stderr
            assert json.loads(ours.speechgpt("list", "--json").stdout)["jobs"] == [], "nothing was started"
            assert nodes.stdin
            nodes.stdin.close()


@pytest.mark.ray
@pytest.mark.slow
def test_an_unknown_submission_is_named(cluster: Cluster) -> None:
    for words in (("status", "nobody"), ("logs", "nobody", "--follow")):
        done = cluster.speechgpt(*words)
        assert done.returncode == 1
        assert "nobody" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.ray
@pytest.mark.evidence
def test_the_pipeline_ends_with_a_registered_bundle(cluster: Cluster) -> None:
    place = cluster.scratch / "pipeline"
    done = cluster.speechgpt("submit", "pipeline", "--recipe", "tiny", "--workspace", str(place), "--json")
    assert done.returncode == 0, done.stderr[-5000:]
    assert json.loads(done.stdout)["status"] == "SUCCEEDED"
    [manifest] = place.glob("bundles/*/bundle.json")
    assert json.loads(manifest.read_text())
    import mlflow

    registry = mlflow.MlflowClient(f"sqlite:///{place}/mlflow/mlflow.db")
    [model] = registry.search_registered_models()
    assert model.name == "speechgpt-tiny"
    assert "champion" in model.aliases


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nonsense", "--workspace", "w"), "'nonsense' is not a job"),
        (("serve", "--workspace", "w"), "'serve' is not a job"),
        (("train", "sideways", "--workspace", "w"), "train takes one of"),
        (("train", "--workspace", "w"), "train takes one of"),
        (("manifest", "chain", "--workspace", "w"), "manifest takes no argument"),
        (("manifest",), "--workspace is missing"),
        (("manifest", "--workspace", "w", "--retries", "2", "--detach"), "leave out --detach"),
        (("manifest", "--workspace", "w", "--recipe", "no-such"), "no-such"),
        (("manifest", "--workspace", "w", "--set", "engine.wrokers=3"), "engine.wrokers"),
        (("manifest", "--workspace", "s3://key:secret@bucket/prefix"), "holds a password"),
        (("manifest", "--workspace", "w", "--set", "tracking.uri=https://me:secret@mlflow"), "holds a password"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_sent(words: tuple[str, ...], says: str) -> None:
    done = here("submit", *words, "--address", NOWHERE)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "secret" not in done.stderr


def test_a_cluster_that_does_not_answer_is_an_error_in_words() -> None:
    done = here("submit", "manifest", "--recipe", "tiny", "--workspace", "w", "--address", NOWHERE)
    assert done.returncode == 1
    assert f"no Ray job server answers at {NOWHERE}" in done.stderr
    assert "Traceback" not in done.stderr


def here(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "speechgpt.cli", *words], env=environment, capture_output=True, text=True
    )


def test_a_log_read_again_from_its_start_is_passed_on_once() -> None:
    seen: list[str] = []
    log = _Once(seen.append)
    for chunk in ("one\ntw", "o\n"):
        log(chunk)
    log.rewind()
    for chunk in ("on", "e\ntwo\nth", "ree\n"):
        log(chunk)
    assert "".join(seen) == "one\ntwo\nthree\n"


class Wire:
    """A TCP connection to `target` that can be cut: everything through it breaks, later connections work."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.carried = b""
        self.cuts = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Wire":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._break()

    def cut_after(self, moment: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not moment() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.cuts += 1
        self._break()

    def _break(self) -> None:
        for end in self._open:
            end.close()
        self._open.clear()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._open += [near, far]
            threading.Thread(target=self._carry, args=(near, far), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.carried += data
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            end.close()
