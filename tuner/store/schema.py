"""Makes and migrates our tables where a store is written, changes nothing where one is read, and refuses what is no
store of ours: damaged, empty, another program's, or written by a newer tuner.

A new SQLite store is made complete under another name and then put in place, so a store file that exists has its
tables, wherever its maker was killed.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, Engine, create_engine, inspect
from sqlalchemy.pool import StaticPool

from tuner.contract.errors import StoreError
from tuner.store.engine import (
    damaged,
    for_writing,
    is_sqlite,
    make_engine,
    make_reader,
    read_only,
    setup_lock,
    shown,
    sqlite_path,
)
from tuner.store.tables import SCHEMA_REVISION, VERSION_TABLE, metadata

if TYPE_CHECKING:
    from alembic.config import Config

_HEADER = b"SQLite format 3\x00"
_OPTUNA_TABLES = {"studies", "trials", "version_info"}
_CHECKED_BYTES = 128 << 20
"""Files up to this size are checked whole at every start; that takes well under a second."""


def open_engine(url: URL, lock_timeout_s: float) -> Engine:
    """An engine on a database whose tables are there and current. Raises StoreError, SQLAlchemyError, OSError."""
    if is_sqlite(url):
        with suppress(FileExistsError):
            sqlite_path(url).parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(url, lock_timeout_s)
    try:
        with setup_lock(engine, lock_timeout_s):
            if is_sqlite(url):
                _settle_file(url, lock_timeout_s)
                _check_file(engine)
            _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def open_reader(url: URL, lock_timeout_s: float, *, empty: bool) -> Engine:
    """An engine for reading a store that is there; nothing is made, migrated or changed.

    `empty`: a SQLite file that is not there is read as a store without studies. Raises StoreError, SQLAlchemyError,
    OSError.
    """
    if is_sqlite(url) and not sqlite_path(url).exists():
        if not empty:
            raise StoreError(
                f"{shown(url)}: there is no such store; correct --storage (`tuner optimize` makes a new one)"
            )
        engine = create_engine("sqlite://", poolclass=StaticPool)
        metadata.create_all(engine)
        return engine
    if is_sqlite(url):
        _check_kind(sqlite_path(url))
        _refuse_foreign(url)
    engine = make_reader(url, lock_timeout_s)
    try:
        if is_sqlite(url):
            _check_pages(engine, sqlite_path(url))
        found = _revision(engine)
        if found is None:
            raise StoreError(f"{shown(url)}: no study of the tuner's is kept there; nothing in it was changed")
        if found != SCHEMA_REVISION:
            with engine.connect() as connection:
                _refuse_newer(connection, alembic_config(), shown(url))
            raise StoreError(f"{shown(url)}: written by an older tuner; `tuner optimize` brings it up to date")
    except BaseException:
        engine.dispose()
        raise
    return engine


def _settle_file(url: URL, lock_timeout_s: float) -> None:
    path = sqlite_path(url)
    if not path.exists():
        _create_file(path, url, lock_timeout_s)
    _check_kind(path)
    _refuse_foreign(url)


def _refuse_foreign(url: URL) -> None:
    """Another program's database stays as it is. Optuna's own has room for ours."""
    names = _tables(url, alone=True) or _tables(url)
    if names and VERSION_TABLE not in names and not names >= _OPTUNA_TABLES:
        known = ", ".join(sorted(names)[:3])
        raise StoreError(
            f"{shown(url)}: it is the database of another program (it holds {known}); nothing in it was changed. "
            "Name another --storage"
        )


def _tables(url: URL, *, alone: bool = False) -> set[str]:
    """Of the file itself where it is read `alone`: somebody may just be writing it, and only its own answer counts."""
    try:
        with closing(read_only(sqlite_path(url), alone=alone)) as connection:
            return {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error:
        if alone:
            return set()
        raise


def _check_kind(path: Path) -> None:
    if not path.is_file():
        raise StoreError(f"{path}: this is not a file; --storage needs the path of a SQLite file")
    with path.open("rb") as file:
        head = file.read(len(_HEADER))
    if not head:
        raise StoreError(
            f"{path}: the file is empty, so it is no store (one may have been lost here); "
            "restore a copy, or delete it to start anew"
        )
    if head != _HEADER:
        raise StoreError(f"{path}: this is no SQLite database; nothing in it was changed. Name another --storage")


def _create_file(path: Path, url: URL, lock_timeout_s: float) -> None:
    for stale in path.parent.glob(f".{path.name}.new-*"):
        stale.unlink(missing_ok=True)
    draft = path.with_name(f".{path.name}.new-{os.getpid()}")
    engine = make_engine(url.set(database=str(draft)), lock_timeout_s)
    try:
        with engine.connect() as connection:
            _use_wal(connection)
        _migrate(engine)
    finally:
        engine.dispose()
    _put_in_place(draft, path)


def _put_in_place(draft: Path, path: Path) -> None:
    """Never over a file that is there: should someone have been quicker, theirs is used."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    with suppress(FileExistsError):
        try:
            os.link(draft, path)
        except PermissionError:  # a file system without hard links
            if not path.exists():
                draft.rename(path)
    for rest in path.parent.glob(f"{draft.name}*"):
        rest.unlink(missing_ok=True)


def _use_wal(connection: Connection) -> None:
    """Readers and one writer at a time; the setting stays in the file."""
    driver = connection.connection.driver_connection
    assert driver is not None
    if driver.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        driver.execute("PRAGMA journal_mode=WAL")


def _check_file(engine: Engine) -> None:
    with engine.connect() as connection:
        _use_wal(connection)
    _check_pages(engine, sqlite_path(engine.url))


def _check_pages(engine: Engine, path: Path) -> None:
    with engine.connect() as connection:
        if path.stat().st_size <= _CHECKED_BYTES:
            verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if verdict != "ok":
                reason = " ".join(str(verdict).split())
                raise StoreError(damaged(str(path), reason))


def _migrate(engine: Engine) -> None:
    if _revision(engine) == SCHEMA_REVISION:
        return
    from alembic import command

    config = alembic_config()
    with for_writing(engine) as connection:
        _refuse_newer(connection, config, shown(engine.url))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revision(bind: Engine | Connection) -> str | None:
    if not inspect(bind).has_table(VERSION_TABLE):
        return None
    sql = f"SELECT version_num FROM {VERSION_TABLE}"
    if isinstance(bind, Connection):
        return bind.exec_driver_sql(sql).scalar()
    with bind.connect() as connection:
        return connection.exec_driver_sql(sql).scalar()


def _refuse_newer(connection: Connection, config: Config, place: str) -> None:
    from alembic.script import ScriptDirectory

    found = _revision(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise StoreError(
            f"{place}: written by a newer tuner (its schema is {found!r}, known here is up to "
            f"{SCHEMA_REVISION!r}); nothing in it was changed. Update tuner, or name another --storage"
        )


def alembic_config() -> Config:
    """Alembic's settings without an ini file."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    return config
