"""Signals to stop, at random moments, to any processes of `optimize` and `train`: do both end as they promise?

python -m benchmarks.chaos_stops --rounds 200 --beside 2

Each round sends SIGINT, SIGTERM, SIGHUP or SIGUSR1, once or twice, to the command alone, to one, some, or all of its
processes (worker host, run, ranks, loader workers). Right = exit code 75 (130 of Ctrl-C; 0 of a command that was done),
one line that names the signal, a readable store or a checkpoint of what was trained, and nothing left after 5 s.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.machine import print_machine, table

MARK = "TUNER_STOPS_MARK"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TARGETS = ("the command", "one", "some", "all")
FIRST_S = 0.15
"""Before this the interpreter itself starts, and nothing of ours can hear."""
LAST_S = {"optimize": 14.0, "train": 9.0}
END_S = 40.0
LEFT_S = 5.0
JOB = "benchmarks.honest.jobs:Sleeping"
STUDY = f"workload: {JOB}\nspace: {{num_workers: [0, 1, 2]}}\nbudget_s: 30\n"


@dataclass(frozen=True)
class Round:
    """What is done to which command, and when."""

    command: str
    number: signal.Signals
    target: str
    times: int
    ranks: int
    at_s: float
    seed: int

    def __str__(self) -> str:
        twice = " twice" if self.times > 1 else ""
        ranks = f" of {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.command}{ranks}: {self.number.name}{twice} to {self.target} after {self.at_s:.2f} s"


def drawn(seed: int) -> Round:
    chance = random.Random(seed)
    command = chance.choice(list(LAST_S))
    return Round(
        command=command,
        number=chance.choice(SIGNALS),
        target=chance.choice(TARGETS),
        times=chance.choice((1, 1, 2)),
        ranks=chance.choice((1, 1, 1, 2)) if command == "train" else 1,
        at_s=chance.uniform(FIRST_S, LAST_S[command]),
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--beside", type=int, default=2, help="rounds at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    words = parser.parse_args()
    print_machine(f"python -m benchmarks.chaos_stops {' '.join(sys.argv[1:])}".strip())
    rounds = [drawn(words.seed + number) for number in range(words.rounds)]
    counts: Counter[tuple[str, str]] = Counter()
    wrong = 0
    with ThreadPoolExecutor(words.beside) as threads:
        for plan, (code, faults) in zip(rounds, threads.map(played, rounds), strict=True):
            counts[plan.command, str(code)] += 1
            wrong += bool(faults)
            if faults:
                print(f"WRONG  seed {plan.seed}  {plan}: {'; '.join(faults)}", flush=True)
    rows = [(command, code, str(count)) for (command, code), count in sorted(counts.items())]
    print("\n" + table(("command", "exit code", "rounds"), rows))
    print(f"\nright: {words.rounds - wrong} of {words.rounds}")
    sys.exit(bool(wrong))


def played(plan: Round) -> tuple[int | None, list[str]]:
    """The exit code, and what was wrong."""
    with tempfile.TemporaryDirectory(prefix="tuner-stops-") as name:
        folder = Path(name)
        (folder / "study.yaml").write_text(STUDY)
        mark = uuid.uuid4().hex
        environment = os.environ | {
            MARK: mark,
            "TUNER_CACHE": str(folder / "cache"),
            "TUNER_LOCKS": str(folder / "locks"),
        }
        with (folder / "said").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "tuner", *words_of(plan, folder)],
                env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        with suppress(subprocess.TimeoutExpired):
            process.wait(plan.at_s)
        done = process.poll() is not None
        if not done:
            strike(plan, process.pid, mark)
        faults = []
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            faults.append(f"still there after {END_S:.0f} s")
        faults += [f"left behind: {' '.join(left.cmdline()[-3:])}" for left in what_is_left(mark)]
        if not done:
            faults += judged(plan, process.returncode, (folder / "said").read_text(errors="replace"), folder)
        end(mark)
        return process.returncode, faults


def words_of(plan: Round, folder: Path) -> list[str]:
    store = ["--storage", f"sqlite:///{folder}/studies.db"]
    if plan.command == "optimize":
        own = ["--gpu", "auto", "--spec", str(folder / "study.yaml"), "--out", str(folder / "best.yaml")]
    else:
        own = ["--out", str(folder / "run"), "--nproc", str(plan.ranks)]
    return [plan.command, "-w", JOB, "-o", "workers=2", *store, *own]


def strike(plan: Round, command: int, mark: str) -> None:
    chance = random.Random(plan.seed + 1)
    family = [process.pid for process in marked(mark)]
    pids = {
        "the command": [command],
        "one": [chance.choice(family or [command])],
        "some": [pid for pid in family if chance.random() < 0.5] or [command],
        "all": family,
    }[plan.target]
    for _ in range(plan.times):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, plan.number)
        time.sleep(0.05)


def judged(plan: Round, code: int | None, said: str, folder: Path) -> list[str]:
    if code == 0:
        return []  # done before the signal could change anything
    faults = []
    names = ("Ctrl-C", "SIGINT") if plan.number == signal.SIGINT else (plan.number.name,)
    if code not in ((75, 130) if plan.number == signal.SIGINT else (75,)):
        faults.append(f"exit code {code}, last words: {' / '.join(said.splitlines()[-3:])}")
    elif not any(name in said for name in names):
        faults.append(f"does not name the signal: {said.splitlines()[-1:]}")
    if "Traceback" in said:
        faults.append("a traceback")
    store = folder / "studies.db"
    if store.exists():
        with closing(sqlite3.connect(store)) as connection:
            if connection.execute("pragma integrity_check").fetchone() != ("ok",):
                faults.append("the store is damaged")
    trained = (folder / "run" / "metrics.jsonl").exists() and (folder / "run" / "metrics.jsonl").stat().st_size
    hard = "ended at once" in said
    if trained and not hard and not list((folder / "run" / "checkpoints").glob("step-*")):
        faults.append("trained, and no checkpoint")
    return faults


def marked(mark: str) -> Sequence[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def what_is_left(mark: str) -> Sequence[psutil.Process]:
    until = time.monotonic() + LEFT_S
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def end(mark: str) -> None:
    for process in marked(mark):
        with suppress(psutil.Error):
            process.kill()


if __name__ == "__main__":
    main()
