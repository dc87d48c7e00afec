"""PostgreSQL and an S3-compatible store on loopback, for the tests that want the real thing."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows import ports
from flows.supervisor import fetch

PASSWORD = "se/cr:et@1"  # what a URI has to quote
QUOTED = "se%2Fcr%3Aet%401"
PATIENCE_S = 120.0


def find_program(name: str) -> str | None:
    """Debian keeps PostgreSQL's servers out of PATH."""
    return shutil.which(name) or next(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)


@dataclass
class Postgres:
    folder: Path
    port: int
    user: str | None
    process: subprocess.Popen[bytes] | None = None

    def uri(self, database: str, driver: str = "psycopg", password: str = QUOTED) -> str:
        return f"postgresql+{driver}://trunkline:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        program = find_program("postgres")
        assert program
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(program, "-D", str(self.folder / "data"), "-p", str(self.port)),
                    *("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}"),
                    *("-c", "fsync=off"),
                ],
                stdout=log,
                stderr=log,
                user=self.user,
                cwd=self.folder,
            )
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.execute("SELECT 1", "postgres")
                return
            except Exception:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            self.process = None

    def execute(self, statement: str, database: str) -> list[tuple[object, ...]]:
        import psycopg

        uri = self.uri(database).replace("+psycopg", "")
        with contextlib.closing(psycopg.connect(uri, autocommit=True)) as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return list(cursor.fetchall()) if cursor.description else []

    def create(self, database: str) -> str:
        """An empty database; its URI."""
        self.execute(f"CREATE DATABASE {database}", "postgres")
        return self.uri(database)


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Its server refuses to run as root, and the user it runs as must reach its folder."""
    pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    initdb = find_program("initdb")
    if not initdb or not find_program("postgres"):
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    user = None
    folder = Path(tempfile.mkdtemp(prefix="trunkline-pg-"))
    (folder / "password").write_text(PASSWORD)
    if os.geteuid() == 0:
        known = {entry.pw_name: entry for entry in pwd.getpwall()}
        found = known.get("postgres") or known["nobody"]
        user = found.pw_name
        for path in (folder, folder / "password"):
            os.chown(path, found.pw_uid, found.pw_gid)
    server = Postgres(folder, ports.free_port(), user)
    try:
        subprocess.run(
            [
                *(initdb, "-D", str(folder / "data"), "-U", "trunkline", "--auth=scram-sha-256"),
                *("--pwfile", str(folder / "password"), "--encoding=UTF8", "--locale=C", "--no-sync"),
            ],
            check=True,
            capture_output=True,
            user=user,
            cwd=folder,
        )
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@dataclass
class ObjectStore:
    """moto's server: the S3 protocol over HTTP, with the bytes in its memory."""

    url: str
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        """How a person would point at it. (Names of AWS: both boto3 and DVC read them.)"""
        return {
            "AWS_ACCESS_KEY_ID": "trunkline",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "MLFLOW_S3_ENDPOINT_URL": self.url,
        }

    def keys(self, prefix: str) -> list[str]:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="trunkline",
            aws_secret_access_key="secret",
        )
        found = client.list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", [])
        return [str(entry["Key"]) for entry in found]


@contextlib.contextmanager
def running_object_store() -> Iterator[ObjectStore]:
    for module in ("moto.server", "dvc_s3", "boto3"):
        pytest.importorskip(module, reason="the extras s3 and test are not installed")
    port = ports.free_port()
    store = ObjectStore(f"http://127.0.0.1:{port}", "trunkline")
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                try:
                    fetch(f"{store.url}/moto-api/")
                    break
                except OSError:
                    assert process.poll() is None, "moto's server ended by itself"
                    assert time.monotonic() < deadline, "moto's server does not answer"
                    time.sleep(0.1)
            import boto3

            boto3.client(
                "s3",
                endpoint_url=store.url,
                region_name="us-east-1",
                aws_access_key_id="trunkline",
                aws_secret_access_key="secret",
            ).create_bucket(Bucket=store.bucket)
            yield store
        finally:
            process.kill()
            process.wait(30)
