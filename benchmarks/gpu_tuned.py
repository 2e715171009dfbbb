"""Part 2: each workload's guide baseline against what `tuner optimize` ships, with what limits it and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import LEAST_S, Check, Finding, Status, Table, last_words, worth_doing
from benchmarks.gpu_studies import Length, Studied, job_words, length_for, probing_s, studied, study_file
from tuner.commands import setup
from tuner.contract.config import RunConfig
from tuner.contract.errors import TunerError
from tuner.contract.explanation import ExplainResult, MemoryCell
from tuner.contract.measurement import Interval, Measurement
from tuner.contract.probe import ProbeKind, ProbeRow, Stage
from tuner.contract.space import Knob, with_knobs
from tuner.contract.study import StudySpec
from tuner.contract.trust import ANY_CODE
from tuner.probe.runner import SubprocessRunner
from tuner.search.explain import explain
from tuner.search.explain_case import variant_name
from tuner.search.history import History
from tuner.search.offline import rows_of
from tuner.search.points import point_of
from tuner.search.requests import make_request

GUIDES = {"latent_cfg": "2x", "gpt2": "2-3x", "sd_kanji": "2-5x", "graph": "2-5x"}
"""What each guide promises of its own advice."""
USEFUL_S = {True: 45.0, False: 60.0}
"""With CUDA or without: with less for a workload, fewer workloads have a turn: those not finished before."""
SEARCH_SHARE = 0.55
"""Of a workload's time; preparing its data, the imports and the end of the gate have the rest."""
TRACE_S = 20.0
"""Kept free for the trace that foretells the shipped configuration's memory."""
ARITHMETIC_BOUND = 0.5
"""Share of the matrix-product ceiling from which computation is called bound by arithmetic, below by memory."""
TRACED = 3
"""Sizes traced, the largest of the space."""
SETTLED = (Stage.GATE, Stage.SOAK, Stage.VERIFY, Stage.BASELINE, Stage.CONFIRM)
GIB = float(1 << 30)


def best_file(check: Check, workload: str) -> Path:
    return check.work / f"best.{workload}.yaml"


def tuned(check: Check) -> Finding:
    """Every workload in turn; each has an equal share of the time, and a failed one costs the others nothing."""
    found: dict[str, Mapping[str, Any]] = dict(check.before.get("workloads", {}))
    finished = [name for name, item in found.items() if item["finished"]]
    names = worth_doing(check.runnable(), finished, check.clock.turn_s, USEFUL_S[check.cuda])
    notes = [f"{name}: {why_not(check, name)}" for name in check.workloads if name not in names]
    for place, name in enumerate(names):
        share_s = check.clock.turn_s / (len(names) - place)
        if share_s < LEAST_S:
            notes.append(f"{name}: not run: no time left")
            continue
        try:
            found[name], said = one_workload(check, name, share_s)
        except (TunerError, OSError, ValueError, KeyError) as error:
            said = [f"failed: {type(error).__name__}: {error}"]
        notes += [f"{name}: {line}" for line in said]
    whole = check.is_whole(name for name, item in found.items() if item["finished"])
    status = Status.DONE if whole else Status.PARTIAL if found else Status.FAILED
    return Finding(status, tables(found), {"workloads": found}, tuple(notes))


def why_not(check: Check, name: str) -> str:
    if name in check.missing:
        return f"not run: {check.missing[name]} is not installed"
    return f"no time left in this run; name it alone: --part 2 --workload {name}"


def one_workload(check: Check, name: str, share_s: float) -> tuple[Mapping[str, Any], list[str]]:
    """Its figures, and what a reader must know. Raises ValueError where not even the baseline was measured."""
    length = length_for(share_s)
    study = f"gpu-check-{name}-{length.name}"
    budget_s = SEARCH_SHARE * share_s + probing_s(check, study)
    called = check.tuner(
        "optimize", *job_words(check, name), "--gpu", "auto", "--study", study, "--budget", f"{budget_s:.0f}s",
        "--spec", str(study_file(check, name, length)), "--out", str(best_file(check, name)),
        "--storage", check.storage, "--json", limit_s=min(share_s, check.clock.turn_s) - reserved_s(share_s),
    )  # fmt: skip
    state = studied(check, study)
    if state is None or not state.rows:
        raise ValueError(f"no probe was made; {last_words(called)}")
    ceilings = check.data_of(1).get("ceilings", {}).get("matmul_flops", {})
    state = with_traces(check, state, share_s)
    data = figures(state, ceilings) | {"study": study, "seconds": called.seconds, "length": length.name}
    return data, list(remarks(state, length, called.seconds, last_words(called) if called.code else ""))


def reserved_s(share_s: float) -> float:
    """What a workload's time keeps free for its trace; nothing of a short one."""
    return TRACE_S if share_s >= 3 * TRACE_S else 0.0


