"""latent_cfg: what it prepares and keeps, on a few pictures of the user's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tuner import prepared
from tuner.contract.base import Scalar
from tuner.contract.errors import WorkloadError
from workloads.latent_cfg.workload import LatentCfg

ROOT = Path(__file__).resolve().parents[2]
PREPARE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from workloads.latent_cfg.workload import LatentCfg
job = LatentCfg({"data": sys.argv[2], "vae_steps": int(sys.argv[3])})
job.prepare(Path(sys.argv[1]), lambda *said: print(*said, flush=True))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twelve striped pictures: blue ones striped upright, red ones lengthwise."""
    data = tmp_path_factory.mktemp("pictures")
    for name, colour, upright in (("blue", (20, 30, 180), True), ("red", (200, 30, 20), False)):
        (data / name).mkdir()
        for index in range(12):
            picture = Image.new("RGB", (80, 60), (90 + 5 * index,) * 3)
            for at in range(index % 4, 80, 8):
                picture.paste(colour, (at, 0, at + 4, 60) if upright else (0, at, 80, at + 4))
            picture.save(data / name / f"{index:02d}.png")
    return data


def options_of(folder: Path) -> dict[str, Scalar]:
    return {"data": str(folder), "vae_steps": 2, "sample_steps": 3}


@pytest.fixture(scope="module")
def cache(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cache")
    LatentCfg(options_of(folder)).prepare(made, quiet)
    return made


def quiet(done: int, total: int, text: str) -> None:
    """Progress nobody reads."""


def what_was_made(folder: Path, cache: Path) -> set[str]:
    told: set[str] = set()
    LatentCfg(options_of(folder)).prepare(cache, lambda done, total, text: told.add(text))
    return {text for text in told if not text.startswith("pictures")}


def test_the_cache_lists_codec_latents_and_judge(folder: Path, cache: Path) -> None:
    entries = prepared.entries(cache)
    assert [(entry.workload, entry.what) for entry in entries] == [
        ("latent_cfg", "judge"),
        ("latent_cfg", "latents"),
        ("latent_cfg", "vae"),
    ]
    assert what_was_made(folder, cache) == set()


def test_one_entry_taken_away_is_the_only_one_made_again(folder: Path, cache: Path) -> None:
    before = LatentCfg(options_of(folder))
    before.prepare(cache, quiet)
    latents = next(entry for entry in prepared.entries(cache) if entry.what == "latents")
    prepared.remove(latents)
    made = what_was_made(folder, cache)
    assert "encoding latents" in made
    assert not any("training" in text for text in made)
    after = LatentCfg(options_of(folder))
    after.prepare(cache, quiet)
    assert torch.allclose(before.dataset("train")[5]["latent"], after.dataset("train")[5]["latent"], atol=1e-4)


def test_other_steps_of_the_codec_are_another_entry(folder: Path, cache: Path) -> None:
    count = len(prepared.entries(cache))
    LatentCfg({**options_of(folder), "vae_steps": 3}).prepare(cache, quiet)
    assert len(prepared.entries(cache)) == count + 3
    LatentCfg({**options_of(folder), "guidance": 1.0, "dim": 32}).prepare(cache, quiet)
    assert len(prepared.entries(cache)) == count + 3


def test_a_killed_preparation_leaves_nothing_that_is_believed(folder: Path, tmp_path: Path) -> None:
    kill_when("training VAE", folder, tmp_path, vae_steps=100_000)
    assert prepared.entries(tmp_path) == []
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert "training VAE" in what_was_made(folder, tmp_path)
    assert len(list((tmp_path / "latent_cfg").iterdir())) == 3, "what the killed process left is gone"


def test_what_was_finished_survives_a_kill_later_on(folder: Path, tmp_path: Path) -> None:
    kill_when("training the judge", folder, tmp_path, vae_steps=2)
    assert {entry.what for entry in prepared.entries(tmp_path)} == {"vae", "latents"}
    made = what_was_made(folder, tmp_path)
    assert {text.partition(":")[0] for text in made} == {"training the judge of samples", "judge of samples ready"}


def kill_when(text: str, folder: Path, cache: Path, vae_steps: int) -> None:
    """Prepare in a process of its own, and kill it at the second line that begins with `text`."""
    command = [sys.executable, "-c", PREPARE, str(cache), str(folder), str(vae_steps)]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    deadline, seen = time.monotonic() + 100, 0
    for line in killed.stdout:
        seen += line.split(maxsplit=2)[2].startswith(text)
        if seen == 2 or time.monotonic() > deadline:
            break
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.stdout.close()


def test_a_shortened_file_is_made_again(folder: Path, cache: Path) -> None:
    for file in cache.glob("latent_cfg/latents-*/tensors.safetensors"):
        file.write_bytes(file.read_bytes()[:500])
    assert "encoding latents" in what_was_made(folder, cache)
    assert what_was_made(folder, cache) == set()


def test_a_file_of_the_right_length_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    LatentCfg(options_of(folder)).prepare(tmp_path, quiet)
    file = next(tmp_path.glob("latent_cfg/latents-*/tensors.safetensors"))
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(WorkloadError, match=r"tensors\.safetensors is damaged .*; remove .*latents-\w+ and run again"):
        LatentCfg(options_of(folder)).prepare(tmp_path, quiet)


def test_a_full_disk_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        """Hardware that is not there: a disk with 1 MiB left."""

        free = 1 << 20

    told: list[str] = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: FullDisk)
    with pytest.raises(WorkloadError, match=r"needs \d+ MiB, but 1 MiB are free; free disk space .* TUNER_CACHE"):
        LatentCfg({}).prepare(tmp_path, lambda done, total, text: told.append(text))
    assert told == []


def test_a_cache_folder_that_is_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(WorkloadError, match=r"Not a directory; .*TUNER_CACHE"):
        LatentCfg(options_of(folder)).prepare(tmp_path / "cache", quiet)


def test_own_pictures_from_folder_to_judged_samples(folder: Path, cache: Path, tmp_path: Path) -> None:
    job = LatentCfg(options_of(folder))
    job.prepare(cache, quiet)
    assert job.info().train_samples == len(job.dataset("train")) == 22  # type: ignore[arg-type]
    assert job.model()(torch.zeros(1, 4, 8, 8), torch.zeros(1).long(), torch.tensor([2])).shape == (1, 4, 8, 8)
    (path,) = job.sample(job.model(), tmp_path, 7)
    with Image.open(path) as grid:
        assert grid.size == (5 * 66 - 2 + 16, 2 * 66 - 2)
    figures = job.assess(job.model(), tmp_path, 7)
    assert figures["class_match_real"] == 1.0, "red and blue stripes can be told apart"
    assert 0 <= figures["class_match"] <= 1
    assert (tmp_path / "classes-7.csv").read_text().splitlines()[1].startswith("0,blue,8,")
