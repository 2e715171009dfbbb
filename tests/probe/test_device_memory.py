"""No measurement on a GPU whose memory an earlier probe still holds. There is no GPU here: its memory is a mock."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.contract.config import OptimizerConfig, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest
from tuner.contract.trust import ANY_CODE
from tuner.probe.device_memory import SLACK_BYTES, CleanDevice, NvmlMemory
from tuner.probe.runner import SubprocessRunner

GIB = 1 << 30


class MockGpuMemory:
    """Stands in for NVML: what is in use, one value per question; the last one stays."""

    def __init__(self, *used: int | None) -> None:
        self.used = list(used)
        self.asked = 0

    def used_bytes(self) -> int | None:
        self.asked += 1
        return self.used.pop(0) if len(self.used) > 1 else self.used[0]


def after_a_probe(*used: int | None) -> str:
    device = CleanDevice(MockGpuMemory(1 * GIB, *used), wait_s=0.2)
    device.note()
    return device.wait()


def test_memory_that_came_back_is_clean() -> None:
    assert after_a_probe(1 * GIB + SLACK_BYTES) == ""


def test_memory_that_comes_back_late_is_waited_for() -> None:
    assert after_a_probe(9 * GIB, 9 * GIB, 1 * GIB) == ""


def test_memory_that_stays_away_is_said_with_its_size() -> None:
    assert "8192 MiB more in use" in after_a_probe(9 * GIB)


def test_unknown_is_not_dirty() -> None:
    assert after_a_probe(None) == ""
    assert NvmlMemory().used_bytes() is None or NvmlMemory().used_bytes() >= 0  # type: ignore[operator]


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_dirty_gpu_is_not_measured_on(tmp_path: Path, device: str) -> None:
    config = RunConfig(workload="none", micro_batch_size=8, optimizer=OptimizerConfig(lr=1e-3), horizon_samples=100)
    asked = ProbeRequest(id="r", kind=ProbeKind.COMPUTE, workload="tests.none:X", points=(config, config))
    asked = asked.model_copy(update={"device": device})
    memory = MockGpuMemory(1 * GIB, 9 * GIB)
    with SubprocessRunner(
        tmp_path, log_dir=tmp_path, device_memory=memory, settle_s=0.1, isolation="fresh", trust=ANY_CODE
    ) as runner:
        first = runner.run(asked.model_copy(update={"device": "auto"}))
        second = runner.run(asked)
        again = runner.run(asked)
    assert [point.outcome for point in first.points] == [Outcome.BAD_INPUT, Outcome.NO_RESULT]
    expected = [Outcome.BAD_INPUT, Outcome.NO_RESULT] if device == "cpu" else [Outcome.CONTENDED] * 2
    assert [point.outcome for point in second.points] == [point.outcome for point in again.points] == expected
