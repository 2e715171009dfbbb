"""latent_cfg's data: the watch recordings, their split, and folders of the user's own pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tuner.contract.errors import WorkloadError
from workloads.latent_cfg import data
from workloads.latent_cfg.data import ClassFolders, Labelled, WatchRecordings, read_watch, spectrogram, split_windows
from workloads.latent_cfg.workload import LatentCfg


@pytest.fixture(scope="module")
def watch() -> Labelled:
    return WatchRecordings().load(64, lambda done, total: None)


def test_there_are_1550_pictures_of_ten_people(watch: Labelled) -> None:
    assert watch.train.shape == (1350, 3, 64, 64)
    assert watch.valid.shape == (200, 3, 64, 64)
    assert set(Counter(watch.train_labels.tolist()).values()) == {135}
    assert Counter(watch.valid_labels.tolist()) == dict.fromkeys(range(10), 20)
    info = LatentCfg({}).info()
    assert info.train_samples == 1350


def test_no_recording_serves_both_splits() -> None:
    recordings = read_watch()
    assert len(recordings.motion) == 140
    assert sum(map(len, recordings.motion)) == 244_102
    train, valid = split_windows(recordings)
    assert {w.recording for w in train}.isdisjoint(w.recording for w in valid)
    assert len(set(train)) == 1350
    assert {recordings.exercise[w.recording] for w in valid} == set(range(7))
    for window in [*train, *valid]:
        assert 0 <= window.start <= len(recordings.motion[window.recording]) - data.WINDOW
        assert recordings.person[window.recording] == window.person


def test_a_person_can_be_told_from_the_pictures(watch: Labelled) -> None:
    """Ridge regression on coarse pictures, on recordings it has not seen; chance is 0.1."""
    train, valid = _coarse(watch.train), _coarse(watch.valid)
    centre, spread = train.mean(0), train.std(0) + 1e-3
    train, valid = (train - centre) / spread, (valid - centre) / spread
    wanted = torch.nn.functional.one_hot(watch.train_labels, 10).double() - 0.1
    weights = torch.linalg.solve(train.T @ train + 500 * torch.eye(train.shape[1]), train.T @ wanted)
    right = (valid @ weights).argmax(1) == watch.valid_labels
    assert float(right.double().mean()) > 0.35


def _coarse(pictures: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(pictures.float(), (2, 16)).flatten(1).double()


def test_a_steady_turn_shows_at_its_frequency() -> None:
    seconds = torch.arange(data.WINDOW) / data.RATE_HZ
    turn = torch.sin(2 * torch.pi * 5.0 * seconds)
    picture = spectrogram(torch.stack([turn, torch.zeros(500), torch.zeros(500)])[None], 64)[0]
    rows = picture[0, :, 32].float()
    brightest_hz = (63 - float(rows.argmax())) * 12.5 / 64
    assert brightest_hz == pytest.approx(5.0, abs=1.0)
    assert picture[1:].max() == 0
    finer = spectrogram(torch.stack([turn] * 3)[None], 256)[0, 0, :, 128].float()
    assert (255 - float(finer.argmax())) * 12.5 / 256 == pytest.approx(brightest_hz, abs=0.3)


def test_a_file_that_is_not_the_known_one_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "seglearn"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    np.save(package / "data" / "watch_dataset.npy", np.array({"X": []}, dtype=object), allow_pickle=True)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WorkloadError, match=r"is not the file of seglearn 1\.2\.5, so it is not opened"):
        WatchRecordings().digest()


def test_without_seglearn_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WorkloadError, match=r"pip install --no-deps seglearn==1\.2\.5.*--data FOLDER"):
        LatentCfg({}).prepare(Path("unused"), lambda done, total, text: None)


def test_own_class_folders(tmp_path: Path) -> None:
    _folder(tmp_path, {"ID_2": 12, "ID_1": 3})
    (tmp_path / "notes.txt").write_text("no picture")
    source = ClassFolders(tmp_path)
    assert source.classes == ("ID_1", "ID_2")
    assert source.counts == (13, 2)
    pictures = source.load(64, lambda done, total: None)
    assert pictures.train_labels.tolist() == [0] * 2 + [1] * 11
    assert pictures.valid_labels.tolist() == [0, 1]
    assert pictures.train.shape == (13, 3, 64, 64)
    last = Image.open(tmp_path / "ID_2" / "11.png").convert("RGB")
    assert pictures.valid[1, :, 0, 0].tolist() == list(last.getpixel((0, 0)))  # type: ignore[arg-type]


def test_changed_pictures_have_another_digest(tmp_path: Path) -> None:
    _folder(tmp_path, {"a": 2, "b": 2})
    before = ClassFolders(tmp_path).digest()
    assert ClassFolders(tmp_path).digest() == before
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "0.png")
    assert ClassFolders(tmp_path).digest() != before


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "at least 2 classes are needed, but got 0"),
        ({"a": 3}, "at least 2 classes are needed, but got 1"),
        ({"a": 3, "b": 1}, "b: a class needs at least 2 pictures, but got 1"),
    ],
)
def test_unusable_folders_get_one_clear_line(tmp_path: Path, classes: dict[str, int], message: str) -> None:
    _folder(tmp_path, classes)
    with pytest.raises(WorkloadError, match=message) as caught:
        LatentCfg({"data": str(tmp_path)})
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_a_file_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="nowhere does not exist; expected class folders"):
        LatentCfg({"data": str(tmp_path / "nowhere")})
    (tmp_path / "file.zip").write_text("")
    with pytest.raises(WorkloadError, match=r"file\.zip: .*\.zip is not known; expected"):
        LatentCfg({"data": str(tmp_path / "file.zip")})


@pytest.mark.parametrize("content", [b"", b"no picture at all", None])
def test_a_broken_picture_is_named(tmp_path: Path, content: bytes | None) -> None:
    _folder(tmp_path, {"a": 2, "b": 2})
    broken = tmp_path / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60] if content is None else content)
    with pytest.raises(WorkloadError, match=r"b/1\.png is no readable picture") as caught:
        LatentCfg({"data": str(tmp_path), "vae_steps": 0}).prepare(tmp_path / "cache", lambda done, total, text: None)
    assert "\n" not in str(caught.value)


def _folder(path: Path, classes: dict[str, int]) -> None:
    draw = np.random.default_rng(0)
    for name, count in classes.items():
        (path / name).mkdir()
        for index in range(count):
            pixels = np.full((64, 64, 3), draw.integers(0, 255, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(
                path / name / f"{index:02d}.png" if count > 9 else path / name / f"{index}.png"
            )
