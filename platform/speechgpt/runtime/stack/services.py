"""The three servers together: up in the order in which they need each other, down in the other."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from speechgpt.runtime.stack import objects, postgres, servers
from speechgpt.runtime.stack.layout import BUCKETS, HOST, Layout, StackError

MLFLOW, S3 = "mlflow", "s3"
_NEEDED = {"psycopg2": "psycopg2-binary", "moto": "moto[s3]", "flask_cors": "flask-cors"}


def up(layout: Layout) -> Iterator[str]:
    """Start what does not run, telling each step. Raises StackError."""
    absent = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if absent:
        raise StackError(f"{', '.join(absent)} not installed: pip install 'speechgpt-ray[stack]'")
    layout.prepare()
    postgres.start(layout)
    yield f"PostgreSQL on port {layout.postgres_port}"
    fresh = servers.running(layout.directory, S3) is None
    command = [sys.executable, "-m", "moto.server", "--host", HOST, "--port", str(layout.s3_port)]
    servers.start(layout.directory, S3, command, {}, layout.s3_port)
    if fresh:
        _fill(layout)
    yield f"S3 server at {layout.endpoint}, buckets {', '.join(BUCKETS)}"
    start_mlflow(layout)
    yield f"MLflow at {layout.tracking_uri}"


def start_mlflow(layout: Layout) -> None:
    environment = layout.environment() | {
        "MLFLOW_BACKEND_STORE_URI": layout.backend_uri,
        "PGPASSFILE": str(layout.password_file),
        # Otherwise the server starts eight more processes for work that nobody gives it here.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(layout.mlflow_port)]
    command += ["--workers", "1", "--serve-artifacts", "--artifacts-destination", f"s3://{BUCKETS[1]}"]
    servers.start(layout.directory, MLFLOW, command, environment, layout.mlflow_port)


def down(layout: Layout) -> Iterator[str]:
    """Stop what runs; objects are kept for the next `up`."""
    if servers.stop(layout.directory, MLFLOW):
        yield "MLflow stopped"
    if servers.running(layout.directory, S3):
        count = objects.save(s3_client(layout), BUCKETS, layout.objects)
        servers.stop(layout.directory, S3)
        yield f"S3 server stopped, {count} objects kept in {layout.objects}"
    if postgres.stop(layout):
        yield "PostgreSQL stopped"


def status(layout: Layout) -> dict[str, bool]:
    """{server: whether it runs and listens}"""
    return {
        "postgres": postgres.running(layout),
        S3: servers.running(layout.directory, S3) is not None and servers.listens(layout.s3_port),
        MLFLOW: servers.running(layout.directory, MLFLOW) is not None and servers.listens(layout.mlflow_port),
    }


def s3_client(layout: Layout) -> Any:
    import boto3

    known = layout.environment()
    return boto3.client(
        "s3",
        endpoint_url=layout.endpoint,
        aws_access_key_id=known["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=known["AWS_SECRET_ACCESS_KEY"],
        region_name=known["AWS_DEFAULT_REGION"],
    )


def _fill(layout: Layout) -> None:
    """The server's memory is empty: bring back what it held when it went down."""
    s3 = s3_client(layout)
    for bucket in BUCKETS:
        s3.create_bucket(Bucket=bucket)
    if layout.objects.is_dir():
        objects.load(s3, layout.objects)
