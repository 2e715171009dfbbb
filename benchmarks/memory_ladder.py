"""Records what `benchmarks.memory` plays with: a ladder of micro-batch sizes, measured and traced, in fresh processes.

The file grows cell by cell, so a recording that was stopped goes on where it was.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import cpu_name
from tuner.commands import setup
from tuner.commands.setup import Job, JobWords
from tuner.contract.config import RunConfig
from tuner.contract.measurement import MemoryPeak
from tuner.contract.probe import PointReply, ProbeKind, ProbeLimits, ProbeRequest
from tuner.contract.trust import ANY_CODE
from tuner.probe.runner import SubprocessRunner

FILE = Path(__file__).resolve().parent / "grids" / "memory.jsonl.gz"
RUNGS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Sizes of a ladder, as shares of its largest."""
TOP_BYTES = 600 << 20
"""What the trace of the largest size holds without checkpointing."""
FIRST_LOOK = (16, 64)
"""Sizes traced to find the largest."""
REPEATS = 3
TOGETHER = 4
"""Sizes traced in one process."""
LIMITS = ProbeLimits(measure_s=0.3, min_steps=2, deadline_s=120.0)


Key = tuple[str, str, int, bool, int]


@dataclass(frozen=True)
class Cell:
    """One probe of a ladder: measured growth of the process, or the bytes a trace predicts."""

    workload: str
    kind: str
    """`compute` or `trace`."""
    micro: int
    checkpointing: bool
    repeat: int
    bytes: int
    """Growth above the imported process (on a GPU reserved + context), or live tensors of a trace; 0 = it failed."""
    heap: int = 0
    """What a trace says the host's heap needs for them."""
    message: str = ""
    seconds: float = 0.0
    cpu: str = ""
    torch: str = ""

    @property
    def key(self) -> Key:
        return (self.workload, self.kind, self.micro, self.checkpointing, self.repeat)


def read_cells(file: Path) -> list[Cell]:
    if not file.exists():
        return []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [Cell(**json.loads(line)) for line in lines]


def record(workload: str, file: Path) -> None:
    """Measure what is missing of one workload's ladder, and add it to `file`."""
    runner = setup.make_runner("forkserver", ANY_CODE)
    try:
        job = setup.understand(JobWords(workload, preset="tiny"), runner)
        setup.prepare(job, workload, runner, lambda _: None)
        Ladder(job, workload, runner, file).climb()
    finally:
        runner.close()


class Ladder:
    """One workload's cells in a file, and how those that are missing are had."""

    def __init__(self, job: Job, workload: str, runner: SubprocessRunner, file: Path) -> None:
        self._job = job
        self._workload = workload
        self._runner = runner
        self._file = file
        self._known = {cell.key: cell for cell in read_cells(file) if cell.workload == workload}

    def climb(self) -> None:
        """Traces of all sizes; then each size in processes of its own, in rounds, so that drift of the host favours
        none."""
        self._measure("trace", [(micro, False) for micro in FIRST_LOOK])
        low, high = (self._known[self._key("trace", micro, False, 0)].bytes for micro in FIRST_LOOK)
        places = [(micro, recomputes) for micro in ladder_sizes(low, high) for recomputes in (False, True)]
        for at in range(0, len(places), TOGETHER):
            self._measure("trace", places[at : at + TOGETHER])
        for repeat in range(REPEATS):
            for place in places:
                self._measure("compute", [place], repeat)

    def _key(self, kind: str, micro: int, checkpointing: bool, repeat: int) -> Key:
        return (self._workload, kind, micro, checkpointing, repeat)

    def _measure(self, kind: str, places: Sequence[tuple[int, bool]], repeat: int = 0) -> None:
        """Those of `places` that are missing, in one process."""
        missing = [place for place in places if self._key(kind, *place, repeat) not in self._known]
        if not missing:
            return
        request = ProbeRequest(
            id="memory-ladder",
            kind=ProbeKind(kind),
            workload=self._workload,
            options=self._job.options,
            points=tuple(self._config(micro, recomputes) for micro, recomputes in missing),
            limits=LIMITS,
            cache_dir=str(setup.cache_dir()),
        )
        for place, point in zip(missing, self._runner.run(request).points, strict=True):
            self._keep(self._cell(kind, place, repeat, point))

    def _cell(self, kind: str, place: tuple[int, bool], repeat: int, point: PointReply) -> Cell:
        return Cell(
            *(self._workload, kind, *place, repeat, _bytes(point)),
            heap=int(point.values.get("predicted_heap_bytes", 0)),
            message=point.message,
            seconds=round(point.seconds, 2),
            cpu=cpu_name(),
            torch=point.environment.torch if point.environment is not None else "",
        )

    def _keep(self, cell: Cell) -> None:
        self._known[cell.key] = cell
        with gzip.open(self._file, "at", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(cell)) + "\n")
        print(f"{cell.workload} {cell.kind} {cell.micro} {'recomputing' if cell.checkpointing else 'plain'} "
              f"{cell.bytes >> 20} MiB {cell.message} {cell.seconds:.1f} s", file=sys.stderr, flush=True)  # fmt: skip

    def _config(self, micro: int, checkpointing: bool) -> RunConfig:
        changes = {"micro_batch_size": micro, "accumulation_steps": 1, "gradient_checkpointing": checkpointing}
        return self._job.baseline.model_copy(update=changes)


def _bytes(point: PointReply) -> int:
    if point.measurement is not None:
        return growth_bytes(point.measurement.memory)
    return int(point.values.get("predicted_peak_bytes", 0))


def growth_bytes(peak: MemoryPeak) -> int:
    """Reserved + context on a GPU; without one what the process grew by after its imports."""
    return peak.gate_bytes if peak.reserved_bytes is not None else peak.process_bytes - peak.base_bytes


def ladder_sizes(low_bytes: int, high_bytes: int) -> list[int]:
    """Micro-batch sizes, multiples of 8, up to the one whose trace takes `TOP_BYTES`, from the two first looks."""
    low, high = FIRST_LOOK
    slope = (high_bytes - low_bytes) / (high - low)
    top = (TOP_BYTES - low_bytes) / slope + low
    return sorted({8 * max(1, math.ceil(share * top / 8)) for share in RUNGS})
