"""What is installed: one package, `tuner`, with the shipped workloads and studies below it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("hatchling", reason="not run: hatchling is not installed; make setup-dev brings it")
LOOK = (
    "import inspect, sys; from tuner import importing, registry; "
    "print(inspect.getfile(registry.load(sys.argv[1])), importing.shipped('studies'))"
)


def look(name: str, installed: Path, folder: Path) -> list[str]:
    """Where the workload of that name, and the shipped studies, are found from `folder`."""
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", LOOK, name]
    ran = subprocess.run(command, cwd=folder, env=env, check=False, timeout=200, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    made = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(made)]
    subprocess.run([*command, str(ROOT)], check=True, timeout=200, capture_output=True)
    (wheel,) = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(made / "site")
    return made / "site"


def test_one_name_is_taken_and_everything_lies_below_it(installed: Path) -> None:
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"tuner"}
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "workloads").rglob("*.py")}
    assert {
        str(path.relative_to(installed / "tuner")) for path in installed.rglob("tuner/workloads/**/*.py")
    } == shipped
    assert (installed / "tuner" / "studies" / "gpt2" / "study.yaml").is_file()


def test_it_is_found_beside_a_user_s_folders_of_the_same_names(installed: Path, tmp_path: Path) -> None:
    for name in ("workloads", "studies"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not the one meant')\n")
    tuner = installed / "tuner"
    assert look("graph", installed, tmp_path) == [f"{tuner}/workloads/graph/workload.py", f"{tuner}/studies"]


def test_what_older_files_name_is_found_where_nothing_else_has_that_name(installed: Path, tmp_path: Path) -> None:
    found, _ = look("workloads.graph.workload:Graph", installed, tmp_path)
    assert found.endswith("/workloads/graph/workload.py")
