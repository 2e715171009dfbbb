"""`tuner cache` lists what lies prepared and clears it: never under a preparation, and never a stranger's files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Ran, tuner_environment
from tuner import prepared

HOLDS_THE_LOCK = (
    "import sys, time\nfrom pathlib import Path\nfrom tuner import prepared\n"
    "with prepared.locked(Path(sys.argv[1]), lambda: None):\n    print('mine', flush=True)\n    time.sleep(600)\n"
)


def tuner(cache: Path, *words: str, answer: str = "") -> Ran:
    process = subprocess.run(
        [sys.executable, "-m", "tuner.cli", "cache", *words],
        cwd=cache.parent,
        env=tuner_environment(cache),
        input=answer,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Ran(process.returncode, process.stdout, process.stderr)


def entry(cache: Path, workload: str, what: str, age_s: float = 0.0, size: int = 5000) -> Path:
    """An entry with one file, made `age_s` ago."""

    def make(made: Path) -> None:
        (made / "data.bin").write_bytes(b"x" * size)

    folder = prepared.ensure(cache, workload, what, {"what": what}, make)
    about = folder / prepared.ABOUT
    made_at = prepared.entries(cache)[0].made_at
    about.write_text(about.read_text().replace(f'"made_at": {made_at}', f'"made_at": {made_at - age_s}'))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two entries, what a killed preparation left, an older version's folder, kernels, and a stranger's folder."""
    folder = tmp_path / "cache"
    folder.mkdir()
    entry(folder, "gpt2", "tokens", age_s=40 * 86400.0)
    entry(folder, "graph", "windows")
    for path in (
        "graph/.partial-windows-0123456789abcdef/half.bin",
        "latent_cfg-0123456789abcdef/latents.pt",
        "inductor/kernel.so",
        "logs/old.log",
        "my-thesis/about.json",
        "my-thesis/chapter-1/about.json",
        "holiday-20260101000000aa/beach.jpg",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"y" * 2048)
    return folder


def names(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() and path.name != prepared.LOCK}


def kept(cache: Path, *folders: str) -> bool:
    return all(any(name.startswith(folder) for name in names(cache)) for folder in folders)


def test_the_list_shows_entries_the_rest_and_the_total(cache: Path) -> None:
    ran = tuner(cache)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert any(line.split()[:2] == ["gpt2", "tokens"] and prepared.digest({"what": "tokens"}) in line for line in lines)
    assert any("half made" in line for line in lines)
    assert any(line.startswith("latent_cfg-0123456789abcdef") and "older version" in line for line in lines)
    assert any(line.startswith("my-thesis") and "left alone" in line for line in lines)
    assert lines[-1].startswith("total ")


def test_the_list_as_json_adds_up(cache: Path) -> None:
    found = tuner(cache, "list", "--json").json
    assert found == tuner(cache, "--json").json
    assert [(entry["workload"], entry["what"]) for entry in found["entries"]] == [
        ("gpt2", "tokens"),
        ("graph", "windows"),
    ]
    assert found["entries"][0]["about"] == {"what": "tokens"}
    assert found["total_bytes"] == sum((cache / name).stat().st_size for name in names(cache))


def test_an_empty_cache_is_fine(tmp_path: Path) -> None:
    assert "nothing is kept yet" in tuner(tmp_path / "none").out
    cleared = tuner(tmp_path / "none", "clear", "--yes")
    assert cleared.code == 0, cleared.err
    assert "nothing to clear" in cleared.out


def test_clear_takes_prepared_data_and_nothing_else(cache: Path) -> None:
    before = sum((cache / name).stat().st_size for name in names(cache))
    ran = tuner(cache, "clear", "--yes", "--json")
    assert ran.code == 0, ran.err
    after = sum((cache / name).stat().st_size for name in names(cache))
    assert ran.json["freed_bytes"] == before - after > 10_000
    assert prepared.entries(cache) == []
    assert names(cache) == {
        "inductor/kernel.so",
        "logs/old.log",
        "my-thesis/about.json",
        "my-thesis/chapter-1/about.json",
        "holiday-20260101000000aa/beach.jpg",
    }


def test_clear_all_takes_kernels_and_logs_but_no_strangers_files(cache: Path) -> None:
    ran = tuner(cache, "clear", "--all", "--yes")
    assert ran.code == 0, ran.err
    assert {name.partition("/")[0] for name in names(cache)} == {"my-thesis", "holiday-20260101000000aa"}


def test_clear_one_workload(cache: Path) -> None:
    assert tuner(cache, "clear", "--workload", "graph", "--yes").code == 0
    assert kept(cache, "gpt2/tokens", "latent_cfg-")
    assert not (cache / "graph").exists()
    missed = tuner(cache, "clear", "--workload", "grahp", "--yes")
    assert "nothing to clear for grahp; prepared data is there for: gpt2" in missed.out


def test_clear_what_is_old(cache: Path) -> None:
    assert tuner(cache, "clear", "--older-than", "30d", "--yes").code == 0
    assert [entry.workload for entry in prepared.entries(cache)] == ["graph"]
    assert kept(cache, "latent_cfg-", "graph/.partial")


@pytest.mark.parametrize(("answer", "goes"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_clear_asks_first(cache: Path, answer: str, goes: bool) -> None:
    ran = tuner(cache, "clear", answer=answer)
    assert ran.code == 0, ran.err
    assert "[y/N]" in ran.out
    assert (prepared.entries(cache) == []) is goes


def test_clear_with_nobody_to_ask_removes_nothing(cache: Path) -> None:
    ran = tuner(cache, "clear")
    assert ran.code == 2
    assert "--yes" in ran.err
    assert len(prepared.entries(cache)) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--older-than", "long"), "--older-than: a duration above zero"),
        (("--all", "--workload", "gpt2"), "--all: it clears what all workloads share"),
    ],
)
def test_contradictions_are_refused(cache: Path, words: tuple[str, ...], said: str) -> None:
    ran = tuner(cache, "clear", "--yes", *words)
    assert ran.code == 2
    assert said in ran.err
    assert len(prepared.entries(cache)) == 2


def test_clear_waits_for_a_preparation_and_ctrl_c_leaves_everything(cache: Path) -> None:
    before = names(cache)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(cache)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        with subprocess.Popen(
            [sys.executable, "-m", "tuner.cli", "cache", "clear", "--yes"],
            env=tuner_environment(cache) | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as clearing:
            assert clearing.stdout is not None
            assert "waiting for a preparation" in clearing.stdout.readline()
            assert names(cache) == before
            time.sleep(0.1)
            clearing.send_signal(signal.SIGINT)
            out, err = clearing.communicate(timeout=30)
        assert clearing.returncode == 130
        assert "Traceback" not in out + err
        assert names(cache) == before
        os.kill(holder.pid, signal.SIGKILL)
    assert tuner(cache, "clear", "--yes").code == 0
    assert prepared.entries(cache) == []
