"""Stored columns <-> typed values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import RowMapping

from tuner.contract.base import Frozen, parse_json
from tuner.contract.config import RunConfig
from tuner.contract.measurement import Environment, Measurement, Outcome
from tuner.contract.probe import PointReply, ProbeKind, ProbeReply, ProbeRequest, ProbeRow, Stage, TrainResult
from tuner.contract.production import ProductionRun, RunStatus
from tuner.contract.tuned import Promise

_Model = TypeVar("_Model", bound=Frozen)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def optional_json(value: Frozen | None) -> str | None:
    return None if value is None else value.to_json()


def optional(cls: type[_Model], text: str | None, source: str) -> _Model | None:
    return None if text is None else parse_json(cls, text, source)


def probe_columns(request: ProbeRequest, reply: ProbeReply, trial: int | None) -> Iterator[dict[str, Any]]:
    """One dict of columns per answered point, in the order of the points; study and number are not among them."""
    share = reply.fixed_s / max(1, len(reply.points))
    for point in sorted(reply.points, key=lambda item: item.index):
        yield _request_columns(request, point) | _point_columns(point) | {"fixed_s": share, "trial": trial}


def _request_columns(request: ProbeRequest, point: PointReply) -> dict[str, Any]:
    return {
        "request_id": request.id,
        "point_index": point.index,
        "kind": request.kind.value,
        "stage": request.stage.value,
        "pair": request.pair,
        "soak": request.soak,
        "config": request.points[point.index].to_json(),
    }


def _point_columns(point: PointReply) -> dict[str, Any]:
    return {
        "outcome": point.outcome.value,
        "message": storable(point.message),
        "detail": storable(point.detail),
        "measurement": optional_json(point.measurement),
        "values": json.dumps(point.values),
        "environment": optional_json(point.environment),
        "seconds": point.seconds,
        "finished_at": now(),
    }


def storable(text: str) -> str:
    """`text` without what some databases refuse: NUL characters and halves of surrogate pairs."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def probe_row(row: RowMapping, source: str) -> ProbeRow:
    """Raises ConfigError when a document in the row breaks a rule."""
    place = f"{source}: probe {row['number']}"
    return ProbeRow(
        number=row["number"],
        request_id=row["request_id"],
        index=row["point_index"],
        kind=ProbeKind(row["kind"]),
        stage=Stage(row["stage"]),
        config=parse_json(RunConfig, row["config"], f"{place}: config"),
        pair=row["pair"],
        soak=bool(row["soak"]),
        outcome=Outcome(row["outcome"]),
        message=row["message"],
        detail=row["detail"],
        measurement=optional(Measurement, row["measurement"], f"{place}: measurement"),
        values=json.loads(row["values"]),
        environment=optional(Environment, row["environment"], f"{place}: environment"),
        seconds=row["seconds"],
        fixed_s=row["fixed_s"],
        finished_at=row["finished_at"],
        trial=row["trial"],
    )


def run_columns(run: ProductionRun) -> dict[str, Any]:
    return {
        "id": run.id,
        "study": run.study,
        "config": run.config.to_json(),
        "promise": optional_json(run.promise),
        "result": optional_json(run.result),
        "out_dir": storable(run.out_dir),
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "status": run.status.value,
    }


def production_run(row: RowMapping, source: str) -> ProductionRun:
    place = f"{source}: run {row['id']}"
    return ProductionRun(
        id=row["id"],
        study=row["study"],
        config=parse_json(RunConfig, row["config"], f"{place}: config"),
        promise=optional(Promise, row["promise"], f"{place}: promise"),
        out_dir=row["out_dir"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        status=RunStatus(row["status"]),
        result=optional(TrainResult, row["result"], f"{place}: result"),
    )
