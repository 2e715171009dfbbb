"""Any option of any command with any value: never a traceback, never a hang, never an import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.hostile import relaxed, run, texts
from tuner import cli


def options_of() -> dict[tuple[str, ...], tuple[int, list[tuple[str, bool]]]]:
    """Command -> how many arguments it takes, and its options with whether each takes a value."""
    found: dict[tuple[str, ...], tuple[int, list[tuple[str, bool]]]] = {}

    def look(command: Any, name: tuple[str, ...]) -> None:
        for word, inner in getattr(command, "commands", {}).items():
            look(inner, (*name, word))
        options = [item for item in command.params if item.opts[0].startswith("-")]
        arguments = len(command.params) - len(options)
        found[name] = arguments, [(word, not item.is_flag) for item in options for word in item.opts]

    look(typer.main.get_command(cli.app), ())
    return found


COMMANDS = options_of()
numbers = st.one_of(
    st.sampled_from(
        ["0", "1", "2", "-1", "1e23", "nan", "inf", "9" * 25, "9" * 400, "1.5", "8s", "4GiB", "99999999999"]
    ),
    st.integers().map(str),
)
pairs = st.tuples(
    st.sampled_from(["micro_batch_size", "lr", "precision", "world_size", "x"]), st.one_of(texts, numbers)
)
typed = st.one_of(texts, numbers, pairs.map("=".join))
likely = st.sampled_from(["graph", "cpu", "auto", "staged", "time", "free", "fresh", "sqlite:///s.db", "mine", "tiny"])


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(sorted(COMMANDS)))
    arguments, options = COMMANDS[name]
    words = [*name]
    if any(option == "--workload" for option, _ in options) and draw(st.booleans()):
        words += ["--workload", draw(st.sampled_from(["graph", "gpt2", "nothing"]))]
    for _ in range(draw(st.integers(0, arguments))):
        words.append(draw(st.one_of(typed, likely)))
    for option, takes in draw(st.lists(st.sampled_from(options), max_size=4)) if options else []:
        words += [option, draw(st.one_of(typed, likely))] if takes else [option]
    # typed by hand, this name is asked for
    return [word for word in words if "evilmod" not in word]


@settings(relaxed, max_examples=150)
@given(words=commands())
def test_options(place: Path, words: list[str]) -> None:
    run(words)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(relaxed, max_examples=1500)
@given(words=commands())
def test_many_options(place: Path, words: list[str]) -> None:
    run(words)
