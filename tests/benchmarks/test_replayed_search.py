"""The two programs over recorded grids, as they are called: tables, JSON, the same figures again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import aa, search
from benchmarks.machine import Called
from benchmarks.replaying import in_processes

Program = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    """Run a benchmark's `main` with words; its output and its JSON."""

    def run(main: Callable[[], None], *words: str) -> tuple[str, dict[str, Any]]:
        path = tmp_path / "told.json"
        monkeypatch.setattr(sys, "argv", ["benchmark", *words, "--jobs", "1", "--json", str(path)])
        main()
        told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return capsys.readouterr().out, told

    return run


def test_searchers_are_compared_and_judged(program: Program, recording: Path) -> None:
    words = ("--seeds", "2", "--searchers", "ours,random,tpe,lightning")
    text, told = program(search.main, "--grid", str(recording), *words)
    (grid,) = told["grids"]
    by_name = {summary["searcher"]: summary for summary in grid["summaries"]}
    assert set(by_name) == {"ours", "ours before the gate", "random", "TPE", "Lightning's rule"}
    assert by_name["ours"]["regret"]["value"] < by_name["Lightning's rule"]["regret"]["value"]
    assert all(s["regret"]["low"] <= s["regret"]["value"] <= s["regret"]["high"] for s in grid["summaries"])
    assert by_name["ours"]["shipped_ooms"] == 0
    assert grid["whole_ratio"]["value"] > 0
    assert len(told["searches"]) == 10
    assert "Constants of the search were chosen on" in text
    assert "OOMs (most)" in text


def test_the_same_command_gives_the_same_figures(program: Program, recording: Path) -> None:
    words = ("--grid", str(recording), "--seeds", "2", "--searchers", "ours,random", "--objective", "throughput")
    assert program(search.main, *words)[1] == program(search.main, *words)[1]


def test_a_killed_study_comes_to_the_same_decision(program: Program, recording: Path) -> None:
    text, _ = program(search.main, "--grid", str(recording), "--kill-test", "4")
    assert "4 of 4 identical" in text


def test_an_unknown_searcher_is_named(program: Program, recording: Path) -> None:
    with pytest.raises(SystemExit, match="--searchers: unknown guess; known: ours, random"):
        program(search.main, "--grid", str(recording), "--searchers", "guess")


def test_the_baseline_against_itself_is_no_gain(program: Program, recording: Path) -> None:
    text, told = program(aa.main, "--grid", str(recording), "--searches", "8")
    assert {item["decision"] for item in told["searches"]} == {"no_gain"}
    assert any(item["best"] > 1.01 for item in told["searches"]), "noise alone looks like a gain now and then"
    assert "95 % upper bound" in text


def test_the_bound_on_false_gains_is_the_exact_one() -> None:
    assert aa.upper_bound(0, 1000) == pytest.approx(1 - 0.05 ** (1 / 1000))
    assert aa.upper_bound(0, 1) == pytest.approx(0.95)
    assert aa.upper_bound(3, 10) == pytest.approx(0.6066, abs=1e-4)
    assert aa.upper_bound(5, 5) == 1.0


def test_a_live_result_is_counted_like_a_replayed_one() -> None:
    told: dict[str, Any] = {"decision": "winner", "gain": {"value": 1.02}, "aa": {"search_maximum": 1.05}}
    honest: dict[str, Any] = {"decision": "no_gain", "gain": None, "aa": {"search_maximum": None}}
    found = [aa.as_search("toy", seed, Called(0, 60.0, result, "")) for seed, result in enumerate((told, honest))]
    assert (found[0].gain, found[0].best, found[1].best) == (1.02, 1.05, 1.0)
    assert aa.counted(found).startswith(
        "1 false gains in 2, of which 1 came to a comparison (95 % upper bound 100 % of those), 0 failed"
    )


def test_processes_give_results_in_the_order_asked() -> None:
    assert in_processes(abs, [-3, 2, -1], 2, "numbers") == [3, 2, 1]
