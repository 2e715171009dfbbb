"""StudyStore: studies, their probes and production runs in one database. The rows are the truth; no Optuna here.

Every write is one short transaction. A row that `add_reply` has returned is on the disk, and never changes again.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import URL, Connection, Engine, case, func, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError

from tuner.contract.base import Frozen, parse_json
from tuner.contract.config import RunConfig
from tuner.contract.errors import StoreError, StoreOutage, TunerError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeReply, ProbeRequest, ProbeRow, TrainResult
from tuner.contract.production import ProductionRun, RunStatus
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision, Promise
from tuner.store import codec, tables
from tuner.store.engine import (
    LOCK_TIMEOUT_S,
    explain,
    for_writing,
    full,
    is_lock_message,
    parse_url,
    readable_errors,
    shown,
)
from tuner.store.schema import open_engine, open_reader
from tuner.store.spool import Spool, Spooled, default_spool_dir

_ATTEMPTS = 4
_FIRST_PAUSE_S = 0.1

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
UNREADABLE = (TunerError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError)
"""What reading a row may raise that somebody has written by hand."""


def _run_name(row: Any) -> str:
    return f"run {row['id']}"


def _workload_of(row: Any) -> str:
    return str(json.loads(row["config"])["workload"])


class StudySummary(Frozen):
    """One line of the list of studies."""

    name: str
    workload: str
    target: str
    measured_on: str
    created_at: str
    probes: int
    ok: int
    seconds: float
    """Wall seconds of all probes."""
    decision: str | None
    """winner, no_gain, failed; None while the search has not ended."""


class StudyStore:
    """Open with `StudyStore.open`; close it, or use it in a `with`."""

    def __init__(self, url: URL, engine: Engine, spool: Spool, lock_timeout_s: float) -> None:
        self._url = url
        self._engine = engine
        self._spool = spool
        self._lock_timeout_s = lock_timeout_s
        self._seen: dict[str, list[ProbeRow]] = {}
        self._workloads: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        """What was left out of a list, as it cannot be read: `run 3f2a91` -> why, in one line."""

    @classmethod
    def open(cls, url: str, *, spool_dir: Path | None = None, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Self:
        """Open the store at a SQLAlchemy URL; a store that is not there is made, an older one migrated.

        `spool_dir`: where results wait that cannot reach the database; default: beside a SQLite file.
        Raises StoreError when it is damaged, empty, newer, locked or out of reach; it is then left as it was.
        """
        address = parse_url(url)
        with readable_errors(address, lock_timeout_s):
            engine = open_engine(address, lock_timeout_s)
        return cls(address, engine, Spool(spool_dir or default_spool_dir(address)), lock_timeout_s)

    @classmethod
    def read(cls, url: str, *, empty: bool = False, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Self:
        """Open a store for reading alone: nothing is made or changed, and what writes raises StoreError.

        `empty`: where there is no file yet, a store without studies. Raises StoreError as `open` does.
        """
        address = parse_url(url)
        with readable_errors(address, lock_timeout_s):
            engine = open_reader(address, lock_timeout_s, empty=empty)
        return cls(address, engine, Spool(default_spool_dir(address)), lock_timeout_s)

    @property
    def shown_url(self) -> str:
        """The URL for people: its password is hidden."""
        return shown(self._url)

    @property
    def url(self) -> str:
        """The URL for a driver, its password included: never show or store it."""
        return full(self._url)

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- studies

    def create_study(self, spec: StudySpec) -> StudySpec:
        """Store a new study. Where one of this name exists already, that one is returned, unchanged."""
        values = {"name": spec.name, "spec": spec.to_json(), "created_at": codec.now()}
        with self._errors():
            try:
                with for_writing(self._engine) as connection:
                    if self._study_id(connection, spec.name) is None:
                        connection.execute(insert(tables.study).values(values))
            except IntegrityError:
                pass  # another process was quicker by a moment
        return self._required(spec.name)

    def replace_spec(self, spec: StudySpec) -> None:
        """What a study knows of its data may be told anew; what it asks is fixed. Raises StoreError."""
        self._required(spec.name)
        with self._errors(), for_writing(self._engine) as connection:
            values = {"spec": spec.to_json()}
            connection.execute(update(tables.study).where(tables.study.c.name == spec.name).values(values))

    def study(self, name: str) -> StudySpec | None:
        text = self._study_column("spec", name)
        return codec.optional(StudySpec, text, f"{self.shown_url}: study {name!r}")

    def studies(self) -> tuple[StudySummary, ...]:
        """Every study, oldest first."""
        ok = func.sum(case((tables.probe.c.outcome == Outcome.OK.value, 1), else_=0))
        query = (
            select(
                tables.study,
                func.count(tables.probe.c.id).label("probes"),
                func.coalesce(ok, 0).label("ok"),
                func.coalesce(func.sum(tables.probe.c.seconds), 0.0).label("seconds"),
            )
            .outerjoin(tables.probe, tables.probe.c.study_id == tables.study.c.id)
            .group_by(tables.study.c.id)
            .order_by(tables.study.c.id)
        )
        return tuple(self.readable(self._fetch(query), lambda row: f"study {row['name']}", self._summary_line))

    def study_names(self) -> tuple[str, ...]:
        """Of every study, oldest first, readable or not."""
        return tuple(str(row["name"]) for row in self._fetch(select(tables.study.c.name).order_by(tables.study.c.id)))

    def readable(
        self, items: Iterable[_Item], name: Callable[[_Item], str], read: Callable[[_Item], _Result]
    ) -> Iterator[_Result]:
        """What `read` makes of each item; one that cannot be read is left out, and noted in `problems` by its name."""
        for item in items:
            try:
                found = read(item)
            except UNREADABLE as error:
                self.problems[name(item)] = next(iter(str(error).splitlines()), type(error).__name__)[:300]
            else:
                yield found

    def _summary_line(self, row: Any) -> StudySummary:
        spec = parse_json(StudySpec, row["spec"], f"study {row['name']!r}")
        return StudySummary(
            name=row["name"],
            workload=spec.workload,
            target=spec.target.name,
            measured_on=spec.device.name,
            created_at=row["created_at"],
            probes=row["probes"],
            ok=row["ok"],
            seconds=row["seconds"],
            decision=json.loads(row["decision"])["kind"] if row["decision"] else None,
        )

    def save_decision(self, name: str, decision: Decision, summary: dict[str, Any]) -> None:
        """Store what the rows prove; a later decision replaces an earlier one. `summary`: plain values."""
        self._required(name)
        values = {"decision": decision.to_json(), "summary": json.dumps(summary)}
        with self._errors(), for_writing(self._engine) as connection:
            connection.execute(update(tables.study).where(tables.study.c.name == name).values(values))

    def decision(self, name: str) -> Decision | None:
        text = self._study_column("decision", name)
        return codec.optional(Decision, text, f"{self.shown_url}: decision of study {name!r}")

    def readable_decision(self, name: str) -> Decision | None:
        """The same for people to look at: one that cannot be read is one of `problems`."""
        return next(self.readable([name], lambda _: f"decision of study {name}", self.decision), None)

    def summary(self, name: str) -> dict[str, Any] | None:
        """What `save_decision` was given beside the decision."""
        text = self._study_column("summary", name)
        return None if text is None else dict(json.loads(text))

    # -- probes

    def rows(self, name: str) -> tuple[ProbeRow, ...]:
        """Every stored point of a study by number. Raises StoreError when there is no such study."""
        seen = self._seen.setdefault(name, [])
        found = self._probes(name, len(seen))
        if not found and not seen:
            self._required(name)
        # finished rows never change and numbers have no gaps, so only what is new is read
        seen.extend(self._of_study(name, self._parsed(row)) for row in found)
        return tuple(seen)

    def readable_rows(self, name: str) -> tuple[ProbeRow, ...]:
        """The same for people to look at: a row that cannot be read is one of `problems`."""
        return tuple(
            self.readable(
                self._probes(name, 0),
                lambda row: f"probe {row['number']} of study {name}",
                lambda row: self._of_study(name, self._parsed(row)),
            )
        )

    def _probes(self, name: str, since: int) -> list[Any]:
        query = (
            select(tables.probe)
            .join(tables.study, tables.study.c.id == tables.probe.c.study_id)
            .where(tables.study.c.name == name, tables.probe.c.number >= since)
            .order_by(tables.probe.c.number)
        )
        return self._fetch(query)

    def _of_study(self, name: str, row: ProbeRow) -> ProbeRow:
        """Raises StoreError for a row of another workload: what a search ships comes from its rows."""
        if name not in self._workloads:
            self._workloads[name] = self._required(name).workload
        if row.config.workload != self._workloads[name]:
            raise StoreError(
                f"{self.shown_url}: probe {row.number} of study {name!r}: config.workload: it is "
                f"{row.config.workload!r}, but the study is of {self._workloads[name]!r}; use another study (--fresh)"
            )
        return row

    def add_reply(self, name: str, request: ProbeRequest, reply: ProbeReply, trial: int | None) -> tuple[ProbeRow, ...]:
        """Store one row per answered point and return the rows of this request; what is stored already stays as it is.

        Raises StoreError. When the database cannot be reached, the reply is spooled as a file first, and the message
        says where; `deliver_spooled` stores it later.
        """
        if request.id != reply.request_id:
            raise ValueError(f"reply to request {reply.request_id!r} given for request {request.id!r}")
        item = Spooled(study=name, request=request, reply=reply, trial=trial)
        try:
            return self._retried(lambda: self._insert(item))
        except DBAPIError as error:
            raise self._spooled(item, error) from None

    def _insert(self, item: Spooled) -> tuple[ProbeRow, ...]:
        columns = tables.probe.c
        with for_writing(self._engine) as connection:
            study_id = self._study_id(connection, item.study, lock=True)
            if study_id is None:
                raise StoreError(f"{self.shown_url}: there is no study {item.study!r}")
            mine = select(tables.probe).where(columns.study_id == study_id, columns.request_id == item.request.id)
            stored = {row.point_index for row in connection.execute(mine)}
            taken = select(func.count()).where(columns.study_id == study_id)
            number = connection.execute(taken).scalar_one()
            for point in codec.probe_columns(item.request, item.reply, item.trial):
                if point["point_index"] not in stored:
                    connection.execute(insert(tables.probe).values(point | {"study_id": study_id, "number": number}))
                    number += 1
            rows = connection.execute(mine.order_by(columns.point_index)).mappings().all()
        return tuple(self._parsed(row) for row in rows)

    def _retried(self, work: Callable[[], _Result]) -> _Result:
        """`work`, again after a lost connection. A lock has been waited for already, so that is not tried again."""
        for attempt in range(_ATTEMPTS):
            try:
                return work()
            except (OperationalError, InterfaceError) as error:
                if attempt == _ATTEMPTS - 1 or is_lock_message(str(error.orig)):
                    raise
                time.sleep(_FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("unreachable")

    def _spooled(self, item: Spooled, error: DBAPIError) -> StoreOutage:
        why = explain(error, self._url, self._lock_timeout_s)
        try:
            path = self._spool.put(item)
        except OSError as second:
            return StoreOutage(
                f"store unreachable ({why}), and the result could not be spooled to {self._spool.folder} "
                f"either: {second.strerror}. It is lost; the same command measures it again"
            )
        return StoreOutage(
            f"store unreachable, result spooled to {path} ({why}). The same command delivers it once the store is back"
        )

    def deliver_spooled(self) -> int:
        """Store every result that had to wait; returns how many. Safe to repeat. Raises StoreError."""
        count = 0
        for path, item in list(self._spool.waiting()):
            with self._errors():
                self._insert(item)
            path.unlink(missing_ok=True)
            count += 1
        return count

    # -- production runs

    def add_run(
        self,
        config: RunConfig,
        out_dir: str,
        *,
        study: str | None = None,
        promise: Promise | None = None,
        run_id: str | None = None,
    ) -> ProductionRun:
        """Note that a production run begins; its `id` is made here unless given."""
        run = ProductionRun(
            id=run_id or uuid.uuid4().hex[:12],
            study=study,
            config=config,
            promise=promise,
            out_dir=out_dir,
            started_at=codec.now(),
        )
        with self._errors(), for_writing(self._engine) as connection:
            connection.execute(insert(tables.run).values(codec.run_columns(run)))
        return run

    def finish_run(self, run_id: str, status: RunStatus, result: TrainResult | None = None) -> None:
        """Note how it ended. Raises StoreError for an unknown run."""
        values = {"status": status.value, "result": codec.optional_json(result), "finished_at": codec.now()}
        with self._errors(), for_writing(self._engine) as connection:
            done = connection.execute(update(tables.run).where(tables.run.c.id == run_id).values(values))
            if done.rowcount != 1:
                raise StoreError(f"{self.shown_url}: there is no production run {run_id!r}")

    def runs(self, study: str | None = None) -> tuple[ProductionRun, ...]:
        """Production runs, oldest first; of one study, or all."""
        query = select(tables.run).order_by(tables.run.c.started_at, tables.run.c.id)
        if study is not None:
            query = query.where(tables.run.c.study == study)
        return tuple(self._runs(self._fetch(query)))

    def _runs(self, rows: Iterable[Any]) -> Iterator[ProductionRun]:
        return self.readable(rows, _run_name, lambda row: codec.production_run(row, self.shown_url))

    def newest_runs(
        self, limit: int, wanted: Callable[[str], bool] = lambda _workload: True
    ) -> tuple[tuple[ProductionRun, ...], int]:
        """The newest `limit` production runs of the workloads `wanted`, newest first, and how many older ones there
        are. Only those are read whole: a result holds thousands of step times."""
        columns = tables.run.c
        query = select(columns.id, columns.config).order_by(columns.started_at.desc(), columns.id)
        ids = list(self.readable(self._fetch(query), _run_name, lambda row: (row["id"], _workload_of(row))))
        ids = [name for name, workload in ids if wanted(workload)]
        rows = {row["id"]: row for row in self._fetch(select(tables.run).where(columns.id.in_(ids[:limit])))}
        found = [rows[name] for name in ids[:limit] if name in rows]
        return tuple(self._runs(found)), len(ids) - len(found)

    def runs_called(self, beginning: str) -> tuple[ProductionRun, ...]:
        """Production runs whose id begins so, or is just so; oldest first."""
        columns = tables.run.c
        query = select(tables.run).where(columns.id.startswith(beginning, autoescape=True))
        rows = self._fetch(query.order_by(columns.started_at, columns.id))
        exact = [row for row in rows if row["id"] == beginning]
        return tuple(self._runs(exact or rows))

    # -- inside

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with readable_errors(self._url, self._lock_timeout_s):
            yield

    def _fetch(self, query: Any) -> list[Any]:
        def work() -> list[Any]:
            with self._engine.connect() as connection:
                return list(connection.execute(query).mappings())

        with self._errors():
            return self._retried(work)

    def _study_column(self, column: str, name: str) -> str | None:
        found = self._fetch(select(tables.study.c[column]).where(tables.study.c.name == name))
        return found[0][column] if found else None

    def _required(self, name: str) -> StudySpec:
        spec = self.study(name)
        if spec is None:
            known = ", ".join(self.study_names()) or "none yet"
            raise StoreError(f"{self.shown_url}: there is no study {name!r}; known: {known}")
        return spec

    def _parsed(self, row: Any) -> ProbeRow:
        try:
            return codec.probe_row(row, self.shown_url)
        except UNREADABLE as error:
            raise StoreError(f"{self.shown_url}: probe {row['number']} cannot be read: {error}") from None

    @staticmethod
    def _study_id(connection: Connection, name: str, *, lock: bool = False) -> int | None:
        query = select(tables.study.c.id).where(tables.study.c.name == name)
        found: int | None = connection.execute(query.with_for_update() if lock else query).scalar()
        return found
