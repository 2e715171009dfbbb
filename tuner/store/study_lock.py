"""Where a study is held: one process at a time works on it, whatever host it is on. Whoever came second would take the
first's running probe for one that a crash interrupted.

Beside a SQLite file it is a file; on a server it is a lock of the session, which ends with the connection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sqlalchemy import Connection, Engine, text

from tuner.holders import FilePlace, Holder, Place, Taken
from tuner.store.engine import LOCK_TIMEOUT_S, is_sqlite, make_engine, parse_url, readable_errors, sqlite_path

_CLASS = 7_405_117
"""First half of the keys of our advisory locks on PostgreSQL; any number that no one else uses."""
_SAID = "tuner"
"""How the name begins by which a session on PostgreSQL says who it is: `tuner PID HOST SINCE`."""
_NAME_BYTES = 63
_DIALECTS = ("postgresql", "mysql", "mariadb")
_HOLDERS = text(
    "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND granted "
    "AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND classid = :class AND objid = :key"
)


def study_place(url: str, study: str) -> Place:
    """Where `study` of the store at `url` is held. Its `take` raises StoreError too. Raises StoreError."""
    address = parse_url(url)
    if is_sqlite(address):
        path = sqlite_path(address).resolve()
        return FilePlace(path.parent, f"{path.name}.{study}")
    return _ServerPlace(url, study)


class _ServerPlace:
    def __init__(self, url: str, study: str) -> None:
        self._url = parse_url(url)
        self._study = study
        self._engine = make_engine(self._url)
        digest = hashlib.sha256(f"{self._url.database}\n{study}".encode()).digest()
        self._key = int.from_bytes(digest[:4], "big") >> 1

    def take(self, who: Holder) -> _Session:
        if self._dialect not in _DIALECTS:
            raise OSError(f"databases of kind {self._dialect!r} have no lock that is known here")
        with readable_errors(self._url, LOCK_TIMEOUT_S):
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            try:
                if not self._locked(connection):
                    raise Taken(self._holders(connection))
                self._say(connection, who)
            except BaseException:
                connection.close()
                raise
            return _Session(connection, self._engine)

    @property
    def _dialect(self) -> str:
        return self._engine.dialect.name

    def _locked(self, connection: Connection) -> bool:
        if self._dialect == "postgresql":
            sql = text("SELECT pg_try_advisory_lock(:class, :key)")
            return bool(connection.execute(sql, {"class": _CLASS, "key": self._key}).scalar())
        return bool(connection.execute(text("SELECT GET_LOCK(:name, 0)"), {"name": f"tuner-{self._key}"}).scalar())

    def _say(self, connection: Connection, who: Holder) -> None:
        if self._dialect == "postgresql":
            since = who.since[:19]
            host = who.host[: _NAME_BYTES - len(f"{_SAID} {who.pid}  {since}")]
            named = text("SELECT set_config('application_name', :name, false)")
            connection.execute(named, {"name": f"{_SAID} {who.pid} {host} {since}"})

    def _holders(self, connection: Connection) -> Sequence[Holder]:
        if self._dialect != "postgresql":
            return ()
        names = connection.execute(_HOLDERS, {"class": _CLASS, "key": self._key}).scalars()
        return [holder for name in names if (holder := self._read(str(name)))]

    def _read(self, name: str) -> Holder | None:
        words = name.split(" ")
        if len(words) != 4 or words[0] != _SAID or not words[1].isdigit():
            return None
        return Holder(pid=int(words[1]), host=words[2], command="tuner optimize", study=self._study, since=words[3])


class _Session:
    beside: Sequence[Holder] = ()

    def __init__(self, connection: Connection, engine: Engine) -> None:
        self._connection = connection
        self._engine = engine

    def release(self) -> None:
        self._connection.close()
        self._engine.dispose()
