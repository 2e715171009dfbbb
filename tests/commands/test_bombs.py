"""Numbers and files that would cost a machine: refused with one line that names the limit, before anything is begun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import RunTuner
from tuner.contract.config import LoaderConfig, OptimizerConfig, RunConfig
from tuner.contract.documents import MAX_TOKENS, read_file, read_mapping
from tuner.contract.errors import ConfigError
from tuner.contract.probe import ProbeKind, ProbeRequest
from tuner.contract.tuned import TunedConfig
from tuner.export.tuned import load, write
from tuner.probe.capacity import check_capacity
from tuner.probe.runner import SubprocessRunner
from tuner.store.store import StudyStore

TOY = "tests.toys:Toy"
GOOD = RunConfig(workload="graph", micro_batch_size=8, optimizer=OptimizerConfig(lr=0.1), horizon_samples=64)
HUGE = [
    ({"world_size": 65536}, "world_size: 65536 ranks on "),
    ({"loader": LoaderConfig(num_workers=256)}, "loader.num_workers: 256 loader processes on "),
    ({"threads": 1024}, "threads: 1024 threads on "),
]


@pytest.mark.parametrize(("changes", "said"), HUGE)
def test_a_machine_starts_no_more_than_it_can_run(
    tuner: RunTuner, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    write(tmp_path / "big.yaml", TunedConfig(config=GOOD.model_copy(update=changes)))
    assert load(tmp_path / "big.yaml").config.model_copy(update=changes) == load(tmp_path / "big.yaml").config
    ran = tuner("train", "--config", "big.yaml", "--out", "run")
    assert ran.code == 2, ran.err
    assert ran.err.startswith(f"tuner: {said}")
    assert "at most" in ran.err
    assert len(ran.err.splitlines()) == 1
    with StudyStore.open(f"sqlite:///{tmp_path}/studies/studies.db") as store:
        assert store.runs() == ()


def test_the_limits_name_the_machine_and_what_to_do() -> None:
    many = GOOD.model_copy(update={"world_size": 64})
    with pytest.raises(ConfigError, match=r"64 ranks on 2 cores \(at most 4 run here\); .* --nproc 4 or less"):
        check_capacity((GOOD, many), 2)
    check_capacity((many,), 64)
    loading = GOOD.model_copy(update={"world_size": 4, "loader": LoaderConfig(num_workers=32)})
    with pytest.raises(
        ConfigError, match=r"32 loader processes for each of 4 ranks on 2 cores \(at most 16 run here\)"
    ):
        check_capacity((loading,), 2)
    check_capacity((GOOD.model_copy(update={"threads": 16, "loader": LoaderConfig(num_workers=64)}),), 1)


def test_the_door_refuses_any_point_of_a_request(tmp_path: Path) -> None:
    big = GOOD.model_copy(update={"threads": 1024})
    asked = ProbeRequest(id="x", kind=ProbeKind.COMPUTE, workload="graph", points=(GOOD, big))
    with (
        SubprocessRunner(tmp_path / "cache", log_dir=tmp_path / "logs") as runner,
        pytest.raises(ConfigError, match="threads: 1024 threads"),
    ):
        runner.run(asked)


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    (tmp_path / "link").symlink_to("/dev/zero")
    for path, said in (
        (Path("/dev/zero"), "this is a device"),
        (tmp_path / "link", "this is a device"),
        (tmp_path / "pipe", "this is a pipe"),
        (tmp_path, "this is a folder"),
        (tmp_path / "sparse", "larger than"),
        (Path("/proc/self/mem"), "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_file(path)


@pytest.mark.parametrize("name", ["confirmed.json", "fallback.json"])
def test_nor_are_the_files_of_a_run_folder(tuner: RunTuner, tmp_path: Path, name: str) -> None:
    write(tmp_path / "good.yaml", TunedConfig(config=GOOD))
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / name)
    ran = tuner("train", "--config", "good.yaml", "--out", "run", timeout_s=60)
    assert ran.code == 2
    assert f"run/{name}: cannot be read: a regular file is expected, and this is a pipe" in ran.err


def test_runs_are_listed_beside_a_pipe_in_place_of_their_status(tuner: RunTuner, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with StudyStore.open(f"sqlite:///{tmp_path}/studies/studies.db") as store:
        run = store.add_run(GOOD, str(out))
    for name in ("status.json", "metrics.csv", f".run-{run.id}.json"):
        os.mkfifo(out / name)
    for words in (("runs",), ("runs", run.id)):
        ran = tuner(*words, timeout_s=60)
        assert ran.code == 0, ran.err
        assert run.id in ran.out


@pytest.mark.parametrize(
    "text",
    [
        "a: [" + "1," * MAX_TOKENS + "1]\n",
        "a:\n" + "- 1\n" * MAX_TOKENS,
        "\n".join(f"k{n}: 1" for n in range(MAX_TOKENS // 2)),
        "a: {" + ",".join(f"k{n}: " for n in range(MAX_TOKENS // 2)) + "}\n",
    ],
)
def test_a_list_without_end_is_refused_before_it_is_built(text: str) -> None:
    with pytest.raises(ConfigError, match=r"bomb.yaml: more than 50,000|bomb.yaml: larger than"):
        read_mapping(text, "bomb.yaml")


@pytest.mark.parametrize(
    "value",
    ["9" * 5000, "2026-13-45", "!!int x", "!!float x", "!!bool x", "!!timestamp x"],
)
def test_yaml_that_trips_its_parser_is_one_line(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^odd.yaml: not readable as YAML: [^\n]*$"):
        read_mapping(f"a: {value}\n", "odd.yaml")


def test_a_thousand_broken_rules_are_not_a_thousand_lines(tuner: RunTuner, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("\n".join(f"key{n}: 1" for n in range(1000)))
    ran = tuner("train", "--config", "job.yaml")
    assert ran.code == 2
    assert len(ran.err.splitlines()) <= 21
    assert "more broken rules" in ran.err


DIGITS = "9" * 400
REFUSED = [
    (
        ("optimize", "-w", TOY, "--effective-batch", "99999999999"),
        "--effective-batch: keep, free, or a number from 1 to",
    ),
    (("optimize", "-w", TOY, "--effective-batch", DIGITS), "--effective-batch: keep, free, or a number from 1 to"),
    (("optimize", "-w", TOY, "--effective-batch", "²"), "--effective-batch: keep, free, or a number from 1 to"),
    (("optimize", "-w", TOY, "--micro-batch", "99999999999"), "--micro-batch: a number from 1 to"),
    (("optimize", "-w", TOY, "--budget", DIGITS), "--budget: a duration above zero and up to 366d"),
    (("optimize", "-w", TOY, "--memory-cap", DIGITS + "GiB"), "--memory-cap: a size above zero"),
    (("optimize", "-w", TOY, "-o", f"width={'9' * 5000}"), "--option: not readable as YAML"),
    (("optimize", "-w", TOY, "-o", f"width={DIGITS}"), "--option: 'width': an integer of at most 63 bits"),
    (("optimize", "-w", TOY, "-o", "width=.inf"), "--option: 'width': a finite number is expected"),
    (("optimize", "-w", TOY, "-o", "since=2026-01-01"), "--option: 'since': one plain value is expected"),
    (("probe", "-w", TOY, "--seconds", "100000000000000000000000"), "--seconds: a duration above zero and up to 366d"),
    (("probe", "-w", TOY, "--deadline", DIGITS), "--deadline: a duration above zero and up to 366d"),
    (("probe", "-w", TOY, "--set", "world_size=65536"), "--set world_size 65536: the effective batch of 16"),
    (("probe", "-w", TOY, "--set", "num_workers=200"), "loader.num_workers: 200 loader processes on"),
    (("bench", "-w", TOY, "--micro-batch", "100000000000000000000000"), "--micro-batch: numbers from 1 are expected"),
    (("bench", "-w", TOY, "--micro-batch", ",".join(map(str, range(1, 99)))), "at most 32 of them"),
    (("train", "-w", TOY, "--max-hours", "nan"), "Invalid value for '--max-hours'"),
    (("train", "-w", TOY, "--max-minutes", "inf"), "--max-minutes"),
    (("train", "-w", TOY, "--confirm-seconds", "nan"), "Invalid value for '--confirm-seconds'"),
    (("train", "-w", TOY, "--max-samples", DIGITS), "--max-samples"),
    (("train", "--config", "/dev/zero"), "/dev/zero: cannot be read: a regular file is expected, and this is a device"),
    (("explain", "--config", "/dev/zero"), "/dev/zero: cannot be read: a regular file is expected"),
    (("optimize", "-w", TOY, "--spec", "/dev/zero"), "/dev/zero: cannot be read: a regular file is expected"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda value: " ".join(value)[:60] if len(value) < 8 else "")
def test_an_option_that_would_cost_the_machine_is_refused(tuner: RunTuner, words: tuple[str, ...], said: str) -> None:
    ran = tuner(*words, timeout_s=60)
    assert ran.code == 2, ran.err
    assert said in " ".join(ran.err.split())
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gate: {max_pairs: 1000000000}", "gate.max_pairs"),
        ("lr: {seeds: 1000000000}", "lr.seeds"),
        ("space: {micro_batch_size: [8, 0]}", "space.micro_batch_size.1"),
        ("space: {prefetch_factor: [-1]}", "space.prefetch_factor.0"),
        ("measure: {deadline_s: 1e300}", "measure.deadline_s"),
        (
            f"space: {{micro_batch_size: {[*range(1, 2000)]}, num_workers: {[*range(257)]}, "
            f"prefetch_factor: {[*range(1, 65)]}}}",
            "these lists make 32,879,552",
        ),
        (f"baseline: {{micro_batch_size: {DIGITS}}}", "an integer of at most 63 bits"),
    ],
)
def test_a_study_file_that_would_never_end_is_refused(tuner: RunTuner, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "study.yaml").write_text(f"workload: {TOY}\n{text}\n")
    ran = tuner("optimize", "-w", TOY, "--gpu", "cpu", "--spec", "study.yaml", timeout_s=60)
    assert ran.code == 2, ran.err
    assert said in ran.err
    assert ran.err.startswith("tuner: study.yaml: ")
