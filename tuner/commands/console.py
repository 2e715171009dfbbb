"""How the commands speak: people's words on stdout, or on stderr when stdout carries one JSON object. Logs without a
terminal get plain lines of full width."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

from tuner.commands.encodings import as_carried
from tuner.contract.errors import JobFailed
from tuner.contract.measurement import Interval
from tuner.contract.probe import Event, NoticeEvent

if TYPE_CHECKING:
    from rich.console import Console

LOPSIDED = 0.125
"""Share of its half-width by which an interval's middle may lie beside its value, to be written with one `±`."""


def make_console(*, as_json: bool) -> Console:
    from rich.console import Console

    stream = _Spoken(sys.stderr if as_json else sys.stdout)
    # what is printed holds users' text (messages, paths, names): brackets in it are no markup, colons no emoji
    return Console(
        file=cast("TextIO", stream),
        width=None if stream.isatty() else 150,
        soft_wrap=not stream.isatty(),
        highlight=False,
        markup=False,
        emoji=False,
    )


class _Spoken:
    """A stream for people's words: neither a full disk under a log nor a reader that has left ends the work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Warnings:
    """Prints what probes warn of, each text once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: set[str] = set()

    def listen(self, event: Event) -> None:
        if isinstance(event, NoticeEvent) and event.level == "warning" and event.text not in self._said:
            self._said.add(event.text)
            self._console.print(f"  warning: {event.text}", style="yellow")


def emit_json(text: str) -> None:
    """Raises JobFailed where stdout does not take it."""
    write_out(as_carried(text, sys.stdout.encoding) + "\n")


def write_out(text: str) -> None:
    """A result on stdout. Raises JobFailed where it is not taken; a reader that has left ends the command."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise JobFailed(
            f"stdout cannot be written: {error.strerror}; send it to a place with room, and run again"
        ) from None


def let_go() -> None:
    """What cannot be written any more is dropped, before the interpreter fails over it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def mib(value: int | float | None) -> str:
    return "unknown" if value is None else f"{value / (1 << 20):,.0f} MiB"


def size(value: int) -> str:
    """`812 B`, `3.4 KiB`, `1.2 GiB`."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << power:
            return f"{value / (1 << power):,.1f} {unit}"
    return f"{value} B"


def clock(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 4 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def rate(interval: Interval | None, unit: str = "") -> str:
    """`448 ± 3`, or `68 (31 to 150)` where the interval is lopsided, with as many digits as it allows; one number alone
    is never shown as certain."""
    if interval is None:
        return "-"
    value, low, high = interval.value, interval.low, interval.high
    if not math.isfinite(high) or not math.isfinite(low):
        return f"{value:.4g} ± ?{unit}"
    reach = (high - low) / 2
    digits = max(0, 1 - math.floor(math.log10(reach))) if reach > 0 else 1
    digits = min(digits, 3)
    if abs((low + high) / 2 - value) > LOPSIDED * reach or value <= reach:
        return f"{value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f}){unit}"
    return f"{value:,.{digits}f} ± {reach:,.{digits}f}{unit}"


def gain(interval: Interval) -> str:
    """`+7.9 % (+6.1 … +9.8 %)`."""

    def percent(ratio: float) -> str:
        return f"{100 * (ratio - 1):+.1f}"

    return f"{percent(interval.value)} % ({percent(interval.low)} … {percent(interval.high)} %)"
