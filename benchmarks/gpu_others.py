"""Parts 7 and 9: programs that stand on their own, run within the check: the loop against its peers, the GPU tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu_check import ROOT, STOPPED, Check, Finding, Status, Table, last_words

LOOPS = "benchmarks.loops"
ROUNDS = 12
PEERS_S = 90.0
"""Several frameworks are imported, and take turns."""


def loops(check: Check) -> Finding:
    """Our loop against one written by hand on this device; then the peers that are installed, on the CPU."""
    own = check.program("-m", "benchmarks.gpu_loops", "--rounds", str(ROUNDS))
    if not own.result:
        return Finding(Status.FAILED, notes=(last_words(own),))
    tables, notes = [own_loop(own.result)], []
    if find_spec(LOOPS) is None:
        notes.append(f"peers: not run: {LOOPS} is not in this checkout")
    elif check.clock.turn_s < PEERS_S:
        notes.append(f"peers: not run: {check.clock.turn_s:.0f} s are no time for them; name this part alone")
    else:
        told = check.program("-m", LOOPS, "--only", "null", "--sets", "1", "--rounds", "8")
        tables += printed_tables(told.log)
        notes += ["peers run on the CPU, whatever the device"] if len(tables) > 1 else [last_words(told)]
    status = Status.DONE if len(tables) > 1 else Status.PARTIAL
    return Finding(status, tuple(tables), {"own": own.result}, tuple(notes))


def own_loop(found: Mapping[str, Any]) -> Table:
    ratio = found["ratio"]
    rows = tuple((name, f"{1e6 * seconds:.1f}") for name, seconds in found["step_s"].items())
    title = f"a step of next to no work on {found['device']}: ours takes {ratio['value']:.2f} times as long "
    return Table(f"{title}({ratio['low']:.2f} to {ratio['high']:.2f})", ("loop", "us a step (best round)"), rows)


def printed_tables(text: str) -> list[Table]:
    """Markdown tables that a program printed, each under the last line of text before it."""
    found: list[Table] = []
    title, lines = "", list[tuple[str, ...]]()
    for line in [*text.splitlines(), "end"]:
        if line.startswith("|"):
            lines.append(tuple(cell.strip() for cell in line.strip().strip("|").split("|")))
            continue
        if len(lines) > 2:
            found.append(Table(title, lines[0], tuple(lines[2:])))
        lines = []
        title = line.strip() or title
    return found


def gpu_tests(check: Check) -> Finding:
    """The tests marked `gpu`, with the reason of every one that is skipped."""
    lacking = [name for name in ("pytest", "pytest_timeout", "hypothesis") if find_spec(name) is None]
    if lacking or not (ROOT / "tests").is_dir():
        what = ", ".join(lacking) or "the folder tests"
        return Finding(Status.NOT_RUN, notes=(f"missing: {what}",))
    called = check.program(
        "-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", str(ROOT),
        str(ROOT / "tests" / "gpu"),
    )  # fmt: skip
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", called.log)}
    reasons = tuple(re.findall(r"^(?:SKIPPED|FAILED|ERROR).*$", called.log, flags=re.M))
    rows = tuple((word, count) for word, count in counts.items())
    data = {"counts": counts, "exit_code": called.code, "seconds": called.seconds}
    if not counts:
        ended = Status.NOT_RUN if called.code in STOPPED else Status.FAILED
        return Finding(ended, notes=(last_words(called),))
    bad = counts.get("failed", 0) + counts.get("error", 0)
    status = (
        Status.FAILED if bad or called.code not in (0, 5) else Status.DONE if counts.get("passed") else Status.NOT_RUN
    )
    return Finding(status, (Table("tests marked gpu", ("outcome", "tests"), rows),), data, reasons[:20])
