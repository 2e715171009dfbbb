"""Terminals, pipes and names of other encodings: output degrades, names are refused at once, results are kept whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tuner_environment
from tuner.commands.encodings import as_carried
from tuner.contract.measurement import Outcome
from tuner.contract.own_files import replace_text
from tuner.contract.probe import NoticeEvent, PointReply, ProgressEvent

TOY = "tests.toys:Toy"


def typed(*words: str | bytes, cwd: Path | bytes, cache: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own: the encoding of stdout is chosen when Python starts."""
    return subprocess.run(
        [sys.executable, "-m", "tuner.cli", *words],
        cwd=cwd,
        env={**tuner_environment(cache), **env},
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_a_measurement_is_told_whatever_the_terminal_can_show(encoding: str, tmp_path: Path, cache: Path) -> None:
    ran = typed("probe", "-w", TOY, "--seconds", "0.2s", cwd=tmp_path, cache=cache, PYTHONIOENCODING=encoding)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.decode(encoding)
    assert "throughput" in said
    assert ("→" if encoding == "utf-8" else "->") in next(line for line in said.splitlines() if "loss" in line)
    assert "took" in said.splitlines()[-1]


def test_what_a_workload_prints_goes_to_its_log_whole(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "printing_job.py").write_text(
        "from tests.toys import Toy\nclass Job(Toy):\n"
        "    def model(self):\n        print('Gr\\u00f6\\u00dfe \\u2192 12 \\ud83d')\n        return super().model()\n"
    )
    words = ("probe", "-w", "printing_job:Job", "--seconds", "0.2s")
    ran = typed(*words, cwd=tmp_path, cache=tmp_path / "cache", PYTHONIOENCODING="ascii")
    assert ran.returncode == 0, ran.stderr
    logs = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "cache" / "logs").glob("by-hand*.log"))
    assert "Größe → 12 \\ud83d" in logs


def test_json_is_whole_in_any_encoding(tmp_path: Path, cache: Path) -> None:
    words = ("gpus", "--json")
    plain = typed(*words, cwd=tmp_path, cache=cache, PYTHONIOENCODING="utf-8")
    poor = typed(*words, cwd=tmp_path, cache=cache, PYTHONIOENCODING="ascii")
    assert json.loads(poor.stdout.decode("ascii")) == json.loads(plain.stdout.decode("utf-8"))
    text = '{"reason": "448 ± 3, 山 🙂"}'
    assert json.loads(as_carried(text, "cp1252").encode("cp1252")) == json.loads(text)
    assert as_carried(text, "UTF-8") == text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((b"train", b"-w", TOY, b"--data", b"caf\xe9.csv"), r"--data: 'caf\xe9.csv' holds bytes that are not UTF-8"),
        ((b"train", b"-w", TOY, b"--out", b"r\xfcn"), r"--out: 'r\xfcn' holds bytes"),
        ((b"optimize", b"-w", TOY, b"--out=b\xe9st.yaml"), r"'--out=b\xe9st.yaml' holds bytes"),
        ((b"probe", b"-w", TOY, b"-o", b"fail=\xe9"), r"-o: 'fail=\xe9' holds bytes"),
    ],
)
def test_a_name_that_cannot_be_written_down_is_refused_at_once(
    words: tuple[str | bytes, ...], said: str, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.csv")).write_text("text,good\n")
    ran = typed(*words, cwd=tmp_path, cache=cache)
    assert ran.returncode == 2
    assert ran.stderr.decode().startswith(f"tuner: {said}")
    assert ran.stderr.count(b"\n") == 1


def test_a_link_or_a_folder_that_leads_to_such_a_name_is_refused_too(tmp_path: Path, cache: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    for words, cwd in ((("train", "-w", TOY, "--data", "link"), tmp_path), (("train", "-w", TOY), odd)):
        ran = typed(*words, cwd=cwd, cache=cache)
        assert ran.returncode == 2
        assert rb"caf\xe9' holds bytes that are not UTF-8" in ran.stderr
        assert ran.stderr.count(b"\n") == 1


def test_what_a_workload_says_may_quote_its_data() -> None:
    for text, written in (("caf\udce9", r"caf\xe9"), ("half \ud83d", r"half \ud83d"), ("whole 🙂 é", "whole 🙂 é")):
        for event in (
            PointReply(outcome=Outcome.CRASHED, message=text, detail=text),
            ProgressEvent(done=0, total=1, text=text),
            NoticeEvent(text=text),
        ):
            assert written in json.loads(event.to_json()).values()


def test_a_document_is_written_whatever_it_holds(tmp_path: Path) -> None:
    replace_text(tmp_path / "best.yaml", "# half \ud83d\na: ±\n")
    assert (tmp_path / "best.yaml").read_text(encoding="utf-8") == "# half \\ud83d\na: ±\n"
