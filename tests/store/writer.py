"""A process that writes to the store: `python writer.py MODE URL ...`; what is acknowledged goes to stdout."""

from __future__ import annotations

import sys

from tests.store.rows import BASELINE, end_to_end, example_spec
from tuner.contract.probe import Stage
from tuner.store.store import StudyStore


def opened(url: str) -> None:
    """Open the store, and Optuna's part of it, at the same moment as others."""
    from tuner.store.trials import TrialBook

    sys.stdin.readline()
    with StudyStore.open(url) as store:
        spec = store.create_study(example_spec())
        TrialBook(url, spec.name).close()
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
