"""A process that writes to the store: `python writer.py MODE URL ...`; what is acknowledged goes to stdout."""

from __future__ import annotations

import os
import sys

from tests.store.rows import BASELINE, end_to_end, example_spec
from tuner.contract.probe import Stage
from tuner.search.score import score
from tuner.store.store import StudyStore


def opened(url: str, name: str) -> None:
    """Open the store, and Optuna's part of it, and store a first probe, at the same moment as others."""
    from tuner.store.trials import TrialBook, distributions, params

    say("ready")
    sys.stdin.readline()
    with StudyStore.open(url) as store:
        spec = store.create_study(example_spec(name))
        book = TrialBook(url, spec.name)
        book.describe(spec)
        knobs = distributions(spec.space, spec.baseline)
        number = book.ask(knobs, params(BASELINE, knobs)).number
        item = end_to_end(f"first-{os.getpid()}", Stage.BASELINE, BASELINE, 1)
        (row,) = store.add_reply(spec.name, item.request, item.reply, number)
        book.tell(number, row, spec, score(spec, [row], row))
        book.close()
    say("opened")


def added(url: str, writer: str, count: str) -> None:
    with StudyStore.open(url) as store:
        store.create_study(example_spec())
        say("ready")
        sys.stdin.readline()
        for index in range(int(count)):
            item = end_to_end(f"{writer}-{index}", Stage.POLISH, BASELINE, index)
            (row,) = store.add_reply(example_spec().name, item.request, item.reply, None)
            say(f"{row.number} {row.request_id}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "opened":
        opened(*sys.argv[2:])
    else:
        added(*sys.argv[2:])
