"""Tracking stores before MLflow touches them: is one there, what to call it, who may create its schema.

MLflow tries again for minutes where nobody answers, and names passwords in its errors. So each store is first
met here, once and quickly, and is called by `shown` in whatever is printed or written.
"""

from __future__ import annotations

import hashlib
import re
import socket
import sqlite3
import urllib.parse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from flows.errors import ResourceError

SQLITE = "sqlite:///"
CONNECT_S = 10
SCHEMA_LOCK = 0x7472756E6B6C696E  # any number, the same for all who use one PostgreSQL database


class StoreAway(ResourceError):
    """The store exists as far as one can tell, but does not answer now."""


def is_server(uri: str) -> bool:
    """An MLflow server, rather than a database that this process opens itself."""
    return uri.startswith(("http://", "https://"))


def is_postgres(uri: str) -> bool:
    return uri.startswith(("postgresql://", "postgresql+"))


def shown(uri: str) -> str:
    """`uri` without its password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


def without_password(text: str, uri: str) -> str:
    """A message of a library that may quote `uri` or its password, without either."""
    secret = urllib.parse.urlsplit(uri).password if "://" in uri else None
    text = text.replace(uri, shown(uri))
    for word in {secret, urllib.parse.unquote(secret)} if secret else set():
        text = text.replace(word, "***")
    return text


def identity(uri: str) -> str:
    """The same for the same store, whatever its password is this week."""
    return hashlib.sha256(shown(uri).encode()).hexdigest()[:16]


def probe(uri: str) -> None:
    """Meet the store once.

    Raises:
        StoreAway: it does not answer; later it may.
        OSError, sqlite3.Error, ResourceError: it cannot be used as it is, with the reason.
    """
    if uri.startswith(SQLITE):
        path = Path(uri.removeprefix(SQLITE).partition("?")[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    elif is_server(uri):
        address = urllib.parse.urlsplit(uri)
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname or "", port), timeout=CONNECT_S).close()
        except socket.gaierror:
            raise  # a name that nobody knows is a mistake rather than an outage
        except OSError as error:
            raise StoreAway(str(error)) from None
    elif is_postgres(uri):
        with _postgres(uri):
            pass


@contextmanager
def alone_with_schema(uri: str) -> Iterator[None]:
    """For PostgreSQL: one process of all machines at a time. (Those of one clone have a file lock.)"""
    if not is_postgres(uri):
        yield
        return
    import sqlalchemy

    with _postgres(uri) as connection:
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({SCHEMA_LOCK})"))
        yield  # closing the connection releases it


@contextmanager
def _postgres(uri: str) -> Iterator[Any]:
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(
            uri, connect_args={"connect_timeout": CONNECT_S}, poolclass=sqlalchemy.pool.NullPool
        )
        connection = engine.connect()
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"{error}; begin it with postgresql+psycopg:// and pip install --editable '.[postgres]'"
        ) from None
    except sqlalchemy.exc.OperationalError as error:
        reason = without_password(" ".join(str(error.orig).split()), uri)
        if any(words in reason for words in ABSENT):
            raise StoreAway(reason) from None
        raise ResourceError(reason) from None
    with connection:
        yield connection


ABSENT = (
    "Connection refused",
    "No such file or directory",  # its Unix socket
    "timeout expired",
    "timed out",
    "starting up",
    "shutting down",
    "server closed the connection",
    "Network is unreachable",
    "No route to host",
    "too many clients",
)
