"""`tuner explain` on a stored study: text, JSON, a page with pictures; and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import RunTuner
from tests.report.browser import browser, show, text_of, wait
from tests.search.simulated_world import SimulatedRunner, World, make_spec
from tuner.commands.explain import run, tell
from tuner.commands.export import winner
from tuner.contract.base import parse_json
from tuner.contract.errors import ConfigError
from tuner.contract.explanation import ExplainResult
from tuner.contract.probe import ProbeRequest
from tuner.contract.study import StudySpec
from tuner.export.tuned import write
from tuner.report.explain_page import render_explanation, write_explanation
from tuner.report.page import render
from tuner.search.explain import explain
from tuner.search.planner import Done, next_probe
from tuner.search.selection import select
from tuner.store.store import StudyStore

__all__ = ["browser"]

PICTURES = ("alpha_beta.png", "memory.png", "loader.png")


def fill(store: StudyStore, spec: StudySpec) -> None:
    """A whole simulated study in `store`, its decision saved."""
    store.create_study(spec)
    runner = SimulatedRunner(World(alpha=0.03, beta=0.001))
    while not isinstance(plan := next_probe(spec, store.rows(spec.name)), Done):
        assert isinstance(plan, ProbeRequest)
        store.add_reply(spec.name, plan, runner.run(plan), None)
    store.save_decision(spec.name, select(store.rows(spec.name), spec), {})


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('explain') / 'studies.db'}"
    with StudyStore.open(url) as store:
        fill(store, make_spec(name="one"))
    return url


@pytest.fixture(scope="module")
def result(url: str) -> ExplainResult:
    with StudyStore.open(url) as store:
        spec = store.study("one")
        assert spec is not None
        return explain(spec, store.rows("one"), store.decision("one"))


def test_the_command_says_why_and_writes_page_and_pictures(tuner: RunTuner, tmp_path: Path, url: str) -> None:
    ran = tuner("explain", "--storage", url, "--json", "--out", "why")
    assert ran.code == 0, ran.err
    told = parse_json(ExplainResult, ran.out)
    assert told.study == "one"
    assert told.decision == "winner"
    assert told.headline.startswith("Limited by launch overhead")
    for name in PICTURES:
        assert f"why/{name}" in ran.err
        with Image.open(tmp_path / "why" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10, "something is drawn"
    assert (tmp_path / "why" / "explain.html").exists()


def test_the_text_has_one_screen_first_and_then_the_tables(result: ExplainResult) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, soft_wrap=True)
    tell(result, console)
    text = console.export_text()
    parts = (
        "Limited by",
        "What would have to change",
        "Candidates",
        "One setting at a time",
        "Step time =",
        "Peak memory",
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text[: places[2]].count("\n") <= 40
    assert "at most +" in text
    assert "shipped" in text


def test_a_file_is_explained_by_the_study_it_came_from(url: str, tmp_path: Path, capsys: Any) -> None:
    with StudyStore.open(url) as store:
        spec = store.study("one")
        assert spec is not None
        tuned = winner(store, spec)
    write(tmp_path / "best.yaml", tuned)
    run(None, tmp_path / "best.yaml", None, url, as_json=True)
    assert parse_json(ExplainResult, capsys.readouterr().out).config == tuned.config
    write(tmp_path / "bare.yaml", tuned.model_copy(update={"provenance": None}))
    with pytest.raises(ConfigError, match="does not say which study"):
        run(None, tmp_path / "bare.yaml", None, url, as_json=True)
    run("one", tmp_path / "bare.yaml", None, url, as_json=True)
    other = tuned.config.model_copy(update={"micro_batch_size": 3})
    write(tmp_path / "other.yaml", tuned.model_copy(update={"config": other}))
    with pytest.raises(ConfigError, match="was not measured end to end in study one"):
        run(None, tmp_path / "other.yaml", None, url, as_json=True)


def test_what_it_refuses_names_what_is_known(url: str, tmp_path: Path) -> None:
    empty = f"sqlite:///{tmp_path / 'empty.db'}"
    StudyStore.open(empty).close()
    with pytest.raises(ConfigError, match="'two' is not in the store; known: one"):
        run("two", None, None, url, as_json=True)
    with pytest.raises(ConfigError, match="name a study, or --config"):
        run(None, None, None, empty, as_json=True)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out: "):
        run("one", None, tmp_path / "file", url, as_json=True)


def test_the_page_draws_in_a_browser(browser: Any, result: ExplainResult, tmp_path: Path) -> None:
    write_explanation(tmp_path / "why", result)
    show(browser, tmp_path / "why" / "explain.html")
    wait(browser, lambda it: it.execute_script("return document.querySelectorAll('svg.main-svg').length") >= 3)
    for name in ("steps", "memory", "loader"):
        script = f"return document.querySelectorAll('#figure-explain-{name} .point').length"
        assert browser.execute_script(script) >= 3
    assert "Limited by launch overhead" in text_of(browser, "body")
    assert "at most +" in text_of(browser, "#changes")
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_the_report_has_the_same_section(url: str, result: ExplainResult) -> None:
    with StudyStore.open(url) as store:
        spec = store.study("one")
        assert spec is not None
        page = render(spec, store.rows("one"), store.decision("one"), (), result)
    assert "Why this configuration" in page
    assert result.headline in page
    assert 'data-figure="explain-steps"' in page


def test_no_text_from_a_user_becomes_markup(result: ExplainResult) -> None:
    evil = "<script>alert(1)</script>"
    changed = result.model_copy(update={"label": evil, "reason": evil, "headline": evil, "ruled_out": (evil,)})
    page = render_explanation(changed)
    assert evil not in page
    assert "&lt;script&gt;alert(1)" in page
