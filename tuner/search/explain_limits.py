"""What limits a configuration, each with its figure, and what it could gain without: bounds from the fitted model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tuner.contract.config import CompileMode
from tuner.contract.explanation import Change, Limit, LimitName, ModelUse
from tuner.contract.gpu import detected_profile
from tuner.contract.measurement import Interval
from tuner.contract.space import Knob
from tuner.search.explain_case import Case, counted_budget, overrun_row, probe_words, rows_of_size
from tuner.search.explain_tables import predicted_share
from tuner.search.model import StepFit
from tuner.search.objective import production_seconds
from tuner.search.points import Point, flag_values, with_batch
from tuner.search.reasons import LAUNCH_BOUND, LOADER_BOUND
from tuner.search.refine import WORTHWHILE

WAIT_BOUND = 0.1
"""Share of a step spent waiting from which the loader is called a limit: what guides allow at most."""
RUN_BOUND = 0.1
"""Share of the run from which evaluation, sampling and checkpoints, or compiling, are called a limit."""
NEGLIGIBLE = 0.005
"""Changes that could bring less are not listed."""
_MIB = 1 << 20


def limits(case: Case) -> tuple[Limit, ...]:
    """Largest first among those that limit, plain computation last of them; then the others."""
    found = [_loader(case), *_parts(case), _memory(case), *_run_parts(case)]
    if not any(limit.limits for limit in found):
        found = [limit.model_copy(update={"limits": limit.name == "computation"}) for limit in found]
    return tuple(sorted(found, key=lambda limit: (not limit.limits, limit.name == "computation", -_size(limit))))


def _size(limit: Limit) -> float:
    return limit.share.value if limit.share is not None else -1.0


def percent(share: Interval) -> str:
    """`41 % (30 to 52)`."""
    value, low, high = (_percent(figure, share.high) for figure in (share.value, share.low, share.high))
    return f"{value} % ({low} to {high})"


def _percent(share: float, largest: float | None = None) -> str:
    return f"{100 * share:.{0 if (share if largest is None else largest) >= 0.1 else 1}f}"


def _loader(case: Case) -> Limit:
    ratio = loading_ratio(case)
    slow = ratio is not None and ratio >= LOADER_BOUND
    alone = f"; alone it needs {100 * ratio:.1f} % of the computation's time" if ratio is not None else ""
    wait = case.wait
    if wait is None:
        text = f"waiting for data was not recorded{alone}"
        return Limit(name="loader", share=None, of="a step", limits=slow, text=text)
    text = f"{percent(wait)} of a step is waiting for data, measured{alone}"
    return Limit(name="loader", share=wait, of="a step", limits=slow or wait.value >= WAIT_BOUND, text=text)


def loading_ratio(case: Case) -> float | None:
    """Loader seconds over compute seconds, each measured alone; None where one of them was not."""
    if not case.same_model:
        return None
    data = case.view.loading.seconds(case.point.loader, case.point.samples)
    compute = case.view.steps.estimate(case.point.variant, case.point.micro, case.point.accumulation)
    return data / compute.value if data is not None and compute is not None and compute.value > 0 else None


def computing(case: Case) -> float:
    """Share of a step that is not waiting for data."""
    return 1.0 - (case.wait.value if case.wait is not None else 0.0)


def _parts(case: Case) -> Iterator[Limit]:
    """The computing part of a step, taken apart by the fit: alpha, beta and omega."""
    micro, k = case.point.micro, case.point.accumulation
    launch = case.of_fit(lambda fit: computing(case) * fit.launch_share(micro, k))
    update = case.of_fit(lambda fit: computing(case) * fit.omega / fit.step_s(micro, k))
    growing = case.of_fit(lambda fit: computing(case) * micro * k * fit.beta / fit.step_s(micro, k))
    yield _part(
        case, "launch overhead", launch, LAUNCH_BOUND, "does not depend on the batch size (launches, Python): k alpha"
    )
    yield _within_beta(_part(case, "update", update, LAUNCH_BOUND, "is the optimizer update: omega"), case)
    yield _part(case, "computation", growing, 0.5, "grows with the samples: beta B")


def _within_beta(update: Limit, case: Case) -> Limit:
    """Where every cut measured has the same number of samples, omega cannot be told from beta."""
    cuts = case.view.steps.cuts[case.fitted[0]] if case.fitted else ()
    if len({cut.micro * cut.accumulation for cut in cuts}) != 1:
        return update
    text = "unknown: measured at one effective batch alone, so it is counted as computation"
    return update.model_copy(update={"share": None, "text": text})


def _part(case: Case, name: LimitName, share: Interval | None, bound: float, what: str) -> Limit:
    if share is None:
        why = "fewer than two cuts were measured without a loader" if case.same_model else "the model is another one"
        return Limit(name=name, share=None, of="a step", limits=False, text=f"unknown: {why}")
    sure = share.low >= bound or share.value < bound or name == "computation"
    certain = (
        "" if sure else f"; within the noise it may be below the {100 * bound:.0f} % from which it counts as a limit"
    )
    text = f"{percent(share)} of a step {what}{certain}"
    return Limit(name=name, share=share, of="a step", limits=share.value >= bound, text=text)


def next_larger(case: Case) -> Point:
    """The next micro-batch size of the space at the same effective batch, or else twice the size."""
    point = case.point
    above = [m for m in case.view.micro_values(point.samples) if m > point.micro]
    return (
        with_batch(point, above[0], point.samples) if above else point._replace(micro=2 * point.micro, accumulation=1)
    )


def _memory(case: Case) -> Limit:
    now = max((case.spec.memory_used(m.memory) for m in case.measurements), default=0.0)
    larger = next_larger(case)
    share = predicted_share(case.view, case.view.history.needed(larger)) if case.same_model else None
    binds = any(True for _ in kept_out(case))
    then = "what a larger micro-batch takes is unknown"
    if share is not None:
        then = f"micro-batch {larger.micro} is predicted to take {percent(share)}"
    text = f"{_percent(now)} % of the budget of {counted_budget(case.spec) / _MIB:,.0f} MiB is used, measured; {then}"
    return Limit(name="memory", share=share, of="the memory budget", limits=binds, text=text)


def kept_out(case: Case) -> Iterator[tuple[Point, Interval]]:
    """Larger micro-batches of the same effective batch that memory does not allow, with the gain they promise."""
    if not case.same_model or case.fitted is None:
        return
    for micro in case.view.micro_values(case.point.samples):
        if micro > case.point.micro and not _fits(case, case.point._replace(micro=micro)):
            larger = with_batch(case.point, micro, case.point.samples)
            gain = gain_of_cut(case, larger)
            if gain is not None and gain.high >= WORTHWHILE:
                yield larger, gain


def _run_parts(case: Case) -> Iterator[Limit]:
    """Duties and compiling, as shares of the whole production run."""
    phases = case.soak_phases
    compile_s = case.s.history.compile_seconds(case.point.variant)
    total = production_seconds(case.spec, case.rate.value, compile_s, phases)
    if not phases:
        text = "unknown: no soak measured evaluation, sampling and checkpoint"
        yield Limit(name="duties", share=None, of="the run", limits=False, text=text)
    else:
        duties = (total - production_seconds(case.spec, case.rate.value, compile_s)) / total
        text = (
            f"{100 * duties:.1f} % of the run is evaluation, sampling and checkpoints, measured once each in the soak"
        )
        yield _of_run("duties", duties, text)
    text = f"{100 * compile_s / total:.2f} % of the run is compiling ({compile_s:.0f} s, the longest that was measured)"
    eager = case.point.variant.compile is CompileMode.EAGER
    none = "nothing is compiled" if eager else "how long compiling takes was not measured"
    yield _of_run("compile", compile_s / total, text if compile_s else none)


def _of_run(name: LimitName, share: float, text: str) -> Limit:
    return Limit(
        name=name,
        share=Interval(value=share, low=share, high=share),
        of="the run",
        limits=share >= RUN_BOUND,
        text=text,
    )


def model_use(case: Case) -> ModelUse:
    """FLOPs reached against the peak of the device measured on, never of a target that is not here."""
    rows = (row for row in case.s.history.rows if row.config.options == case.config.options)
    counted = (row.measurement.flops_per_sample for row in rows if row.measurement is not None)
    flops = next((figure for figure in counted if figure), None)
    peak = detected_profile(case.spec.device).peak_flops.get(case.config.precision.value)
    reached = flops * case.rate.value / case.config.world_size if flops else None
    mfu = None
    if flops and reached and peak:
        low, high = (flops * bound / case.config.world_size / peak for bound in (case.rate.low, case.rate.high))
        mfu = Interval(value=reached / peak, low=low, high=high)
    return ModelUse(
        flops_per_sample=flops,
        flops_per_s=reached,
        peak_flops_per_s=peak,
        mfu=mfu,
        text=_use_text(case, reached, peak, mfu),
    )


def _use_text(case: Case, reached: float | None, peak: float | None, mfu: Interval | None) -> str:
    device, precision = case.spec.device, case.config.precision.value
    if reached is None:
        return "MFU unknown: the model's FLOPs were not counted (they are, in eager mode without checkpointing)"
    figure = f"{reached / 1e9:,.3g} GFLOP/s reached"
    if mfu is not None and peak is not None:
        return (
            f"MFU {percent(mfu)}: {figure}, of {peak / 1e12:,.3g} TFLOP/s {precision} that {device.name} can do at best"
        )
    what = (
        "a CPU's peak differs by host and no table claims one"
        if device.kind == "cpu"
        else f"no {precision} peak of {device.name} is known"
    )
    return f"MFU unknown: {figure}, but {what}; optimize on a GPU that `tuner gpus` lists to see it"


def changes_to_go_faster(case: Case) -> tuple[Change, ...]:
    """What would have to change, the largest hope first; below half a percent nothing is listed."""
    found = [
        *_loader_twice(case),
        *_no_launches(case),
        *_larger(case),
        *_no_recomputing(case),
        *_at_peak(case),
        *_run_changes(case),
    ]
    worth = [change for change in found if change.gain is None or change.gain.high >= 1 + NEGLIGIBLE]
    return tuple(sorted(worth, key=lambda change: -(change.gain.value if change.gain else 0.0)))


def _step(case: Case, compute: float, data: float, wait: float) -> float:
    """Step time, in units of the present one: workers load beside the computation, without them before it."""
    return max(compute + wait, data) if case.point.loader.workers else compute + wait


def _data(case: Case) -> float:
    """What the loader needs for a step, in units of the present step; never more than the step."""
    if not case.same_model:
        return 0.0
    seconds = case.view.loading.seconds(case.point.loader, case.point.samples)
    return min(1.0, seconds / (case.sample_s * case.point.samples)) if seconds is not None else 0.0


def _gain(case: Case, computes: Sequence[float], data: float, wait: float) -> Interval:
    """Gain when the computing part becomes `computes` (the fitted value first, then as the noise allows).

    The bound (`high`) also gives the waits away, but never the seconds that the loader itself needs.
    """
    hidden = 0.0 if case.point.loader.workers else wait
    likely = [1 / max(1e-9, _step(case, compute, data, wait)) for compute in computes]
    best = 1 / max(1e-9, _step(case, min(computes), data, hidden))
    return Interval(value=max(1.0, likely[0]), low=max(1.0, min(likely)), high=max(1.0, best))


def _loader_twice(case: Case) -> Iterator[Change]:
    wait = case.wait
    if wait is None:
        return
    gain = _gain(case, [1 - wait.value], _data(case) / 2, wait.value / 2)
    shared = case.spec.device.kind == "cpu" and case.point.loader.workers > 0
    more = "; cores the workers take from the computation are not counted" if shared else ""
    basis = f"measured waits of {percent(wait)} of a step{more}"
    yield Change(what="a loader twice as fast", gain=gain, of="throughput", basis=basis, hindrance="")


def _no_launches(case: Case) -> Iterator[Change]:
    micro, k = case.point.micro, case.point.accumulation
    share = case.of_fit(lambda fit: fit.launch_share(micro, k))
    if share is None:
        return
    computes = [computing(case) * (1 - figure) for figure in (share.value, share.low, share.high)]
    gain = _gain(case, computes, _data(case), 1 - computing(case))
    basis = f"the fit: k alpha is {percent(share)} of the computing"
    what = "no launch overhead (CUDA graphs, compiling)"
    yield Change(what=what, gain=gain, of="throughput", basis=basis, hindrance=_compile_hindrance(case))


def _compile_hindrance(case: Case) -> str:
    if case.point.variant.compile is not CompileMode.EAGER:
        return f"compile {case.point.variant.compile.value} is on already; this is what it leaves"
    found = [f"compile {mode.value} was measured: {ratio:.2f}x" for mode, ratio in _measured_modes(case)]
    reasons: dict[str, list[str]] = {}
    for item in case.spec.dropped:
        if item.knob is Knob.COMPILE:
            reasons.setdefault(item.reason, []).append(item.value)
    return "; ".join([*found, *(f"{', '.join(modes)}: {why}" for why, modes in reasons.items())])


def _measured_modes(case: Case) -> Iterator[tuple[CompileMode, float]]:
    """Throughput of each compile mode that was measured over the eager one at the same cut."""
    steps, point = case.view.steps, case.point
    for mode in flag_values(case.spec, Knob.COMPILE):
        variant = point.variant._replace(compile=mode)
        own = steps.measured(variant, point.micro, point.accumulation)
        eager = steps.estimate(point.variant, point.micro, point.accumulation)
        if mode is not point.variant.compile and own and eager:
            yield mode, eager.value / own


def gain_of_cut(case: Case, other: Point) -> Interval | None:
    """Throughput of `other` (another micro-batch size) over the present, by the fit; waits per sample stay."""
    now, then = case.point, other

    def ratio(fit: StepFit) -> float:
        before = fit.step_s(now.micro, now.accumulation) / now.samples
        return fit.step_s(then.micro, then.accumulation) / then.samples / before if before > 0 else 1.0

    spread = case.of_fit(ratio)
    if spread is None:
        return None
    computes = [computing(case) * figure for figure in (spread.value, spread.low, spread.high)]
    return _gain(case, computes, _data(case), 1 - computing(case))


def _larger(case: Case) -> Iterator[Change]:
    for point, gain in kept_out(case):
        yield _larger_change(
            case, point, gain, f"memory for micro-batch {point.micro} ({point.micro}x{point.accumulation})"
        )
    point = next_larger(case)
    if point.samples != case.point.samples:
        found = gain_of_cut(case, point)
        what = f"a larger effective batch, {point.samples} ({point.micro}x1): it changes the training"
        if found is not None:
            yield _larger_change(case, point, found, what)


def _larger_change(case: Case, point: Point, gain: Interval, what: str) -> Change:
    return Change(
        what=what,
        gain=gain,
        of="throughput",
        basis="the fit, beyond the sizes measured" if point.samples != case.point.samples else "the fit",
        hindrance=memory_need(case, point),
    )


def _fits(case: Case, point: Point) -> bool:
    return case.view.memory.fits(*case.view.history.needed(point))


def memory_need(case: Case, point: Point) -> str:
    """What keeps `point` out of memory; empty where it fits."""
    if _fits(case, point):
        return ""
    size, smaller = case.view.history.needed(point), case.view.history.limiting(point)
    budget = f"the budget is {counted_budget(case.spec) / _MIB:,.0f} MiB"
    if (row := overrun_row(case.view, size)) is not None:
        return f"it did not fit into memory ({probe_words(row)}); {budget}"
    untried = "" if rows_of_size(case.view, size) else "not tried; "
    if (share := predicted_share(case.view, size)) is not None:
        need = share.high * counted_budget(case.spec) / _MIB
        return f"{untried}it is predicted to need up to {need:,.0f} MiB, {budget}"
    if smaller is None or smaller.micro > point.micro:
        return f"{untried}how much it needs is not known; {budget}"
    seen = probe_words(overrun_row(case.view, smaller))
    return f"{untried}micro-batch {smaller.micro} did not fit into memory ({seen}); {budget}"


def _no_recomputing(case: Case) -> Iterator[Change]:
    if not case.point.variant.gradient_checkpointing or not case.same_model:
        return
    plain = case.point._replace(variant=case.point.variant._replace(gradient_checkpointing=False))
    estimates = [case.view.steps.estimate(p.variant, p.micro, p.accumulation) for p in (plain, case.point)]
    gain = None
    if estimates[0] is not None and estimates[1] is not None:
        ratio, error = estimates[0].value / estimates[1].value, estimates[0].error + estimates[1].error
        computes = [computing(case) * ratio * factor for factor in (1, 1 + error, 1 - error)]
        gain = _gain(case, computes, _data(case), 1 - computing(case))
    yield Change(
        what="gradient checkpointing off",
        gain=gain,
        of="throughput",
        basis="step times with and without" if gain else "never measured without",
        hindrance=memory_need(case, plain),
    )


def _at_peak(case: Case) -> Iterator[Change]:
    use = model_use(case)
    if use.mfu is not None and use.mfu.low > 0:
        gain = Interval(value=1 / use.mfu.value, low=1 / use.mfu.high, high=1 / use.mfu.low)
        basis = "the device's peak over the FLOPs reached: what no program can pass"
        yield Change(what="every FLOP at the device's peak", gain=gain, of="throughput", basis=basis, hindrance="")


def _run_changes(case: Case) -> Iterator[Change]:
    """Without duties or without compiling: of the whole run's time, not of throughput."""
    what = {"duties": "no evaluation, sampling and checkpoints", "compile": "no compiling"}
    for part in _run_parts(case):
        if part.share is not None and 0 < part.share.value < 1:
            gain = 1 / (1 - part.share.value)
            interval = Interval(value=gain, low=gain, high=gain)
            yield Change(what=what[part.name], gain=interval, of="run time", basis=part.text, hindrance="")
