"""The samplers inside a real Optuna study, and what the parent process does not import."""

from __future__ import annotations

import subprocess
import sys

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from tuner.contract.study import SamplerName
from tuner.search.sampler import make_sampler

DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "micro_batch_size": CategoricalDistribution((4, 8, 16)),
    "precision": CategoricalDistribution(("fp32", "fp16")),
    "fused": CategoricalDistribution((False, True)),
    "num_workers": IntDistribution(0, 4),
}


def in_memory(sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=sampler)


@pytest.mark.parametrize("name", [SamplerName.TPE, SamplerName.RANDOM])
def test_optuna_s_own_samplers_by_name(name: SamplerName) -> None:
    def proposals() -> list[dict[str, object]]:
        study = in_memory(make_sampler(name, seed=7))
        found = []
        for _ in range(4):
            trial = study.ask(DISTRIBUTIONS)
            found.append(trial.params)
            study.tell(trial, float(trial.params["micro_batch_size"]))
        return found

    assert proposals() == proposals()


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(ran.stdout.split())


def test_planner_and_selection_need_neither_torch_nor_optuna_nor_a_database() -> None:
    assert not imported_by("import tuner.search.planner, tuner.search.selection") & {"torch", "optuna", "sqlalchemy"}


def test_the_sampler_does_not_import_torch() -> None:
    assert "torch" not in imported_by("import tuner.search.sampler as s; s.make_sampler(s.SamplerName.TPE, 0)")
