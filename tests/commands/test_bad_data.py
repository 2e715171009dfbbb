"""Data that cannot be used is bad input (exit code 2) with the reader's line, in whatever command it is met; what was
understood in its own way is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import RunTuner

JOB = """
from pathlib import Path
from tests.toys import Toy
from tuner.readers.pictures import read_picture

class Pictures(Toy):
    def __init__(self, options):
        own = dict(options)
        self.data, self.late = Path(own.pop("data")), own.pop("late", False)
        super().__init__(own)
    def prepare(self, cache_dir, progress):
        progress(0, 0, "one file passed over")
        if not self.late:
            read_picture(self.data / "a.png", 8)
    def dataset(self, split):
        return Late(super().dataset(split), self.data) if self.late else super().dataset(split)

class Late:
    def __init__(self, data, folder):
        self.data, self.folder = data, folder
    def __len__(self):
        return len(self.data)
    def __getitem__(self, index):
        read_picture(self.folder / "a.png", 8)
        return self.data[index]
"""


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ()),
        ("train", ("-o", "late=true")),
        ("optimize", ()),
        ("probe", ()),
        ("probe", ("-o", "late=true")),
        ("bench", ()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_broken_file_is_bad_input(tuner: RunTuner, tmp_path: Path, command: str, words: tuple[str, ...]) -> None:
    (tmp_path / "pictures_job.py").write_text(JOB)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"no picture")
    ran = tuner(command, "-w", "pictures_job:Pictures", "--data", "data", *words)
    assert ran.code == 2, ran.out + ran.err
    last = ran.err.strip().splitlines()[-1]
    assert last.startswith("tuner: --workload pictures_job:Pictures: --data ")
    assert "a.png is no readable picture" in last
    assert "Traceback" not in ran.err + ran.out
    assert "data: one file passed over" in ran.out


def test_what_lay_beside_the_pictures_is_told(tuner: RunTuner, tmp_path: Path) -> None:
    """Hidden files without a word, unsupported ones with; a picture's name need not be UTF-8."""
    for name in ("a", "b"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for index in range(6):
            picture = Image.new("RGB", (16, 16), (40 * index, 20, 100))
            picture.save(folder / f"{index}.{'webp' if index else 'png'}")
        (folder / "._0.png").write_bytes(b"\0\5\x16\7")
        (folder / "0.heic").write_bytes(b"")
        (folder / "5.webp").rename(folder / os.fsdecode(b"caf\xe9.webp"))
    words = ("--data", "data", "--preset", "tiny", "-o", "vae_steps=2", "--max-samples", "16", "--out", "run")
    ran = tuner("train", "-w", "latent_cfg", *words)
    assert ran.code == 0, ran.out + ran.err
    assert "data: 2 files passed over (.heic 2); read are .png, .jpg" in ran.out
