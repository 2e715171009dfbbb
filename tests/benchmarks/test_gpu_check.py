"""The GPU check without a GPU: its words, its clock, what it writes, and faults that really strike."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_preflight, gpu_report
from benchmarks.gpu_check import ROOT, Check, Clock, Finding, Status, Table, read_json, run_program, worth_doing
from benchmarks.gpu_elsewhere import inductor
from benchmarks.gpu_faults import faults
from benchmarks.gpu_others import printed_tables
from benchmarks.gpu_studies import LENGTHS, length_for, study_file
from benchmarks.gpu_turns import Part, run_parts
from benchmarks.grids.record import capped
from tests.search.simulated_world import GIB, SimulatedRunner, World, make_baseline, make_spec
from tuner.contract.config import CompileMode
from tuner.contract.documents import load_document, read_file, read_mapping
from tuner.contract.gpu import gpu_profile
from tuner.contract.probe import ProbeKind, Stage
from tuner.contract.study import StudyFile
from tuner.search.history import History
from tuner.search.offline import rows_of
from tuner.search.requests import make_request


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path, Clock.of_minutes(2.0), cuda=False)


def fine(check: Check) -> Finding:
    table = Table("speeds", ("what", "value"), (("copy", 1.5),))
    return Finding(Status.DONE, (table,), {"seen": float("inf"), "device": check.device}, ("all well",))


def broken(check: Check) -> Finding:
    raise ValueError(f"nothing works on {check.device}")


def passed(check: Check) -> Finding:
    return Finding(Status.NOT_RUN, notes=("not today",))


def part(function: str, weight: float = 10.0) -> Part:
    return Part(f"the {function} one", __name__, function, weight)


def test_each_part_may_use_its_share_of_what_is_left() -> None:
    clock = Clock.of_minutes(1.0)
    assert clock.begin_turn(20.0, 20.0) == pytest.approx(30.0, abs=1.0)
    assert clock.turn_s <= 30.0 < clock.left_s
    assert clock.begin_turn(20.0, 0.0) == pytest.approx(60.0, abs=1.0)
    late = Clock(time.monotonic() - 1.0)
    assert (late.begin_turn(1.0, 1.0), late.turn_s) == (0.0, 0.0)


def test_a_failed_part_is_recorded_and_the_next_goes_on(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    run_parts(check, {1: part("broken"), 2: part("fine")}, gpu_report.load(check.out))
    parts = gpu_report.load(check.out)["parts"]
    assert [parts[number]["status"] for number in ("1", "2")] == ["failed", "done"]
    assert "nothing works on cpu" in parts["1"]["notes"][0]
    assert parts["2"]["data"]["seen"] is None, "JSON knows no infinity"
    said = capsys.readouterr().out
    assert "nothing works on cpu" in said
    assert "no CUDA here" in said
    assert "| copy | 1.5   |" in said


def test_everything_lies_in_one_folder_in_three_forms(check: Check) -> None:
    run_parts(check, {2: part("fine")}, gpu_report.load(check.out))
    record = json.loads((check.out / "check.json").read_text(encoding="utf-8"))
    assert read_mapping(read_file(check.out / "check.yaml"), "check.yaml") == record
    assert "## goals" in (check.out / "report.md").read_text(encoding="utf-8")
    assert (check.out / "gpu-check.png").read_bytes().startswith(b"\x89PNG")


def test_what_could_not_be_run_again_keeps_what_was_recorded(check: Check) -> None:
    record = gpu_report.load(check.out)
    run_parts(check, {3: part("fine")}, record)
    run_parts(check, {3: part("passed")}, record)
    kept = gpu_report.load(check.out)["parts"]["3"]
    assert kept["status"] == "done"
    assert kept["notes"][-1] == "this time not run: not today"


def test_a_part_without_time_is_not_begun(check: Check) -> None:
    check.clock = Clock(time.monotonic() + 5.0)
    run_parts(check, {1: part("broken")}, gpu_report.load(check.out))
    assert gpu_report.load(check.out)["parts"]["1"]["status"] == "not run"


def test_what_another_device_recorded_is_not_built_upon(check: Check) -> None:
    parts = {"1": {"device": "some GPU", "data": {"ceilings": 1}}, "2": {"device": "cpu", "data": {"x": 2}}}
    check.know(parts, 2)
    assert (check.data_of(1), check.before) == ({}, {"x": 2})


def test_parts_are_named_one_by_one_or_in_a_list() -> None:
    assert gpu.parse(["--part", "5", "--parts", "1,3"]).asked == [1, 3, 5]
    assert gpu.parse([]).asked == []
    for words in (["--parts", "1,99"], ["--parts", "one"], ["--minutes", "0"]):
        with pytest.raises(SystemExit):
            gpu.parse(words)


def test_the_same_command_goes_on_with_what_is_not_done() -> None:
    parts = {str(number): {"status": "done"} for number in gpu.PARTS} | {"4": {"status": "partial"}}
    assert gpu.unfinished(parts) == [4]
    assert gpu.unfinished({}) == sorted(gpu.PARTS)
    assert gpu.listing(parts)[3].split()[-1] == "partial"


def test_every_part_can_be_imported() -> None:
    from importlib import import_module

    for one in gpu.PARTS.values():
        assert callable(getattr(import_module(one.module), one.function))


@pytest.mark.parametrize("workload", ["latent_cfg", "gpt2", "sd_kanji", "graph"])
@pytest.mark.parametrize("cuda", [False, True])
def test_a_shortened_study_is_a_study(check: Check, workload: str, cuda: bool) -> None:
    check.cuda = cuda
    for seconds in (30.0, 500.0):
        path = study_file(check, workload, length_for(seconds), keep=("precision",))
        file = load_document(StudyFile, read_file(path), str(path))
        preset = file.presets[check.preset]
        assert preset["lr"] == {"enabled": False}
        assert preset["gate"]["min_pairs"] == length_for(seconds).pairs
        assert ("compile" in preset.get("space", {})) is not cuda


def test_the_longest_length_that_fits_is_taken() -> None:
    assert [length_for(length.from_s).name for length in LENGTHS] == [length.name for length in LENGTHS]
    assert length_for(44.0).name == "rehearsal"


def test_what_a_p100_cannot_compile_is_known() -> None:
    legal = gpu_profile("p100").compile_modes
    assert inductor(legal) == {CompileMode.DEFAULT, CompileMode.REDUCE_OVERHEAD, CompileMode.MAX_AUTOTUNE}


def test_workloads_are_known_without_tuner_being_installed(tmp_path: Path) -> None:
    folder = gpu_preflight.register(tmp_path / "site")
    (found,) = distributions(path=[str(folder)])
    points = {point.name: point.value for point in found.entry_points if point.group == "tuner.workloads"}
    assert points["gpt2"] == "tuner.workloads.gpt2.workload:Gpt2"
    assert found.name == "tuner"


def test_the_pinned_set_has_all_that_is_needed() -> None:
    assert {name.lower() for name in gpu_preflight.needed()} <= gpu_preflight.pinned().keys() | {"torch"}
    assert gpu_preflight.absent() == []


def test_a_program_that_does_not_end_is_stopped_and_its_words_are_kept() -> None:
    called = run_program(("-c", "import time; print('begun', flush=True); time.sleep(600)"), 1.5)
    assert called.code != 0
    assert "begun" in called.log
    assert called.seconds < 60


def test_short_turns_go_to_what_is_not_done() -> None:
    assert worth_doing("abcd", "", 200.0, 40.0) == ["a", "b", "c", "d"]
    assert worth_doing("abcd", "a", 90.0, 40.0) == ["b", "c"]
    assert worth_doing("abcd", "abcd", 5.0, 40.0) == ["a"]


def test_json_is_found_among_other_words() -> None:
    assert read_json('a table\n{"a": 1}') == {"a": 1}
    assert read_json("[1, 2]") == {"rows": [1, 2]}
    assert read_json("no object { here") == {}


def test_printed_tables_are_read_back() -> None:
    text = "null model\n\n| loop | us |\n|------|----|\n| bare | 10 |\n\nthe end\n"
    assert printed_tables(text) == [Table("null model", ("loop", "us"), (("bare", "10"),))]


@pytest.mark.slow
def test_faults_really_strike_and_the_next_probe_runs(check: Check) -> None:
    found = faults(check)
    cases = found.data["cases"]
    assert [case["outcomes"] for case in cases] == [["ok", "ok", "oom_host", "ok"], ["timeout"]]
    assert all(case["next_ok"] and not case["left_behind"] for case in cases)
    assert found.status is Status.DONE


def test_a_grid_recorded_on_a_gpu_plans_within_its_cap() -> None:
    spec = make_spec()
    runner = SimulatedRunner(World(sample_bytes=0.5 * GIB))
    configs = [spec.baseline, make_baseline(micro_batch_size=16, accumulation_steps=1)]
    requests = [make_request(History(spec, ()), ProbeKind.END_TO_END, Stage.SETUP, [c]) for c in configs]
    rows = [row for number, request in enumerate(requests) for row in rows_of(request, runner.run(request), number)]
    found = capped(spec, rows)
    small, large = (spec.memory_used(row.measurement.memory) for row in rows if row.measurement is not None)
    assert small < large <= 1.0, "both fit the device itself"
    small, large = (found.memory_used(row.measurement.memory) for row in rows if row.measurement is not None)
    assert small <= 1.0 < large


@pytest.mark.slow
def test_the_whole_check_rehearses_on_a_cpu(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--minutes", "5"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    parts = gpu_report.load(tmp_path)["parts"]
    assert len(parts) == len(gpu.PARTS)
    assert [number for number, item in parts.items() if item["status"] == "failed"] == []
