"""Every command we print is complete, quoted for a shell, and goes on when it is run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from tests.conftest import ROOT, Ran, RunTuner, tuner_environment
from tests.store.rows import example_spec
from tuner import cli, cli_production
from tuner.commands import answer, optimize, train
from tuner.commands.train_words import TrainWords
from tuner.commands.typed import ONCE, retyped, typed
from tuner.store.store import StudyStore

TOY = "tests.toys:Toy"
ODD = 'it\'s a $HOME; "odd" one'
"""A name that a shell must not read."""


COMMAND = re.compile(r"tuner (train|optimize|report|explain|runs|show|dashboard|bench) (--|$)")


def options_of(name: str) -> dict[str, Any]:
    """The options of a command, by the name of their parameter, and what is typed for each."""
    return get_type_hints({"train": cli_production.train, "optimize": cli.optimize}[name])


def any_value(parameter: str, kind: Any) -> list[str]:
    """An option with a value that is not its default, as it may be typed."""
    option = f"--{parameter.replace('_', '-')}"
    kinds = {kind, *get_args(kind)}
    if bool in kinds:
        return [option]
    if int in kinds or float in kinds:
        return [option, "3"]
    if parameter == "storage":
        return [option, f"sqlite:///{ODD}.db"]
    return [option, f"{parameter}={ODD}"] * (1 + (list[str] in kinds))


def typed_in(words: Sequence[str]) -> None:
    """What the program does with them, errors and all."""
    typer.main.get_command(cli.app).main([*words], standalone_mode=False)


def parsed(monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]) -> tuple[Any, ...]:
    """What the command itself makes of the words."""
    given: list[tuple[Any, ...]] = []
    module = {"train": train, "optimize": optimize}[name]
    monkeypatch.setattr(module, "run", lambda *words, as_json: given.append(words))
    typed_in([name, *words])
    return given[0]


@pytest.mark.parametrize("name", ["train", "optimize"])
def test_every_option_that_is_typed_is_typed_again(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options = {option: kind for option, kind in options_of(name).items() if option not in ("json", "return", *ONCE)}
    typed_words = [word for option, kind in options.items() for word in any_value(option, kind)]
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
    assert words.again(Path("-out")) == "tuner train --config=-c.yaml --no-confirm --out=-out"
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


def test_a_stopped_run_goes_on_with_what_it_prints_from_anywhere(tuner: RunTuner, tmp_path: Path, cache: Path) -> None:
    store = f"sqlite:///{ODD}.db"
    words = ("train", "-w", TOY, "-o", "sleep_s=0.02", "--max-samples", "160", "--max-minutes", "0.001")
    first = tuner(*words, "--storage", store, "--out", f"runs of {ODD}")
    assert first.code == 75, first.err
    command = after("go on with:", first.err)
    listed = tuner("runs", "--storage", store)
    shown = tuner(*shlex.split(after("as shown by:", listed.out))[1:])
    stored = after("go on", shown.out)
    assert stored == f"cd {tmp_path} && {command}"
    assert f"# {stored}" in (tmp_path / f"runs of {ODD}" / "config.yaml").read_text()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    second = shell(stored, elsewhere, cache)
    assert second.code == 75, second.err
    assert after("go on with:", second.err) == command
    with StudyStore.read(f"sqlite:///{tmp_path}/{ODD}.db") as opened:
        reached = [run.result.samples for run in opened.runs() if run.result is not None]
    assert len(reached) == 2
    assert 0 < reached[0] < reached[1] < 160
    assert not (tmp_path / "studies").exists(), "the store that was named is the one that is used again"


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
    typed_in([*shlex.split(found)[1:], "--help"])


def test_every_command_is_made_by_the_builder() -> None:
    """A command that is written out by hand is one that drops what was typed."""
    for path in (ROOT / "tuner").rglob("*.py"):
        if path.name in ("cli.py", "cli_production.py"):  # the help's examples
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        remarks = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
        said = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in remarks]
        by_hand = [text for text in said if isinstance(text, str) and COMMAND.search(text)]
        assert by_hand == [], path
