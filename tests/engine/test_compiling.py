"""torch.compile on this machine: legality with reasons, and the same numbers as op by op."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.engine.engine_toys import CPU, answer, replies, toy_config, toy_trainer
from tests.toys import Toy
from tuner.contract.config import CompileMode, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import DescribeEvent, PhaseEvent, ProbeKind
from tuner.contract.workload import Batch, Term
from tuner.engine.compiling import compile_problems
from tuner.engine.step import StepResult
from tuner.randomness import integers, normal


class Draws(nn.Module):
    """A model that draws inside, so that the generator itself is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, seeds: Tensor) -> Tensor:
        picked: Tensor = integers(seeds, 1000, stream=0)
        return normal(seeds, (16,), stream=1) * self.scale + picked[:, None] / 1000


class DrawingToy(Toy):
    def model(self) -> nn.Module:
        return Draws()

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        return {"all": Term(sum=model(batch["sample_seed"]).square().mean(1).sum(), weight=float(len(batch["x"])))}

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {}


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_has_the_losses_of_the_plain_one() -> None:
    problem = compile_problems(CPU).get(CompileMode.DEFAULT)
    if problem:
        pytest.skip(f"not run: {problem}")
    plain = toy_config(micro_batch_size=16, accumulation_steps=1)
    compiled = plain.model_copy(update={"compile": CompileMode.DEFAULT})
    expected = [float(step.losses["total"]) for step in _steps(plain)]
    events = answer(ProbeKind.END_TO_END, compiled, workload=DrawingToy)
    (reply,) = replies(events)
    assert reply.outcome is Outcome.OK, reply.message
    assert reply.measurement is not None
    assert reply.measurement.losses["total"][:3] == pytest.approx(expected, rel=1e-5)
    assert "compile" in [event.phase for event in events if isinstance(event, PhaseEvent)]
    assert reply.measurement.phases_s["compile"] > 0
    assert reply.measurement.flops_per_sample is None


def _steps(config: RunConfig) -> list[StepResult]:
    trainer = toy_trainer(config, DrawingToy({}))
    return [trainer.step() for _ in range(3)]


def test_a_machine_without_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    problems = compile_problems(CPU)
    assert set(problems) == set(CompileMode) - {CompileMode.EAGER}
    assert "C++ compiler" in problems[CompileMode.DEFAULT]
    assert "g++" in problems[CompileMode.DEFAULT]
    assert "CPU" in problems[CompileMode.CUDAGRAPHS]


def test_a_machine_without_python_headers_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    paths = {**sysconfig.get_paths(), "include": str(tmp_path / "include")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    assert "Python.h is missing" in compile_problems(CPU)[CompileMode.DEFAULT]


def test_describe_tells_machine_and_workload() -> None:
    (event,) = answer(ProbeKind.DESCRIBE)
    assert isinstance(event, DescribeEvent)
    assert event.info is not None
    assert event.info.baseline.batch_label == "8x2"
    assert event.device.kind == "cpu"
    assert event.device.free_bytes <= event.device.memory_bytes
    assert "cudagraphs" in event.device.compile_problems
    assert event.environment.device == "cpu"