def with_traces(check: Check, state: Studied, share_s: float) -> Studied:
    """`state` with traces of the shipped variant, which foretell its memory without running it; a search whose memory
    is far from its budget makes none. Unchanged where there is no time, or nothing to trace."""
    config = state.decision.winner.config if state.decision.winner is not None else state.spec.baseline
    kind = config.gradient_checkpointing
    sizes = sorted({config.micro_batch_size, *traceable(state.spec, config)})[-TRACED:]
    known = [row for row in state.rows if row.kind is ProbeKind.TRACE and row.config.gradient_checkpointing is kind]
    if known or len(sizes) < 2 or not reserved_s(share_s) or check.clock.turn_s < TRACE_S / 2:
        return state
    points = [with_knobs(config, {Knob.MICRO_BATCH_SIZE: size}) for size in sizes]
    request = make_request(History(state.spec, state.rows), ProbeKind.TRACE, Stage.TRACE, points)
    folder = setup.cache_dir()
    with SubprocessRunner(folder, log_dir=check.work / "logs", trust=ANY_CODE) as runner:
        reply = runner.run(request.model_copy(update={"cache_dir": str(folder)}))
    return replace(state, rows=(*state.rows, *rows_of(request, reply, len(state.rows))))


def traceable(spec: StudySpec, config: RunConfig) -> list[int]:
    """Sizes of the space that cut the configuration's effective batch."""
    return [n for n in spec.space.micro_batch_size if config.effective_batch_size % (n * config.world_size) == 0]


def remarks(state: Studied, length: Length, seconds: float, failure: str) -> Iterator[str]:
    yield f"{length.note}; {seconds:.0f} s in all, data included"
    if not state.finished:
        yield f"stopped before its end ({failure or 'no decision'}); the same command goes on"
    elif failure:
        yield failure
    yield from state.decision.notes


