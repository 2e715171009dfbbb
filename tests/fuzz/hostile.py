"""Odd values for documents, options and rows, and the `tuner` command run on them in this very process, up to the door
where a worker would start."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.store.rows import BASELINE, device, environment
from tuner import cli
from tuner.contract.errors import JobFailed
from tuner.contract.measurement import Outcome
from tuner.contract.probe import DescribeEvent, Listener, PointReply, ProbeKind, ProbeReply, ProbeRequest
from tuner.contract.workload import WorkloadInfo
from tuner.probe.runner import SubprocessRunner

EVIL = "evilmod:Job"
CANARY = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"
CPU_S = 10
"""Processor time after which a command hangs: unlike the clock's it does not depend on what else runs here."""

relaxed = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
ODD = """
 .|..|/|/dev/zero|/dev/null|../x|a b|nan|inf|-1|0|1e999|off|evilmod:Job|evilmod|graph|~|[|{|%s|*a|&a|!!x y|²|\x85
"""
texts = st.one_of(
    st.sampled_from([*ODD.strip().split("|"), "", " ", "a\nb", "x" * 129, "x" * 5000, "9" * 400]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20),
)
scalars: st.SearchStrategy[Any] = st.one_of(
    texts,
    st.sampled_from(
        [0, -1, 1, 1 << 31, 1 << 63, 10**400, 0.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), None, True]
    ),
    st.integers(),
    st.floats(),
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


class Hung(Exception):
    """The command has used up its processor time."""


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it printed."""

    code: int
    text: str


def describing(runner: SubprocessRunner, request: ProbeRequest, listener: Listener | None = None) -> ProbeReply:
    """In place of a worker: the door as it is, a description, and no further."""
    runner.admit(request)
    request.to_json()
    point = PointReply(outcome=Outcome.OK)
    if request.kind is ProbeKind.DESCRIBE:
        baseline = BASELINE.model_copy(update={"workload": request.workload or "graph"})
        info = WorkloadInfo(name="x", summary="x", train_samples=100, baseline=baseline)
        said = DescribeEvent(device=device(), info=info if request.workload else None, environment=environment())
        return ProbeReply(request_id=request.id, points=(), seconds=0.0, description=said)
    if request.kind is ProbeKind.PREPARE:
        return ProbeReply(request_id=request.id, points=(point,), seconds=0.0)
    raise JobFailed("a worker would start here")


def run(words: Sequence[str]) -> Said:
    """`tuner WORDS` as its entry point runs it. Raises what would be a traceback, and Hung."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), _bounded(), _argv(words):
        try:
            cli.main()
            code: Any = 0
        except SystemExit as error:
            code = error.code
    assert "evilmod" not in sys.modules
    assert not Path("imported").exists()
    text = out.getvalue()
    assert code in (0, 2, 3, 75), (code, text)
    return Said(int(code or 0), text)


@contextlib.contextmanager
def _argv(words: Sequence[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, ["tuner", *words]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    def hung(_number: int, _frame: FrameType | None) -> None:
        raise Hung

    before = signal.signal(signal.SIGPROF, hung)
    stopped = signal.getsignal(signal.SIGTERM)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        signal.signal(signal.SIGTERM, stopped)


def paths_in(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested mappings and lists."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        yield (*above, key)
        yield from paths_in(value, (*above, key))


def alike(value: Any) -> st.SearchStrategy[Any]:
    """Another value of the same kind: what passes the types and must be stood further in."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.one_of(st.integers(0, 64), st.integers(0, 1 << 40), st.sampled_from([2**n for n in range(63)]))
    if isinstance(value, float):
        return st.one_of(st.floats(0, 2), st.floats(1e-12, 1e12))
    if isinstance(value, list):
        return st.lists(st.sampled_from(value), max_size=8) if value else st.just([])
    return st.just(value)


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> str:
    """The JSON of `tree` (which YAML can read) with a few of its values, or some of its text, replaced."""
    made = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(list(paths_in(made)) or [("x",)]))
        place = made
        for key in above:
            place = place[key]
        how = draw(st.integers(0, 12))
        if how == 0:
            place.pop(last)
        elif how == 1 and isinstance(place, dict):
            place[draw(texts)] = draw(values)
        elif how < 9:
            place[last] = draw(alike(place[last]))
        else:
            place[last] = draw(values)
        if not made:
            break
    text = json.dumps(made)
    if draw(st.integers(0, 9)) == 0:
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 20))
        text = text[:at] + draw(texts) + text[at + length :]
    return text.replace("NaN", ".nan").replace("Infinity", ".inf") if draw(st.booleans()) else text
