"""Databases to test on: SQLite files always, and a PostgreSQL server of our own where its binaries are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

BINARIES = ("initdb", "pg_ctl", "psql")


def _binaries() -> Path | None:
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), Path("/usr/local/bin"), Path("/usr/bin")]
    for folder in folders:
        if all((folder / name).exists() for name in BINARIES):
            return folder
    return None


def _as_other_user(folder: Path) -> list[str]:
    """PostgreSQL refuses to run as root; then it runs as `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("not run: no setpriv to leave root with, and PostgreSQL refuses root")
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        os.chown(folder, user.pw_uid, user.pw_gid)
        return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    pytest.skip("not run: no unprivileged user to run PostgreSQL as")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One PostgreSQL server in a temporary folder; its password is SECRET."""

    SECRET = "s3cret-canary"

    def __init__(self, folder: Path, bin_dir: Path) -> None:
        self.folder, self.port = folder, _free_port()
        self._bin, self._as_user = bin_dir, _as_other_user(folder)
        secret = folder / "password"
        secret.write_text(self.SECRET)
        secret.chmod(0o644)
        data = str(folder / "data")
        self._run("initdb", "-D", data, "-U", "tester", "-A", "scram-sha-256", f"--pwfile={secret}", "-N")
        options = f"-p {self.port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._start = ("pg_ctl", "-D", data, "-w", "-t", "60", "-l", str(folder / "log"), "-o", options, "start")
        self.start()

    def _run(self, name: str, *arguments: str) -> None:
        command = [*self._as_user, str(self._bin / name), *arguments]
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=90, cwd=self.folder
        )

    def start(self) -> None:
        self._run(*self._start)

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "immediate", "stop")

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://tester:{self.SECRET}@127.0.0.1:{self.port}/{database}"

    def fresh_database(self) -> str:
        import psycopg

        name = f"t{uuid.uuid4().hex[:10]}"
        address = f"host=127.0.0.1 port={self.port} user=tester password={self.SECRET} dbname=postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    bin_dir = _binaries()
    if bin_dir is None:
        pytest.skip("not run: no PostgreSQL server binaries")
    pytest.importorskip("psycopg", reason="not run: psycopg is not installed")
    with tempfile.TemporaryDirectory(prefix="tuner-pg-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        folder.chmod(0o755)
        server = Server(folder, bin_dir)
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies/studies.db"


@pytest.fixture
def postgres_url(postgres_server: Server) -> str:
    return postgres_server.fresh_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """Every test that takes `url` runs on both."""
    name = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    found: str = request.getfixturevalue(name)
    return found
