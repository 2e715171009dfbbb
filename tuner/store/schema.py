"""Makes and migrates our tables, and refuses what is not a store of ours: damaged, empty, or written by a newer tuner.

A new SQLite store is made complete under another name and then put in place, so a store file that exists has its
tables, wherever its maker was killed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, Engine, inspect

from tuner.contract.errors import StoreError
from tuner.store.engine import damaged, for_writing, is_sqlite, make_engine, setup_lock, shown, sqlite_path
from tuner.store.tables import SCHEMA_REVISION, VERSION_TABLE

if TYPE_CHECKING:
    from alembic.config import Config

_HEADER = b"SQLite format 3\x00"
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


def _settle_file(url: URL, lock_timeout_s: float) -> None:
    path = sqlite_path(url)
    if not path.exists():
        _create_file(path, url, lock_timeout_s)
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
    path = sqlite_path(engine.url)
    with engine.connect() as connection:
        _use_wal(connection)
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
        _refuse_newer(connection, config)
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


def _refuse_newer(connection: Connection, config: Config) -> None:
    from alembic.script import ScriptDirectory

    found = _revision(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise StoreError(
            f"{shown(connection.engine.url)}: written by a newer tuner (its schema is {found!r}, known here is up to "
            f"{SCHEMA_REVISION!r}); nothing in it was changed. Update tuner, or name another --storage"
        )


def alembic_config() -> Config:
    """Alembic's settings without an ini file."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    return config
