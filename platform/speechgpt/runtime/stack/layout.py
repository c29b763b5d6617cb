"""Where the stack of this machine keeps its files, and on which ports it listens."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

DATABASE = "mlflow"
USER = "speechgpt"
BUCKETS = ("speechgpt", "mlflow")
"""For workspaces, and for MLflow's artifacts."""
HOST = "127.0.0.1"
"""Nothing here asks who is there, so nothing here listens elsewhere."""


class StackError(RuntimeError):
    """A part that is missing or did not start; the message says what to do."""


@dataclass(frozen=True)
class Layout:
    directory: Path
    postgres_port: int = 5433
    mlflow_port: int = 5000
    s3_port: int = 9000

    @property
    def data(self) -> Path:
        return self.directory / "postgres"

    @property
    def objects(self) -> Path:
        """The S3 server's objects while it is down; it holds them in memory."""
        return self.directory / "objects"

    @property
    def password_file(self) -> Path:
        """In libpq's format, so that no password stands in a URI, a command line or an environment."""
        return self.directory / "pgpass"

    @property
    def backend_uri(self) -> str:
        return f"postgresql+psycopg2://{USER}@{HOST}:{self.postgres_port}/{DATABASE}"

    @property
    def tracking_uri(self) -> str:
        return f"http://{HOST}:{self.mlflow_port}"

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.s3_port}"

    def environment(self) -> dict[str, str]:
        """What clients of the stack need. The keys are no secret: the server takes any, and is on loopback."""
        return {
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "AWS_ENDPOINT_URL": self.endpoint,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "stack",
            "AWS_SECRET_ACCESS_KEY": "stack",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def prepare(self) -> None:
        """Make the directory and a password of its own."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.password_file.exists():
            descriptor = os.open(self.password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(f"*:*:*:{USER}:{secrets.token_urlsafe(24)}\n")

    def password(self) -> str:
        return self.password_file.read_text().strip().rpartition(":")[2]


def default_directory() -> Path:
    """PostgreSQL refuses to run as root, and its user cannot look into root's home."""
    return Path("/var/lib/speechgpt/stack") if os.geteuid() == 0 else Path.home() / ".speechgpt" / "stack"
