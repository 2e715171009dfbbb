"""Names of workloads: what is registered, what is refused, and what importing one may look like."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tuner import registry
from tuner.contract.errors import WorkloadError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """Two registered workloads, as if two packages were installed."""
    entries = [
        EntryPoint(name, f"tests.toys:{cls}", registry.GROUP)
        for name, cls in (("toy", "Toy"), ("bn_toy", "BatchNormToy"))
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == registry.GROUP else [])
    return entries


def test_the_registered_are_listed_by_name(registered: list[EntryPoint]) -> None:
    assert [(entry.name, entry.value) for entry in registry.known_workloads()] == [
        ("bn_toy", "tests.toys:BatchNormToy"),
        ("toy", "tests.toys:Toy"),
    ]


def test_a_misspelt_name_is_answered_with_the_near_one(registered: list[EntryPoint]) -> None:
    with pytest.raises(WorkloadError, match=r"unknown workload 'toyy' \(did you mean 'toy'\?\); known: bn_toy, toy"):
        registry.check_name("toyy")


@pytest.mark.parametrize("name", ["toy", "package.jobs:Job", "tests.none:Nothing.Inner"])
def test_a_name_that_may_exist_passes_unimported(registered: list[EntryPoint], name: str) -> None:
    registry.check_name(name)
    assert "package" not in sys.modules


@pytest.mark.parametrize("name", ["a:b:c", ":Job", "jobs:", "../jobs:Job", "jobs:Job()", "os; import x:Y", ""])
def test_a_name_of_no_known_form_is_refused(registered: list[EntryPoint], name: str) -> None:
    with pytest.raises(WorkloadError):
        registry.check_name(name)


def test_a_registered_name_and_its_class_are_the_same(registered: list[EntryPoint]) -> None:
    assert registry.load("toy") is registry.load("tests.toys:Toy")


def test_the_users_own_traceback_is_kept_without_ours() -> None:
    with pytest.raises(registry.WorkloadImportError) as caught:
        registry.load("tests.faulty_import:Broken")
    assert "ImportError: No module named 'speclib'; pip install speclib" in str(caught.value)
    assert "faulty_import.py" in caught.value.detail
    assert "registry.py" not in caught.value.detail


def test_what_is_missing_is_listed() -> None:
    with pytest.raises(WorkloadError) as caught:
        registry.load("tests.not_workloads:LacksMethods")
    message = str(caught.value)
    assert "model(self)" not in message
    for method in ("info", "dataset", "loss", "evaluate"):
        assert f"{method}(self" in message


def test_a_wrong_class_name_is_answered_with_those_there() -> None:
    with pytest.raises(WorkloadError, match=r"has no Tox; classes there: Rows, Net, Toy"):
        registry.load("tests.toys:Tox")


def test_the_parent_side_never_imports_torch() -> None:
    code = (
        "import sys, tuner.registry, tuner.probe.runner, tuner.zygote; tuner.registry.known_workloads(); "
        "print([name for name in ('torch', 'optuna', 'numpy', 'workloads') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"
