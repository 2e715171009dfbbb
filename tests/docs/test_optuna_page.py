"""docs/optuna.md is true: its script runs, and the planner, not Optuna, proposes its first trials."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, tuner_environment

PAGE = (ROOT / "docs" / "optuna.md").read_text(encoding="utf-8")


def python(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *words],
        cwd=folder,
        env=tuner_environment(folder / "cache") | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_script_runs_and_begins_with_its_baseline(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    told = 'import sys; print([trial.params["bs"] for trial in study.trials], file=sys.stderr)\n'
    (tmp_path / "plain_study.py").write_text(script.replace("import optuna", "import optuna\n" + QUIET) + told)
    ran = python(["plain_study.py"], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ast.literal_eval(ran.stdout).keys() == {"bs", "fused"}
    tried = ast.literal_eval(ran.stderr)
    assert len(tried) == 20
    assert tried[0] == 8
    assert len(set(tried)) > 1


QUIET = "optuna.logging.set_verbosity(optuna.logging.ERROR)"


def test_importing_tuner_loads_neither_torch_nor_optuna(tmp_path: Path) -> None:
    code = (
        "import sys, tuner; assert not {'torch', 'optuna', 'pydantic'} & set(sys.modules); "
        "assert 'TunerSampler' in dir(tuner); tuner.TunerSampler; assert 'optuna' in sys.modules; "
        "assert 'torch' not in sys.modules"
    )
    ran = python(["-c", code], tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_an_unknown_name_is_no_attribute(tmp_path: Path) -> None:
    assert (
        "has no attribute 'tune_everything'" in python(["-c", "import tuner; tuner.tune_everything"], tmp_path).stderr
    )
