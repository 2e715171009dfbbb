"""Part 5: memory run out of for real at the cap and past the device, and a hang inside a loop of kernels.

Each must become a typed outcome, leave the next probe unharmed, and give the memory back (NVML tells).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from benchmarks.gpu_check import Check, Finding, Status, Table
from benchmarks.gpu_fault_jobs import Hungry, Spins
from tuner.contract.config import RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import PointReply, ProbeKind, ProbeLimits, ProbeReply, ProbeRequest
from tuner.contract.trust import ANY_CODE
from tuner.probe.device_memory import SLACK_BYTES, NvmlMemory
from tuner.probe.runner import SubprocessRunner

MIB = 1 << 20
SMALL, PAST = 4, 48
INSIDE = {True: 26, False: 13}
"""Samples of a micro-batch; with a 32nd of the cap a sample: 12 % and 150 % of it, and 81 % with CUDA. On a CPU it is
41 %: freed memory with a crumb in it cannot be used again as a whole, and the heap then holds twice as much."""
CAP_MIB = 1024


@dataclass(frozen=True)
class Case:
    """One fault: what is asked, and what each point must come to."""

    name: str
    request: ProbeRequest
    wanted: tuple[Outcome, ...]


@dataclass(frozen=True)
class Seen:
    case: Case
    reply: ProbeReply
    grown_bytes: int | None
    """Device memory in use afterwards beyond that before; None = nobody tells."""
    next_ok: bool
    """A plain probe straight afterwards ran."""
    left_behind: int
    """Descendants beyond the runner's own host."""

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return tuple(point.outcome for point in self.reply.points)

    @property
    def good(self) -> bool:
        returned = self.grown_bytes is None or self.grown_bytes <= SLACK_BYTES
        return self.outcomes == self.case.wanted and self.next_ok and returned and not self.left_behind


def faults(check: Check) -> Finding:
    cache = check.work / "faults"
    memory = NvmlMemory()
    seen: list[Seen] = []
    with SubprocessRunner(cache, log_dir=cache / "logs", grace_s=0.5, trust=ANY_CODE) as runner:
        runner.run(plain_probe(check))  # the host process starts, the driver loads: not part of any fault
        for case in cases(check):
            if check.clock.turn_s <= 0:
                break
            seen.append(provoke(check, case, runner, memory))
    whole = len(seen) == len(list(cases(check)))
    broken = [f"broken: {item.case.name}: {words(item)}" for item in seen if not item.good]
    data = {"cases": [as_data(item) for item in seen]}
    status = Status.FAILED if broken or not seen else Status.DONE if whole else Status.PARTIAL
    left = () if whole else ("not every fault was provoked: no time left",)
    return Finding(status, (table(seen),), data, (*broken, *left, *unknown(seen)))


def unknown(seen: list[Seen]) -> Iterator[str]:
    if seen and all(item.grown_bytes is None for item in seen):
        yield "memory returned: unknown, as no NVML tells how much of a device is in use"


def cases(check: Check) -> Iterator[Case]:
    cap = CAP_MIB * MIB
    out = Outcome.OOM_DEVICE if check.cuda else Outcome.OOM_HOST
    sizes = (SMALL, INSIDE[check.cuda], PAST, SMALL)
    yield Case(
        f"at a cap of {cap // MIB} MiB and past it",
        hungry(check, [config(Hungry, size, cap // 32) for size in sizes], cap_bytes=cap),
        (Outcome.OK, Outcome.OK, out, Outcome.OK),
    )
    if check.cuda:  # without a cap a CPU's memory is the machine's: not to be run out of
        whole = int(check.data_of(1).get("device", {}).get("memory_bytes", 256 * 1024 * MIB))
        points = [config(Hungry, SMALL, share) for share in (MIB, whole // 3, MIB)]
        yield Case("past the device, no cap", hungry(check, points), (Outcome.OK, out, Outcome.OK))
    yield Case("hang in a loop of kernels", hanging(check), (Outcome.TIMEOUT,))


def config(job: type[Hungry], size: int, hold_bytes: int) -> RunConfig:
    base = job({}).info().baseline
    return base.model_copy(update={"micro_batch_size": size, "options": {"hold_kib": hold_bytes >> 10}, "threads": 1})


def hungry(check: Check, points: list[RunConfig], cap_bytes: int | None = None) -> ProbeRequest:
    return request(check, points, ProbeLimits(measure_s=0.2, min_steps=4, deadline_s=60.0, memory_bytes=cap_bytes))


def hanging(check: Check) -> ProbeRequest:
    deadline_s = 6.0 if check.cuda else 2.0
    return request(check, [config(Spins, SMALL, MIB)], ProbeLimits(measure_s=0.2, min_steps=8, deadline_s=deadline_s))


def plain_probe(check: Check) -> ProbeRequest:
    return hungry(check, [config(Hungry, SMALL, MIB)])


def request(check: Check, points: list[RunConfig], limits: ProbeLimits) -> ProbeRequest:
    return ProbeRequest(
        id=f"gpu-check-{points[0].digest()}-{len(points)}",
        kind=ProbeKind.COMPUTE,
        workload=points[0].workload,
        points=tuple(points),
        limits=limits,
        device="cuda" if check.cuda else "cpu",
    )


def provoke(check: Check, case: Case, runner: SubprocessRunner, memory: NvmlMemory) -> Seen:
    before = memory.used_bytes()
    reply = runner.run(case.request)
    left_behind = max(0, len(psutil.Process().children(recursive=True)) - 1)
    after = memory.used_bytes()
    following = runner.run(plain_probe(check)).points[0].outcome is Outcome.OK
    grown = after - before if after is not None and before is not None else None
    return Seen(case, reply, grown, following, left_behind)


def table(seen: list[Seen]) -> Table:
    heads = ("fault", "wanted", "came to", "said", "took s", "memory not returned", "next probe", "left behind", "good")
    rows = tuple(
        (
            item.case.name, joined(item.case.wanted), joined(item.outcomes), said(item)[:90],
            f"{item.reply.seconds:.1f}",
            "unknown" if item.grown_bytes is None else f"{item.grown_bytes / MIB:.0f} MiB",
            "ok" if item.next_ok else "FAILED", item.left_behind, "yes" if item.good else "NO",
        )
        for item in seen
    )  # fmt: skip
    return Table("faults, provoked for real", heads, rows)


def joined(outcomes: tuple[Outcome, ...]) -> str:
    return ", ".join(outcome.value for outcome in outcomes)


def said(item: Seen) -> str:
    bad: PointReply | None = next((p for p in item.reply.points if p.outcome is not Outcome.OK), None)
    return bad.message if bad is not None else ""


def words(item: Seen) -> str:
    return f"wanted {joined(item.case.wanted)}, came to {joined(item.outcomes)} ({said(item)})"


def as_data(item: Seen) -> dict[str, object]:
    return {
        "fault": item.case.name,
        "wanted": [outcome.value for outcome in item.case.wanted],
        "outcomes": [outcome.value for outcome in item.outcomes],
        "message": said(item),
        "seconds": item.reply.seconds,
        "grown_bytes": item.grown_bytes,
        "next_ok": item.next_ok,
        "left_behind": item.left_behind,
        "good": item.good,
    }
