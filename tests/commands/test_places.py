"""A place that cannot take what a command will write is refused before anything is measured, in one line; and a
finished decision whose place is gone is written elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.test_same_data import ROWS, SPEC, TOY, write_table
from tests.conftest import RunTuner, tuner_environment
from tuner.commands.places import check_file, check_folder, refuse_foreign, write_beside
from tuner.contract.errors import ConfigError
from tuner.export.tuned import BEGINNINGS

NOT_THERE = ("-w", "nowhere:Job")
"""The place is tried before the workload's code is even looked for."""
COMMANDS = {
    "optimize": ("optimize", *NOT_THERE),
    "train": ("train", *NOT_THERE),
    "profile": ("probe", *NOT_THERE, "--profile"),
    "bench": ("bench", *NOT_THERE),
    "report": ("report", "study"),
    "export": ("export", "study"),
    "explain": ("explain", "study"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["file/out", "/proc/1/out"])
def test_every_command_tries_its_place_first(tuner: RunTuner, tmp_path: Path, command: str, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    ran = tuner(*COMMANDS[command], "--out", place)
    assert ran.code == 2, ran.out + ran.err
    (line,) = ran.err.strip().splitlines()
    assert line.startswith(f"tuner: --out: {place} cannot be written: ")
    assert line.endswith("name another place with --out")
    assert not (tmp_path / "studies").exists()


def in_namespace(script: str, cwd: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """`script` by sh, with mounts of its own. `$TUNER` is the command."""
    env = tuner_environment(cache) | {"TUNER": f"{sys.executable} -m tuner.cli"}
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mkdir place && mount -t tmpfs -o size=256k none place || exit 99; {script}"],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if ran.returncode in (99, 126, 127) or "unshare" in ran.stderr:
        pytest.skip(f"not run: no mounts of our own here ({ran.stderr.strip()})")
    return ran


FULL = "cat /dev/zero > place/all 2>/dev/null"
READ_ONLY = "mount -o remount,ro none place"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (f"{READ_ONLY}; $TUNER train -w gpt2 --out place/run", "Read-only file system; mend that"),
        (f"{READ_ONLY}; $TUNER optimize -w gpt2 --out place/best.yaml", "Read-only file system; mend that"),
        (f"cd place; {READ_ONLY.replace('place', '.')}; $TUNER optimize -w gpt2", "Read-only file system; mend that"),
        (f"{FULL}; $TUNER train -w gpt2 --out place/run", "No space left on device; free some space there"),
        (f"{FULL}; $TUNER bench -w gpt2 --out place", "No space left on device; free some space there"),
        (
            "echo config: > place/best.yaml; echo > best.yaml; mount --bind place/best.yaml best.yaml; "
            "mount -o remount,ro,bind best.yaml; $TUNER optimize -w gpt2 --out best.yaml",
            "Read-only file system; mend that",
        ),
    ],
    ids=["train read-only", "optimize read-only", "folder read-only", "train full", "bench full", "file read-only"],
)
def test_read_only_and_full_places(tmp_path: Path, cache: Path, script: str, why: str) -> None:
    ran = in_namespace(script, tmp_path, cache)
    assert ran.returncode == 2, ran.stdout + ran.stderr
    (line,) = ran.stderr.strip().splitlines()
    assert re.fullmatch(rf"tuner: --out: \S+ cannot be written: {why}, or name another place with --out", line)


@pytest.mark.parametrize(
    ("words", "code"),
    [("gpus --json", 3), ("gpus", 0), ("export study", 2), ("show nothing", 2)],
)
def test_a_full_disk_under_the_output_ends_no_work(tmp_path: Path, cache: Path, words: str, code: int) -> None:
    """A log loses lines; a result that is not taken is told. No traceback, and the exit code is the command's."""
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "tuner.cli", *words.split()],
            cwd=tmp_path,
            env=tuner_environment(cache),
            stdout=full,
            stderr=subprocess.PIPE if code else full,
            text=True,
            timeout=60,
            check=False,
        )
    assert ran.returncode == code
    assert not ran.stderr or re.fullmatch(r"tuner: .*\n", ran.stderr)


