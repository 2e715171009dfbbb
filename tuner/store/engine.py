"""How the store reaches its database: URLs shown without passwords, durable connections, one lock while tables are
made, and every database error as one line that names the store."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool, StaticPool

from tuner.contract.errors import StoreError, StoreOutage

LOCK_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 10
_SETUP_KEY = 7_405_116_227
"""Advisory lock on PostgreSQL that whoever makes tables holds; any number that no one else uses."""
_HIDDEN = "***"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,40}")
_SECRET = re.compile(r"pass|pwd|secret|token|key|credential", re.IGNORECASE)
"""Names of what a URL says after its question mark, and nobody may read."""
_OUTAGE = re.compile(
    r"is locked|lock timeout|timeout expired|timed out|statement timeout|disk is full|no space left|disk I/O error"
    r"|connection refused|server closed|connection (is|was|has been) (lost|closed|reset)|broken pipe|SSL SYSCALL"
    r"|terminating connection|starting up|shutting down|in recovery|too many (clients|connections)|connection slots"
    r"|no route to host|network is unreachable",
    re.IGNORECASE,
)
"""What a database says that will be there again. A refused connection is taken for a server that is down."""
_MISTYPED = re.compile(r"resolve|translate host|does not exist|authentication failed|no password", re.IGNORECASE)
"""What only another URL can mend."""
_DAMAGED = "the file is damaged ({}); nothing in it was changed. Restore a copy, or move it away"


class DurableConnection(sqlite3.Connection):
    """A SQLite connection whose commits are on the disk when they return."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA synchronous=FULL")


def parse_url(text: str) -> URL:
    """The SQLAlchemy URL in `text`; plain `postgresql://` means psycopg. Raises StoreError, never echoing passwords."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        scheme = text.partition(":")[0]
        begins = f" (it begins with {scheme!r})" if _SCHEME.fullmatch(scheme) and "@" not in text else ""
        raise StoreError(
            f"--storage: this is no database URL{begins}; expected is sqlite:///PATH or postgresql://USER@HOST/DATABASE"
        ) from None
    if not is_sqlite(url) and "@" in f"{url.host}{url.database}":
        raise StoreError(
            "--storage: there is an `@` too many, so where the password ends cannot be told; "
            "within a user's name or a password write it as %40 (and / as %2F, : as %3A)"
        )
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if is_sqlite(url) and url.database in (None, "", ":memory:"):
        raise StoreError("--storage: a SQLite store needs a file: sqlite:///studies/studies.db")
    if is_sqlite(url) and url.query:
        names = ", ".join(sorted(url.query))
        raise StoreError(f"--storage: a SQLite store takes nothing after a question mark (got {names}); leave it out")
    return url


def is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def sqlite_path(url: URL) -> Path:
    return Path(str(url.database))


def shown(url: URL) -> str:
    """The URL for people, its password hidden wherever it stands."""
    hidden = {key: _HIDDEN for key in url.query if _SECRET.search(key)}
    return url.update_query_dict(hidden).render_as_string(hide_password=True).replace(quote(_HIDDEN), _HIDDEN)


def as_typed(text: str) -> str:
    """The URL in `text`, for people: as it is, or with its password hidden where it holds one. Raises StoreError."""
    url = parse_url(text)
    secret = url.password is not None or any(_SECRET.search(key) for key in url.query)
    return shown(url) if secret else text


def full(url: URL) -> str:
    """The URL for a driver, password included: never for people."""
    return url.render_as_string(hide_password=False)


def engine_options(url: URL, lock_timeout_s: float = LOCK_TIMEOUT_S) -> dict[str, Any]:
    """Keyword arguments for `create_engine`; ours and Optuna's connections are made alike."""
    if is_sqlite(url):
        return {"connect_args": {"timeout": lock_timeout_s, "factory": DurableConnection}}
    if url.get_backend_name() == "postgresql":
        limits = f"-c lock_timeout={round(lock_timeout_s * 1000)}"
        connect: dict[str, Any] = {"connect_timeout": _CONNECT_TIMEOUT_S}
        if "options" not in url.query:
            connect["options"] = limits
        return {"pool_pre_ping": True, "connect_args": connect}
    return {"pool_pre_ping": True}


