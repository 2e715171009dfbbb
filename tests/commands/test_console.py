"""What users bring (messages, paths, names) is printed as it is: brackets are no markup."""

from __future__ import annotations

import pytest

from tuner.commands.console import clock, gain, make_console, rate
from tuner.contract.measurement import Interval


@pytest.mark.parametrize(
    "text", ["RuntimeError: [enforce fail at alloc_cpu.cpp:127]", "a [/] b [bold]c[/bold] :smile:"]
)
def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str], text: str) -> None:
    make_console(as_json=False).print(text)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        (Interval(value=68.2, low=31.1, high=149.6), "68 (31 to 150) samples/s"),
        (Interval(value=137.0, low=89.3, high=210.2), "137 (89 to 210) samples/s"),
    ],
)
def test_a_lopsided_interval_shows_its_ends(interval: Interval, shown: str) -> None:
    assert rate(interval, " samples/s") == shown


def test_figures_never_stand_alone() -> None:
    assert rate(Interval(value=448.26, low=445.1, high=451.3), " samples/s") == "448.3 ± 3.1 samples/s"
    assert rate(Interval(value=448.26, low=0.0, high=float("inf"))) == "448.3 ± ?"
    assert rate(Interval(value=284.0, low=226.0, high=357.0)) == "284 ± 66"
    assert gain(Interval(value=1.079, low=1.061, high=1.098)) == "+7.9 % (+6.1 … +9.8 %)"
    assert [clock(s) for s in (4.21, 42.4, 185.0, 7440.0)] == ["4.2 s", "42 s", "3 min 5 s", "2 h 4 min"]
