"""Every command we print is complete, quoted for a shell, and goes on when it is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from tests.conftest import ROOT, Ran, RunTuner, tuner_environment
from tests.store.rows import example_spec
from tuner.cli import app
from tuner.commands import answer, optimize, train
from tuner.commands.train_words import TrainWords
from tuner.commands.typed import ONCE, retyped, typed
from tuner.store.store import StudyStore

TOY = "tests.toys:Toy"
ODD = 'it\'s a $HOME; "odd" one'
"""A name that a shell must not read."""


def command_of(name: str) -> click.Command:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    return group.commands[name]


def any_value(parameter: click.Parameter) -> list[str]:
    """An option with a value that is not its default, as it may be typed."""
    name = max(parameter.opts, key=len)
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return [name]
    kind = parameter.type.name
    if "integer" in kind:
        return [name, "3"]
    if "float" in kind:
        return [name, "2.5"]
    return [name, f"{name.strip('-')}={ODD}"] * (2 if parameter.multiple else 1)


def parsed(monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]) -> tuple[Any, ...]:
    """What the command itself makes of the words."""
    given: list[tuple[Any, ...]] = []
    module = {"train": train, "optimize": optimize}[name]
    monkeypatch.setattr(module, "run", lambda *words, as_json: given.append(words))
    command_of(name).main(words, standalone_mode=False)
    return given[0]


@pytest.mark.parametrize("name", ["train", "optimize"])
def test_every_option_that_is_typed_is_typed_again(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options = [item for item in command_of(name).params if item.name not in ("json", "help", *ONCE)]
    typed_words = [word for item in options for word in any_value(item)]
    assert len(options) > 12
    given = parsed(monkeypatch, name, typed_words)
    again = given[0].again(given[0].out) if name == "train" else retyped("optimize", *given)
    program, command, *words = shlex.split(again)
    assert (program, command) == ("tuner", name)
    assert parsed(monkeypatch, name, words) == given


def test_what_is_said_for_one_start_is_not_said_again() -> None:
    assert retyped("optimize", optimize.SearchWords(fresh=True, seed=3)) == "tuner optimize --seed 3"


def test_a_turned_off_option_and_values_that_look_like_options() -> None:
    words = TrainWords(config=Path("-c.yaml"), confirm=False)
    assert words.again(Path("-out")) == "tuner train --config=-c.yaml --out=-out --no-confirm"
    assert typed("report", "-study", storage=None) == "tuner report -- -study"


SECRET = "postgresql://me:s3cret@db/studies"


def test_a_store_s_password_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed("show", storage=SECRET) == "tuner show --storage 'postgresql+psycopg://me:***@db/studies'"
    monkeypatch.setenv("TUNER_STORAGE", SECRET)
    assert typed("show", storage=SECRET) == "tuner show"
    assert typed("show", storage="sqlite:///my store.db") == "tuner show --storage 'sqlite:///my store.db'"


def shell(command: str, folder: Path, cache: Path) -> Ran:
    """As a person pastes it into a shell."""
    env = tuner_environment(cache)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    ran = subprocess.run(
        ["sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def after(label: str, text: str) -> str:
    """The command behind `label` in what was printed."""
    found = re.search(rf"{label}\s+((?:cd .* && )?tuner .*)$", text, flags=re.M)
    assert found is not None, text
    return found[1]


def test_a_stopped_run_goes_on_with_what_it_prints_from_here_and_from_anywhere(
    tuner: RunTuner, tmp_path: Path, cache: Path
) -> None:
    store = f"sqlite:///{ODD}.db"
    words = ("train", "-w", TOY, "-o", "sleep_s=0.02", "--max-samples", "160", "--max-minutes", "0.001")
    first = tuner(*words, "--storage", store, "--out", f"runs of {ODD}")
    assert first.code == 75, first.err
    command = after("go on with:", first.err)
    second = tuner(*shlex.split(command)[1:])
    assert second.code == 75, second.err
    assert after("go on with:", second.err) == command

    with StudyStore.open(f"sqlite:///{tmp_path}/{ODD}.db") as opened:
        done = opened.runs()
    reached = [run.result.samples for run in done if run.result is not None]
    assert len(reached) == 2
    assert 0 < reached[0] < reached[1] <= 160
    assert not (tmp_path / "studies").exists(), "the store that was named is the one that is used again"

    listed = tuner("runs", "--storage", store)
    shown = tuner(*shlex.split(after("as shown by:", listed.out))[1:])
    stored = after("go on", shown.out)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    third = shell(stored, elsewhere, cache)
    assert third.code in (0, 75), third.err
    assert f"# {stored}" in (tmp_path / f"runs of {ODD}" / "config.yaml").read_text()
    assert len(StudyStore.read(f"sqlite:///{tmp_path}/{ODD}.db").runs()) == 3


def test_the_steps_after_a_search_run_as_they_are_printed(tuner: RunTuner, tmp_path: Path) -> None:
    (tmp_path / f"{ODD}.yaml").write_text(
        "workload: tests.toys:Toy\nspace: {micro_batch_size: [4, 8], num_workers: [0]}\nbudget_s: 60\n"
        "measure: {measure_s: 0.1, compute_s: 0.1}\n"
        "gate: {min_pairs: 2, max_pairs: 2, finalists: 1, measure_s: 0.1}\nlr: {enabled: false}\n"
    )
    store = f"sqlite:///{ODD}.db"
    words = ("-w", TOY, "--gpu", "cpu", "--spec", f"{ODD}.yaml", "--probes", "3", "--out", f"best {ODD}.yaml")
    ran = tuner("optimize", *words, "--storage", store)
    assert ran.code == 0, ran.err
    for label in ("explain", "report"):
        looked = tuner(*shlex.split(after(f"^{label}", ran.out))[1:])
        assert looked.code == 0, looked.err
    assert after("^browse", ran.out) == typed("dashboard", storage=store)
    trained = tuner(*shlex.split(after("^train", ran.out))[1:], "--max-samples", "32", "--no-confirm")
    assert trained.code == 0, trained.err
    assert not (tmp_path / "studies" / "studies.db").exists()


def test_the_next_steps_trust_code_only_where_the_file_names_some() -> None:
    spec = example_spec()
    own = spec.model_copy(update={"workload": "mine.jobs:Job"})
    assert answer.next_steps(spec, "a b.yaml", None, "forkserver")["train"] == "tuner train --config 'a b.yaml'"
    steps = answer.next_steps(own, "b.yaml", None, "fresh")
    assert steps["train"] == "tuner train --config b.yaml --allow-code --isolation fresh"


@pytest.mark.parametrize("words", [("show",), ("explain",), ("runs",), ("runs", "nope")])
def test_who_has_nothing_yet_is_told_a_command_that_exists(tuner: RunTuner, words: tuple[str, ...]) -> None:
    ran = tuner(*words)
    found = after("make one:", ran.out + ran.err)
    name, *options = shlex.split(found)[1:]
    command_of(name).make_context(name, options)


def test_every_command_is_made_by_the_builder() -> None:
    """A command that is written out by hand is one that drops what was typed."""
    allowed = {"cli.py", "cli_production.py", "typed.py"}  # the help's examples, and the builder
    for path in (ROOT / "tuner").rglob("*.py"):
        if path.name not in allowed:
            text = path.read_text(encoding="utf-8")
            made = re.findall(r"tuner (?:train|optimize|report|explain|runs|dashboard) (?:--|\{)", text)
            assert made == [], path
