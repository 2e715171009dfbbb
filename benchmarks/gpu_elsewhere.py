"""Part 4: `--gpu p100` on another card: what may be claimed of a GPU that is not here, held against the probes made."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu_check import Check, Finding, Status, Table, last_words
from benchmarks.gpu_studies import Studied, job_words, length_for, probing_s, studied, study_file
from tuner.contract.config import CompileMode, Precision
from tuner.contract.gpu import gpu_profile
from tuner.contract.space import Knob
from tuner.export.tuned import load

TARGET = "p100"
WORKLOAD = "latent_cfg"
SEARCH_SHARE = 0.4
Rule = tuple[str, str, bool]
"""What is claimed, what was found, and whether that agrees."""


def elsewhere(check: Check) -> Finding:
    if WORKLOAD not in check.runnable():
        return Finding(Status.NOT_RUN, notes=(f"{WORKLOAD}: {check.missing.get(WORKLOAD, 'not asked for')}",))
    share_s = check.clock.turn_s
    length = length_for(share_s)
    study, best = f"gpu-check-{TARGET}-{length.name}", check.work / f"best.{TARGET}.yaml"
    budget_s = SEARCH_SHARE * share_s + probing_s(check, study)
    called = check.tuner(
        "optimize", *job_words(check, WORKLOAD), "--gpu", TARGET, "--study", study, "--budget", f"{budget_s:.0f}s",
        "--spec", str(study_file(check, WORKLOAD, length, keep=("precision", "compile"))),
        "--out", str(best), "--storage", check.storage, "--json",
    )  # fmt: skip
    state = studied(check, study)
    if state is None or not state.rows:
        return Finding(Status.FAILED, notes=(f"no probe was made; {last_words(called)}",))
    rules = [*limits_hold(state)]
    if state.finished and best.exists():
        about = load(best).provenance
        assert about is not None
        rules.append(("best.yaml: transfer", about.transfer, about.transfer == state.spec.transfer))
        rules.append(("best.yaml: measured on", about.measured_on, about.measured_on == state.spec.device.place))
    table = Table(f"--gpu {TARGET} on {state.spec.device.place}", ("rule", "found", "holds"), as_rows(rules))
    data = {"target": TARGET, "rules": [list(rule) for rule in rules], "reason": state.decision.reason}
    broken = [f"broken: {what}: {found}" for what, found, holds in rules if not holds]
    unfinished = () if state.finished else ("stopped before its end; the same command goes on",)
    status = Status.FAILED if broken else Status.DONE if state.finished else Status.PARTIAL
    return Finding(status, (table,), data, (length.note, *broken, *unfinished))


def as_rows(rules: list[Rule]) -> tuple[tuple[object, ...], ...]:
    return tuple((what, found, "yes" if holds else "NO") for what, found, holds in rules)


def limits_hold(state: Studied) -> Iterator[Rule]:
    """No probe asked for what the target cannot do, nor took more memory than it has."""
    spec, target = state.spec, gpu_profile(TARGET)
    yield "speeds are labelled", spec.transfer, spec.transfer == ("unverified" if spec.transferred else "measured")
    gone = {(item.knob, item.value) for item in spec.dropped}
    for knob, illegal in (
        (Knob.PRECISION, set(Precision) - set(target.dtypes)),
        (Knob.COMPILE, inductor(target.compile_modes)),
    ):
        values = sorted(value.value for value in illegal)
        yield f"not tried: {knob.value}", ", ".join(values), all((knob, value) in gone for value in values)
    used = {(row.config.precision.value, row.config.compile.value) for row in state.rows}
    legal = all(p in {d.value for d in target.dtypes} and c in {m.value for m in target.compile_modes} for p, c in used)
    yield "probes stayed within", ", ".join(" ".join(pair) for pair in sorted(used)), legal
    if spec.device.kind == "cuda":
        bigger = spec.device.memory_bytes > (target.memory_bytes or 0)
        cap = spec.memory_cap_bytes
        yield "memory cap of every probe", mib(cap), cap == (target.memory_bytes if bigger else None)
    peak = max((row.measurement.memory.gate_bytes for row in state.rows if row.measurement is not None), default=0)
    yield "largest peak below the target's memory", mib(peak), peak <= (target.memory_bytes or 0)


def inductor(legal: tuple[CompileMode, ...]) -> set[CompileMode]:
    return set(CompileMode) - set(legal)


def mib(size: int | None) -> str:
    return "none" if size is None else f"{size / (1 << 20):,.0f} MiB"
