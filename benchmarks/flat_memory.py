"""Does a production run grow? Resident memory, open files and threads of the worker over thousands of steps.

python -m benchmarks.flat_memory --steps 2000
python -m benchmarks.flat_memory --workloads gpt2 --steps 500 --json flat.json

Each workload at its tiny size, with log lines and checkpoints on the way. The first fifth is warm-up (allocators and
loader settle); drift is the median of the last tenth over the median of the tenth after the warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks.chaos_blows import find_worker
from benchmarks.chaos_train import WORKLOADS, Job, failure, short_run
from benchmarks.machine import print_machine, table
from tuner.commands.setup import cache_dir
from tuner.contract.config import Cadence
from tuner.contract.probe import Event, Listener, TrainEvent
from tuner.contract.trust import ANY_CODE
from tuner.probe.runner import SubprocessRunner

GOAL = 0.01
LINES, CHECKPOINTS = 100, 8
"""In a whole run."""


@dataclass
class Course:
    """One run as seen from outside, an entry per log line."""

    workload: str
    steps: int
    rss_bytes: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    @property
    def drift(self) -> float:
        early, late = self._ends(self.rss_bytes)
        return late / early - 1

    def growth(self, counts: Sequence[int]) -> int:
        early, late = self._ends(counts)
        return round(late - early)

    @staticmethod
    def _ends(values: Sequence[int]) -> tuple[float, float]:
        tenth = max(1, len(values) // 10)
        return statistics.median(values[2 * tenth : 3 * tenth]), statistics.median(values[-tenth:])

    @property
    def flat(self) -> bool:
        return self.drift < GOAL and self.growth(self.files) <= 0 and self.growth(self.threads) <= 0


def main() -> None:
    words = parse()
    print_machine(f"python -m benchmarks.flat_memory {' '.join(sys.argv[1:])}".rstrip())
    courses = []
    with tempfile.TemporaryDirectory(prefix="tuner-flat-") as folder:
        for name in words.workloads:
            courses.append(watched(name, words.steps, Path(folder) / name.replace(":", "_"), words))
            if words.json:
                plain = [asdict(course) for course in courses]
                Path(words.json).write_text(json.dumps(plain), encoding="utf-8")
    print(text_of(courses))
    sys.exit(not all(course.flat for course in courses))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--background-checkpoints", action="store_true", help="write checkpoints beside the training")
    parser.add_argument("--json", help="also write every reading here")
    return parser.parse_args()


def watched(workload: str, steps: int, folder: Path, words: argparse.Namespace) -> Course:
    course = Course(workload, steps)
    with SubprocessRunner(cache_dir(), log_dir=folder / "logs", trust=ANY_CODE) as runner:
        config = short_run(workload, steps, runner, evaluations=0)
        size = config.effective_batch_size
        cadence = Cadence(
            log_samples=max(1, steps // LINES) * size, checkpoint_samples=max(1, steps // CHECKPOINTS) * size
        )
        job = Job(config.model_copy(update={"cadence": cadence}), words.background_checkpoints)
        reply = runner.run(job.request(folder / "run"), reader(course))
    if reply.train_result is None:
        raise SystemExit(f"{workload}: {failure(reply)}")
    return course


def reader(course: Course) -> Listener:
    """A listener that looks at the worker at each log line."""
    known: list[psutil.Process] = []

    def listen(event: Event) -> None:
        if not known and (worker := find_worker()) is not None:
            known.append(worker)
        if isinstance(event, TrainEvent) and known:
            with known[0].oneshot():
                course.rss_bytes.append(known[0].memory_info().rss)
                course.files.append(known[0].num_fds())
                course.threads.append(known[0].num_threads())

    return listen


def text_of(courses: Sequence[Course]) -> str:
    heads = ("workload", "steps", "RSS", "drift", "open files", "more", "threads", "more", "flat")
    return table(heads, [row(course) for course in courses])


def row(course: Course) -> tuple[object, ...]:
    return (
        course.workload,
        course.steps,
        f"{course.rss_bytes[-1] / (1 << 20):.0f} MiB",
        f"{100 * course.drift:+.2f} %",
        course.files[-1],
        course.growth(course.files),
        course.threads[-1],
        course.growth(course.threads),
        "yes" if course.flat else "NO",
    )


if __name__ == "__main__":
    main()