def make_reader(url: URL, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Engine:
    """An engine that cannot write, and beside a SQLite file makes no other. Raises StoreError as `make_engine` does."""
    if not is_sqlite(url):
        return make_engine(url, lock_timeout_s)
    path = sqlite_path(url)
    pool = StaticPool if _lacks_index(path) else NullPool  # a copy is made once
    return create_engine("sqlite://", poolclass=pool, creator=lambda: read_only(path, lock_timeout_s))


def read_only(path: Path, lock_timeout_s: float = LOCK_TIMEOUT_S, *, alone: bool = False) -> sqlite3.Connection:
    """A connection for reading alone, which changes nothing in the file nor beside it. Raises sqlite3.Error, OSError.

    Without a log beside it the file is whole, and is read as one that does not change: SQLite needs no files beside it
    then, so that a file can be read in a folder that nobody may write to. With a log its index is read, not written;
    where it has none, a copy is read. `alone`: what the file itself holds, whatever lies beside it.
    """
    if not alone and _lacks_index(path):
        return _copy_in_memory(path)
    in_use = _beside(path, "-wal").exists() or _size(_beside(path, "-journal")) > 0
    how = "&readonly_shm=1" if in_use and not alone else "&immutable=1"
    place = f"file:{quote(str(path.absolute()))}?mode=ro{how}"
    return _readable(sqlite3.connect(place, uri=True, timeout=lock_timeout_s, check_same_thread=False))


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _size(path: Path) -> int:
    """0 where there is no such file."""
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _lacks_index(path: Path) -> bool:
    """Has it a log whose index SQLite would have to make beside it?"""
    return _beside(path, "-wal").exists() and not _beside(path, "-shm").exists()


def _copy_in_memory(path: Path) -> sqlite3.Connection:
    """The database with what its log holds."""
    found = sqlite3.connect(":memory:", check_same_thread=False)
    with tempfile.TemporaryDirectory(prefix="tuner-read-") as folder:
        copy = Path(folder) / "copy.db"
        for beside in ("", "-wal"):
            shutil.copyfile(_beside(path, beside), _beside(copy, beside))
        with closing(sqlite3.connect(copy)) as source:
            source.backup(found)
    return _readable(found)


def _readable(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection


def make_engine(url: URL, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Engine:
    """An engine whose transactions opened `for_writing` take SQLite's write lock at their start.

    Raises StoreError when the driver is not installed.
    """
    try:
        engine = create_engine(url, **engine_options(url, lock_timeout_s))
    except NoSuchModuleError:
        raise StoreError(
            f"{shown(url)}: databases of kind {url.drivername!r} are not known here; use sqlite or postgresql"
        ) from None
    except ImportError as error:
        raise StoreError(
            f"{shown(url)}: the database driver {error.name!r} is not installed; "
            "for PostgreSQL: pip install 'tuner[postgres]'"
        ) from None
    if is_sqlite(url):
        _own_transactions(engine)
    return engine


def _own_transactions(engine: Engine) -> None:
    """BEGIN is ours: Python's sqlite3 begins late, so that two writers could both read before either writes."""

    @event.listens_for(engine, "connect")
    def _no_implicit_begin(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("tuner_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


@contextmanager
def for_writing(engine: Engine) -> Iterator[Connection]:
    """One transaction that writes: committed at the end of the block, undone by any exception."""
    with engine.connect().execution_options(tuner_write=True) as connection, connection.begin():
        yield connection


@contextmanager
def setup_lock(engine: Engine, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """One process at a time makes or migrates tables in this database. Raises StoreError after `timeout_s`."""
    if is_sqlite(engine.url):
        with _folder_lock(sqlite_path(engine.url).resolve().parent, engine.url, timeout_s):
            yield
    elif engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({_SETUP_KEY})")
            try:
                yield
            finally:
                connection.exec_driver_sql(f"SELECT pg_advisory_unlock({_SETUP_KEY})")
    else:
        yield


@contextmanager
def _folder_lock(folder: Path, url: URL, timeout_s: float) -> Iterator[None]:
    """The folder itself is locked, so no lock file is left behind (and SQLite's own locks are not touched)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _wait_for(handle, url, time.monotonic() + timeout_s)
        yield
    finally:
        os.close(handle)


def _wait_for(handle: int, url: URL, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreOutage(f"{shown(url)}: another process has been setting the store up for too long") from None
            time.sleep(0.02)
        except OSError:
            return  # a file system without locks: the tables are still made in one transaction


@contextmanager
def readable_errors(url: URL, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Turns database errors into StoreError, or StoreOutage: one line with the store's name and the reason."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise readable(error, url, lock_timeout_s) from None


def readable(error: Exception, url: URL, lock_timeout_s: float = LOCK_TIMEOUT_S) -> StoreError:
    """What a database error means for a user."""
    text = str(getattr(error, "orig", None) or error)
    passes = _OUTAGE.search(text) is not None and _MISTYPED.search(text) is None
    return (StoreOutage if passes else StoreError)(explain(error, url, lock_timeout_s))


def explain(error: Exception, url: URL, lock_timeout_s: float = LOCK_TIMEOUT_S) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = _scrubbed(" ".join(str(cause).split("\n")[0].split()), url) or type(cause).__name__
    return f"{shown(url)}: {_known_reason(text, lock_timeout_s) or text}"


def damaged(name: str, reason: str) -> str:
    return f"{name}: {_DAMAGED.format(reason)}"


def _known_reason(text: str, lock_timeout_s: float) -> str | None:
    low = text.lower()
    if is_lock_message(low):
        return f"locked by another process for more than {lock_timeout_s:g} s; end that process, or try again later"
    if "malformed" in low or "not a database" in low:
        return _DAMAGED.format(text)
    if "disk is full" in low or "no space left" in low:
        return "disk full: nothing more can be stored; rows stored before are still readable"
    if "readonly" in low or "read-only" in low:
        return "the file is read-only for this user"
    if "unable to open database file" in low:
        return "the file cannot be opened; check that the folder exists and may be written to"
    if "connection" in low and ("failed" in low or "refused" in low or "closed" in low or "terminat" in low):
        return f"the store cannot be reached: {text}"
    return None


def is_lock_message(text: str) -> bool:
    low = text.lower()
    return "database is locked" in low or "database table is locked" in low or "lock timeout" in low


def _scrubbed(text: str, url: URL) -> str:
    secrets = [str(url.password)] if url.password else []
    for key, value in url.query.items():
        secrets += ([value] if isinstance(value, str) else value) if _SECRET.search(key) else ()
    for secret in secrets:
        for written in (secret, quote(secret, safe=""), quote_plus(secret)):
            text = text.replace(written, _HIDDEN)
    return text
