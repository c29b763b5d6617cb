"""A PostgreSQL server of the stack's own, from Debian's package or any other that is installed."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from speechgpt.runtime.stack.layout import DATABASE, HOST, USER, Layout, StackError

_SERVICE_USER = "postgres"


def start(layout: Layout) -> None:
    """Make the database cluster if there is none, and start it. Raises StackError."""
    if not (layout.data / "PG_VERSION").exists():
        _make(layout)
    if running(layout):
        return
    # The socket lies beside the data: the system's own directory belongs to the system's own server.
    options = f"-h {HOST} -p {layout.postgres_port} -k {layout.data}"
    _control(layout, "start", "--wait", "--log", str(layout.data / "server.log"), "--options", options)
    query = f"select 1 from pg_database where datname='{DATABASE}'"
    found = _client(layout, "psql", "--dbname", "postgres", "-tAc", query)
    if not found.stdout.strip():
        _client(layout, "createdb", DATABASE)


def stop(layout: Layout) -> bool:
    """False if it did not run."""
    if not running(layout):
        return False
    _control(layout, "stop", "--wait", "--mode", "fast")
    return True


def running(layout: Layout) -> bool:
    if not (layout.data / "postmaster.pid").exists():
        return False
    return _as_its_user([str(_program("pg_ctl")), "status", "--pgdata", str(layout.data)]).returncode == 0


def dump(layout: Layout, file: Path) -> None:
    """The whole database, consistent while others write, in PostgreSQL's own archive format."""
    _client(layout, "pg_dump", "--format=custom", f"--file={file}", DATABASE)


def load(layout: Layout, file: Path) -> None:
    """Put back what `dump` wrote, in place of what is there, all of it or nothing."""
    words = ("--clean", "--if-exists", "--no-owner", "--single-transaction", f"--dbname={DATABASE}", str(file))
    _client(layout, "pg_restore", *words)


def _make(layout: Layout) -> None:
    layout.data.mkdir(parents=True, exist_ok=True)
    password = layout.data.parent / "initial-password"
    password.write_text(layout.password() + "\n")
    password.chmod(0o600)
    if os.geteuid() == 0:
        for path in (layout.data, password):
            shutil.chown(path, _SERVICE_USER)
    try:
        command = [str(_program("initdb")), "--pgdata", str(layout.data), "--username", USER, "--encoding", "UTF8"]
        command += ["--auth", "scram-sha-256", "--pwfile", str(password), "--no-instructions", "--locale", "C.UTF-8"]
        _checked(_as_its_user(command), "make a PostgreSQL database cluster")
    finally:
        password.unlink()


def _control(layout: Layout, verb: str, *words: str) -> None:
    command = [str(_program("pg_ctl")), verb, "--pgdata", str(layout.data), *words]
    _checked(_as_its_user(command), f"{verb} PostgreSQL ({layout.data}/server.log)")


def _client(layout: Layout, program: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [str(_program(program)), "--host", HOST, "--port", str(layout.postgres_port), "--username", USER, *words]
    environment = os.environ | {"PGPASSFILE": str(layout.password_file)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return _checked(done, f"run {program}")


def _as_its_user(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """PostgreSQL does not run as root. Its output goes to a file: a server that stays would keep a pipe open."""
    who: dict[str, Any] = {}
    if os.geteuid() == 0:
        who = {"user": _SERVICE_USER, "group": _SERVICE_USER, "extra_groups": []}
    try:
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(command, stdout=output, stderr=output, cwd="/", check=False, **who)
            output.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, "", output.read())
    except LookupError:
        raise StackError(f"there is no user {_SERVICE_USER!r}: apt-get install postgresql makes it") from None


def _checked(done: "subprocess.CompletedProcess[str]", what: str) -> "subprocess.CompletedProcess[str]":
    if done.returncode:
        raise StackError(f"could not {what}: {done.stderr.strip()}")
    return done


def _program(name: str) -> Path:
    """From the newest version that Debian installed, which does not put them on the path, else from the path."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    if debian:
        return debian[-1]
    if found := shutil.which(name):
        return Path(found)
    raise StackError(f"PostgreSQL's {name} is not here: apt-get install postgresql")
