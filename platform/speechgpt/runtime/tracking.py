"""Runs, lineage and registered models in MLflow.

A run per job, nested under the pipeline's. Inputs and outputs are linked by content hash: a run carries the tag
`output` for what it made and `input.JOB` (with `input.JOB.run`, who made it) for what it read, so that `ancestry` walks
from a bundle back to the data. Only plain files are logged: no MLflow model flavour, which would pickle.
"""

import logging
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import speechgpt
from speechgpt.runtime import cache
from speechgpt.runtime.config import TrackingSection
from speechgpt.runtime.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

DIGEST = "speechgpt.digest"
"""Tag of a registered version: the bundle's digest, as the header `x-speechgpt-bundle` carries it."""

_EMBEDDED = "mlflow"
"""The embedded store's directory in a local workspace."""
_PARAM_LENGTH = 500
_SYSTEM_SECONDS = 5
_PARAMS_AT_ONCE = 100


class TrackingError(RuntimeError):
    """No store to track in, or a run or registered model that is not there."""


@dataclass(frozen=True)
class Run:
    """An open MLflow run. Travels to Ray workers as its address."""

    uri: str
    id: str

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        batch = [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
        _client(self.uri).log_batch(self.id, metrics=batch)

    def log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        batch = [Param(name, str(value)[:_PARAM_LENGTH]) for name, value in params.items()]
        for start in range(0, len(batch), _PARAMS_AT_ONCE):
            _client(self.uri).log_batch(self.id, params=batch[start : start + _PARAMS_AT_ONCE])

    def log_text(self, text: str, name: str) -> None:
        _client(self.uri).log_text(self.id, text, name)

    def log_artifacts(self, path: str | Path, name: str = "") -> None:
        """A file, or everything in a directory, into the run's artifact directory `name`."""
        log = _client(self.uri).log_artifacts if Path(path).is_dir() else _client(self.uri).log_artifact
        log(self.id, str(path), name or None)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        _client(self.uri).log_batch(self.id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def made(self, digest: str, parts: Mapping[str, str]) -> None:
        """Say what this run made: the digest that readers refer to, and {name: digest} of each part."""
        self.set_tags({"output": digest} | {f"output.{name}": part for name, part in parts.items()})

    @contextmanager
    def system_metrics(self, node: str = "") -> Iterator[None]:
        """Log this machine's CPU, memory, disk, network and GPUs (`system/…`) while the block lasts.

        node: tells machines apart where several log into one run.
        """
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # Logs about starting and stopping are nobody's news.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
        monitor = SystemMetricsMonitor(
            self.id, _SYSTEM_SECONDS, resume_logging=True, node_id=node or None, tracking_uri=self.uri
        )
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def end(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        _client(self.uri).set_terminated(self.id, status)


@dataclass(frozen=True)
class Ancestor:
    """A run on the way from a result back to its data."""

    run_id: str
    job: str
    revision: str
    inputs: dict[str, str] = field(default_factory=dict)
    """Job read from -> digest read."""


@dataclass(frozen=True)
class Tracking:
    """One experiment, of one recipe, in one store, and the registered model that its bundles become."""

    uri: str
    experiment_id: str
    model: str

    @classmethod
    def open(cls, section: TrackingSection, workspace: Workspace, recipe_name: str) -> "Tracking":
        """Find or make the experiment. Raises TrackingError for an S3 workspace without a tracking URI."""
        uri = section.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        artifacts = None
        if not uri:
            if workspace.remote:
                raise TrackingError(
                    f"the workspace {workspace.uri} is on S3, where the embedded store cannot live: set tracking.uri "
                    "in the recipe, or MLFLOW_TRACKING_URI, to an MLflow server"
                )
            store = Path(workspace.path(_EMBEDDED))
            store.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{store}/mlflow.db"
            artifacts = (store / "artifacts").as_uri()
        name = section.experiment or recipe_name
        return cls(uri, _experiment(uri, name, artifacts), section.registered_model or f"speechgpt-{recipe_name}")

    @contextmanager
    def run(
        self,
        job: str,
        parent: Run | None = None,
        inputs: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Iterator[Run]:
        """A run of `job` while the block lasts; `inputs` is {job it reads from: digest of what that left}.

        A block that raises ends the run as FAILED, an interrupt as KILLED.
        """
        labels = {"job": job, "mlflow.source.git.commit": revision(), "speechgpt.version": speechgpt.__version__}
        labels |= dict(tags or {})
        if parent:
            labels["mlflow.parentRunId"] = parent.id
        for name, digest in (inputs or {}).items():
            labels[f"input.{name}"] = digest
            if maker := self._maker(name, digest):
                labels[f"input.{name}.run"] = maker
        made = _client(self.uri).create_run(self.experiment_id, run_name=job, tags=labels)
        run = Run(self.uri, made.info.run_id)
        try:
            yield run
        except BaseException as error:
            run.end("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        run.end("FINISHED")

    def abandon(self, run_id: str) -> None:
        """Close as KILLED a run whose process died without a word; a closed one, or another store's, stays as it is."""
        from mlflow.exceptions import MlflowException

        try:
            if _client(self.uri).get_run(run_id).info.status == "RUNNING":
                Run(self.uri, run_id).end("KILLED")
        except MlflowException:
            return

    def ancestry(self, run_id: str) -> list[Ancestor]:
        """The run and every run that its inputs came from, nearest first."""
        found: dict[str, Ancestor] = {}
        ahead = [run_id]
        while ahead:
            current = ahead.pop(0)
            if current in found:
                continue
            tags = _client(self.uri).get_run(current).data.tags
            inputs = {
                name[6:]: value
                for name, value in tags.items()
                if name.startswith("input.") and not name.endswith(".run")
            }
            found[current] = Ancestor(current, tags.get("job", ""), tags.get("mlflow.source.git.commit", ""), inputs)
            ahead += [
                value for name, value in sorted(tags.items()) if name.startswith("input.") and name.endswith(".run")
            ]
        return list(found.values())

    def curve(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of what a run logged, in order of step; empty if it logged none of that name."""
        return sorted((point.step, point.value) for point in _client(self.uri).get_metric_history(run_id, metric))

    def register_bundle(self, run: Run, directory: str | Path, digest: str) -> str:
        """Log a bundle's files with the run that made it and register them; returns the version.

        A digest that is registered already keeps its version.
        """
        client = _client(self.uri)
        if version := self.version_of(digest):
            return version
        _make_model(client, self.model)
        run.log_artifacts(directory, "bundle")
        source = f"{client.get_run(run.id).info.artifact_uri}/bundle"
        made = client.create_model_version(self.model, source, run_id=run.id, tags={DIGEST: digest})
        return str(made.version)

    def register_stage(self, run: Run, stage: str, source: str, digest: str, lineage: Mapping[str, str]) -> str:
        """Register what a stage left at `source` (a path or s3://) under a name of the stage's; returns the version.

        The files stay where they are: a language model is too large to be stored twice. The version leads to its run,
        and so to the data; `lineage` is told as tags beside. A digest that is registered already keeps its version.
        """
        from mlflow.exceptions import MlflowException

        client, name = _client(self.uri), f"{self.model}-{stage}"
        _make_model(client, name)
        for version in client.search_model_versions(f"name = '{name}'"):
            if version.tags.get(DIGEST) == digest:
                return str(version.version)
        tags = {DIGEST: digest, "stage": stage, **lineage}
        try:
            made = client.create_model_version(name, source, run_id=run.id, tags=tags)
        except MlflowException as error:
            raise TrackingError(
                f"{name}: {without_password(self.uri)} does not register {source}: {error.message}"
            ) from None
        return str(made.version)

    def version_of(self, digest: str) -> str | None:
        """The registered version whose bundle has this digest."""
        versions = _client(self.uri).search_model_versions(f"name = '{self.model}'")
        return next((str(version.version) for version in versions if version.tags.get(DIGEST) == digest), None)

    def run_of(self, digest: str) -> str:
        """Id of the run that made the registered bundle of this digest (a reply's `x-speechgpt-bundle`)."""
        version = self.version_of(digest)
        if version is None:
            raise TrackingError(f"no version of {self.model} has the bundle digest {digest}")
        return str(_client(self.uri).get_model_version(self.model, version).run_id)

    def resolve(self, address: str) -> Path:
        """As `resolve`, in this store."""
        return resolve(address, self.uri)

    def promote(self, alias: str, version: str) -> None:
        """Let the alias (`champion`) name this version."""
        _client(self.uri).set_registered_model_alias(self.model, alias, version)

    def version_named(self, alias: str) -> str | None:
        """The version that the alias names."""
        from mlflow.exceptions import MlflowException

        try:
            return str(_client(self.uri).get_model_version_by_alias(self.model, alias).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _maker(self, job: str, digest: str) -> str | None:
        """Newest finished run of a job whose outputs, taken together, have this digest."""
        query = f"tags.job = '{job}' and tags.output = '{digest}' and attributes.status = 'FINISHED'"
        runs: list[MlflowRun] = _client(self.uri).search_runs([self.experiment_id], query, max_results=1)
        return runs[0].info.run_id if runs else None


def pin(address: str, uri: str = "") -> str:
    """`models:/name@alias` -> `models:/name/version`, which stays what it is when the alias moves.

    Raises TrackingError if there is no such model or alias.
    """
    from mlflow.exceptions import MlflowException

    name, at, alias = address.removeprefix("models:/").partition("@")
    if not at:
        return address
    store = store_of(address, uri)
    try:
        return f"models:/{name}/{_client(store).get_model_version_by_alias(name, alias).version}"
    except MlflowException as error:
        raise TrackingError(f"{address} is not in {without_password(store)}: {error.message}") from None


def store_of(address: str, uri: str = "") -> str:
    """Where a registered model is looked for. Raises TrackingError if nothing says."""
    store = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not store:
        raise TrackingError(
            f"{address}: in which store? Set MLFLOW_TRACKING_URI, to a server or to a workspace's embedded "
            "store (sqlite:////path/of/the/workspace/mlflow/mlflow.db)"
        )
    return store


def resolve(address: str, uri: str = "") -> Path:
    """`models:/name@alias` or `models:/name/version` -> the registered bundle's directory (a kept download if remote).

    Raises TrackingError if there is no such model, alias or version.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    store = store_of(address, uri)
    name, _, version = pin(address, store).removeprefix("models:/").partition("/")
    client = _client(store)
    try:
        source = client.get_model_version_download_uri(name, version)
        digest = client.get_model_version(name, version).tags.get(DIGEST, "")
    except MlflowException as error:
        raise TrackingError(f"{address} is not in {without_password(store)}: {error.message}") from None
    if source.startswith("file://"):
        return Path(unquote(urlsplit(source).path))

    def download(folder: Path) -> None:
        folder.mkdir()
        download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=store)

    # MLflow puts a downloaded directory into the destination, under its own name.
    return cache.keep(f"registered/{name}-{version}-{digest[:16]}", download) / PurePosixPath(source).name


@lru_cache
def revision() -> str:
    """The code's git commit, `-dirty` if files differ from it; outside a checkout SPEECHGPT_REVISION or the version."""
    try:
        # An installed copy may lie inside somebody else's checkout.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git("rev-parse", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SPEECHGPT_REVISION", f"v{speechgpt.__version__}")


def without_password(uri: str) -> str:
    """`postgresql://user:secret@host/db` -> `postgresql://host/db`, for messages."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@lru_cache
def _client(uri: str) -> "MlflowClient":
    # A run of a few files should not draw a progress bar for each.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # A server in front of S3 sends its clients there for what they ask of it, by the name that it has for S3 itself
    # (http://s3:9000 in the compose file): elsewhere they would try for ever.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    # Table creation and migrations of the embedded store are nobody's news.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _experiment(uri: str, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException:
        # Another process was faster.
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def _make_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
