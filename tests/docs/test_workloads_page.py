"""docs/workloads.md describes the workloads as they are: every option is named, and no knob that does not exist."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from tests.conftest import ROOT
from tuner.contract.space import Knob
from tuner.registry import known_workloads
from workloads.gpt2.settings import OPTIONS as GPT2
from workloads.graph.workload import OPTIONS as GRAPH
from workloads.latent_cfg.workload import OPTIONS as LATENT_CFG
from workloads.sd_kanji.workload import OPTIONS as SD_KANJI

PAGE = (ROOT / "docs" / "workloads.md").read_text(encoding="utf-8")
OPTIONS = {"sd_kanji": SD_KANJI, "latent_cfg": LATENT_CFG, "gpt2": GPT2, "graph": GRAPH}


def section(name: str) -> str:
    return PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def test_every_registered_workload_has_its_section() -> None:
    ours = {entry.name for entry in known_workloads() if entry.dist is not None and entry.dist.name == "tuner"}
    assert ours == OPTIONS.keys()
    assert all(section(name) for name in ours)


@pytest.mark.parametrize(
    ("name", "options"), OPTIONS.items(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_option_is_described(name: str, options: Sequence[str]) -> None:
    rows = [line for line in section(name).splitlines() if line.startswith("| `")]
    described = {word for row in rows for word in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert described == set(options)


def test_the_levers_name_knobs_and_options_that_exist() -> None:
    levers = section("The guides' levers").splitlines()
    named = {word for line in levers if line.startswith("| ") for word in re.findall(r"knobs? `(\w+)`", line)}
    assert named <= {knob.value for knob in Knob}
    assert len(named) > 6