def figures(state: Studied, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """What the study shows, as plain values."""
    decision, spec = state.decision, state.spec
    shipped = decision.winner.config if decision.winner is not None else spec.baseline
    told = explain(spec, state.rows, decision, shipped)
    gain = decision.gain
    return {
        "finished": state.finished,
        "decision": decision.kind,
        "reason": decision.reason,
        "gain": plain(gain),
        "pairs": max((row.pair or 0 for row in state.rows if row.stage is Stage.GATE), default=-1) + 1,
        "baseline": side(state, spec.baseline, ceilings),
        "shipped": side(state, shipped, ceilings),
        "limit": limit_name(told, ceilings, shipped),
        "headline": told.headline,
        "goes_faster": [{"what": change.what, "gain": plain(change.gain)} for change in told.changes[:3]],
        "memory": memory_figures(told.memory, shipped, imports_known=spec.device.kind == "cuda"),
        "outcomes": {name: sum(row.outcome.value == name for row in state.rows) for name in sorted(outcomes(state))},
        "probing_s": sum(row.seconds for row in state.rows),
        "to_winner_s": seconds_to(state, shipped),
    }


def outcomes(state: Studied) -> set[str]:
    return {row.outcome.value for row in state.rows}


def side(state: Studied, config: RunConfig, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """One configuration: speed, peak, MFU, utilisation, waiting, compiling."""
    measured = settled(state.rows, config)
    use = explain(state.spec, state.rows, state.decision, config).model_use
    decided = {s.config.digest(): s for s in (state.decision.baseline, state.decision.winner) if s is not None}
    known = decided.get(config.digest())
    ceiling = ceilings.get(config.precision.value)
    return {
        "label": state.spec.label(config),
        "samples_per_s": plain(known.samples_per_s if known is not None else None),
        "peak_bytes": known.peak_bytes if known is not None else None,
        "mfu": plain(use.mfu),
        "flops_per_s": use.flops_per_s,
        "of_ceiling": use.flops_per_s / ceiling if use.flops_per_s and ceiling else None,
        "gpu_utilisation": mean([m.telemetry.gpu_utilization for m in measured if m.telemetry is not None]),
        "data_wait": mean([wait_share(m) for m in measured]),
        "compile_s": max((m.phases_s.get("compile", 0.0) for m in all_of(state.rows, config)), default=0.0),
    }


def all_of(rows: Sequence[ProbeRow], config: RunConfig) -> list[Measurement]:
    """Every measurement of `config`'s variant and size, compute points too."""
    point = point_of(config)
    return [row.measurement for row in rows if row.measurement is not None and point_of(row.config)[:2] == point[:2]]


def settled(rows: Sequence[ProbeRow], config: RunConfig) -> list[Measurement]:
    """End-to-end measurements of `config` itself."""
    own = [row for row in rows if row.config == config and row.kind is ProbeKind.END_TO_END and row.stage in SETTLED]
    return [row.measurement for row in own if row.measurement is not None]


def wait_share(measurement: Measurement) -> float | None:
    steady = slice(measurement.warmup_steps, None)
    total = sum(measurement.step_s[steady])
    return sum(measurement.data_wait_s[steady]) / total if total and measurement.data_wait_s else None


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def seconds_to(state: Studied, config: RunConfig) -> float | None:
    """Probing seconds until `config` was first measured end to end."""
    spent = 0.0
    for row in state.rows:
        spent += row.seconds
        if row.config == config and row.kind is ProbeKind.END_TO_END:
            return spent
    return None


def limit_name(told: ExplainResult, ceilings: Mapping[str, float], config: RunConfig) -> str:
    """The first limit of `tuner explain`; computation is split by how near it comes to the matrix-product ceiling."""
    first = next((limit for limit in told.limits if limit.limits), None)
    if first is None:
        return "unknown"
    reached, ceiling = told.model_use.flops_per_s, ceilings.get(config.precision.value)
    if first.name != "computation" or not reached or not ceiling:
        return first.name
    kind = "arithmetic" if reached >= ARITHMETIC_BOUND * ceiling else "memory bandwidth or small kernels"
    return f"computation: {kind}, at {100 * reached / ceiling:.0f} % of the matrix-product ceiling"


def memory_figures(cells: Sequence[MemoryCell], shipped: RunConfig, *, imports_known: bool) -> dict[str, Any]:
    """Predicted from all other rows against measured: the shipped cell, and the errors of all cells.

    On a host what the imports hold is known from other rows alone, so a lone cell says nothing there.
    """
    point = point_of(shipped)
    own = (variant_name(point.variant), point.micro)
    known = [as_cell(cell) for cell in cells if cell.predicted_share and cell.measured_share]
    if len(known) == 1 and not imports_known:
        known = []
    errors = sorted(abs(error(cell)) for cell in known)
    return {
        "shipped_error": next((error(cell) for cell in known if (cell["variant"], cell["micro"]) == own), None),
        "median_error": errors[len(errors) // 2] if errors else None,
        "max_error": errors[-1] if errors else None,
        "above_bar": sum(cell.below_bar is False for cell in cells) if known else 0,
        "cells": known,
    }


def as_cell(cell: MemoryCell) -> dict[str, Any]:
    assert cell.predicted_share is not None
    return {
        "variant": cell.variant,
        "micro": cell.micro_batch_size,
        "predicted": cell.predicted_share.value,
        "upper": cell.predicted_share.high,
        "measured": cell.measured_share,
    }


def error(cell: Mapping[str, Any]) -> float:
    return float(cell["predicted"] / cell["measured"] - 1)


def plain(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else {"value": interval.value, "low": interval.low, "high": interval.high}


def tables(found: Mapping[str, Mapping[str, Any]]) -> tuple[Table, ...]:
    speed = ("workload", "side", "configuration", "samples/s", "peak GiB", "MFU", "of the ceiling", "GPU busy",
             "data wait", "compile s")  # fmt: skip
    sides = [
        (name, which, *side_cells(item[which])) for name, item in found.items() for which in ("baseline", "shipped")
    ]
    answer = ("workload", "gain (interval)", "pairs", "guide", "limited by", "probing s", "to the winner s", "outcomes")
    memory = ("workload", "shipped", "median of all", "largest", "cells", "above the error bar")
    return (
        Table("baseline against tuned", speed, tuple(sides)),
        Table("the answer", answer, tuple(answer_cells(name, item) for name, item in found.items())),
        Table(
            "memory: predicted from all other rows against measured",
            memory,
            tuple(memory_cells(name, item["memory"]) for name, item in found.items()),
        ),
    )


def side_cells(item: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        item["label"],
        spread(item["samples_per_s"]),
        f"{item['peak_bytes'] / GIB:.2f}" if item["peak_bytes"] else "-",
        percent(item["mfu"]["value"] if item["mfu"] else None),
        percent(item["of_ceiling"]),
        percent(item["gpu_utilisation"]),
        percent(item["data_wait"]),
        f"{item['compile_s']:.0f}",
    )


def answer_cells(name: str, item: Mapping[str, Any]) -> tuple[object, ...]:
    ended = ", ".join(f"{outcome} {count}" for outcome, count in item["outcomes"].items())
    gain = spread(item["gain"], 3) if item["gain"] else item["decision"]
    return (
        name, gain, item["pairs"], GUIDES.get(name, "-"), item["limit"], f"{item['probing_s']:.0f}",
        "-" if item["to_winner_s"] is None else f"{item['to_winner_s']:.0f}", ended,
    )  # fmt: skip


def memory_cells(name: str, item: Mapping[str, Any]) -> tuple[object, ...]:
    errors = (item["shipped_error"], item["median_error"], item["max_error"])
    shown = [f"{100 * value:+.1f} %" if value is not None else "-" for value in errors]
    return (name, *shown, len(item["cells"]), item["above_bar"])


def spread(interval: Mapping[str, float] | None, digits: int = 4) -> str:
    """`338.5 (331.2 to 346)`."""
    if interval is None:
        return "-"
    return f"{interval['value']:.{digits}g} ({interval['low']:.{digits}g} to {interval['high']:.{digits}g})"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"
