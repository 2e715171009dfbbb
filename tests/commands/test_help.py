"""`--help` answers at once, for every command, with examples; it loads nothing heavy."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

COMMANDS = (
    "optimize",
    "train",
    "runs",
    "probe",
    "bench",
    "show",
    "gpus",
    "workloads",
    "cache",
    "doctor",
    "export",
    "report",
    "dashboard",
)
HEAVY = ("torch", "optuna", "sqlalchemy", "pandas", "plotly", "matplotlib", "scipy", "diffusers", "alembic")


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_loads_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nsys.argv = ['tuner', *sys.argv[1:]]\nfrom tuner.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    words = [sys.executable, "-c", code, *([command] if command else []), "--help"]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert "HEAVY []" in ran.stdout
    assert "Usage" in ran.stdout


@pytest.mark.parametrize(
    "command", ["optimize", "train", "runs", "probe", "bench", "show", "cache", "export", "report", "dashboard"]
)
def test_help_has_an_example(command: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tuner.cli", command, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert re.search(rf"tuner {command}\b", ran.stdout.partition("Example")[2])