def test_what_is_there_already(tmp_path: Path) -> None:
    """A folder for a file and the other way round; another program's file; a best.yaml, whoever edited it."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"the path of a file is expected, and .*folder is a folder"):
        check_file(tmp_path / "folder")
    with pytest.raises(ConfigError, match="/dev/null is a device or a pipe"):
        check_file(Path("/dev/null"))
    (tmp_path / "data.csv").write_text("text,label\n")
    with pytest.raises(ConfigError, match=r"data\.csv is there already and was not written by the tuner"):
        check_file(tmp_path / "data.csv", BEGINNINGS)
    with pytest.raises(ConfigError, match=r"data\.csv is no folder"):
        check_folder(tmp_path / "data.csv")
    for text in ("", "config:\n  workload: gpt2\n", f"{BEGINNINGS[0]}: x\n"):
        (tmp_path / "best.yaml").write_text(text)
        check_file(tmp_path / "best.yaml", BEGINNINGS)
        assert (tmp_path / "best.yaml").read_text() == text
    check_file(tmp_path / "not" / "yet" / "there.yaml")
    check_folder(tmp_path / "not" / "yet")
    check_file(tmp_path / ("n" * 255))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.yaml", "data.csv", "folder"], "nothing is left"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="link is no folder"):
        check_folder(tmp_path / "link")


def test_an_immutable_file_is_seen_though_its_folder_can_be_written(tmp_path: Path) -> None:
    fixed = tmp_path / "best.yaml"
    fixed.write_text("config:\n")
    made = subprocess.run(["chattr", "+i", str(fixed)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"not run: {made.stderr.strip()}")
    try:
        with pytest.raises(ConfigError, match=r"best\.yaml cannot be written: Operation not permitted"):
            check_file(fixed, BEGINNINGS)
    finally:
        subprocess.run(["chattr", "-i", str(fixed)], check=True)


def test_a_run_replaces_nobody_elses_files(tuner: RunTuner, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("my: own\n")
    ran = tuner("train", "-w", "tests.toys:Toy", "--out", ".")
    assert ran.code == 2, ran.err
    assert "--out: . is no run's folder, and its config.yaml would be replaced" in ran.err
    assert (tmp_path / "config.yaml").read_text() == "my: own\n"
    (tmp_path / "checkpoints").mkdir()
    refuse_foreign(tmp_path)


def test_a_finished_decision_is_written_where_there_is_room(tuner: RunTuner, tmp_path: Path) -> None:
    """The folder is taken away while the study measures."""
    write_table(tmp_path / "table.csv", ROWS)
    (tmp_path / "study.yaml").write_text(SPEC.replace("DataToy", "Vandal"))
    (tmp_path / "out").mkdir()
    words = ("--gpu", "cpu", "--spec", "study.yaml", "--probes", "1", "--json", "--out", "out/best.yaml")
    own = ("--data", "table.csv", "-o", "extra=takes the place")
    ran = tuner("optimize", "-w", TOY.replace("DataToy", "Vandal"), *own, *words)
    assert ran.code == 3, ran.err
    last = ran.err.strip().splitlines()[-1]
    assert last.startswith("tuner: out/best.yaml: cannot be written: ")
    kept = Path(ran.json["config_path"])
    assert f"The decision is written to {kept} instead" in last
    assert "micro_batch_size" in kept.read_text()
    assert tuner("export", ran.json["study"], "--out", "again.yaml").code == 0
    assert tuner("train", "--config", str(kept), "--allow-code", "--max-samples", "64", "--out", "run").code == 0


def test_where_a_result_goes_that_its_place_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNER_CACHE", os.devnull)
    monkeypatch.setattr("tempfile.tempdir", os.devnull)
    kept = write_beside("study.best.yaml", "a: 1\n")
    assert kept is not None
    assert kept.parent == tmp_path
    assert kept.read_text() == "a: 1\n"
    assert kept.name.endswith(".study.best.yaml")
