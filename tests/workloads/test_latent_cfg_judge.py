"""latent_cfg: a judge of samples that knows copies and classes, and the user's own latents from file to samples."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tuner.contract.errors import WorkloadError
from workloads.latent_cfg.classifier import Classifier, train_classifier
from workloads.latent_cfg.judge import measure_held_out, nearest_training
from workloads.latent_cfg.latent_file import LatentFile
from workloads.latent_cfg.workload import LatentCfg


def some_latents(count: int, seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Noise, raised in the upper half for class 1: float32 [count, 4, size, size] and labels in turn."""
    labels = torch.arange(count) % 2
    latents = torch.randn(count, 4, size, size, generator=torch.Generator().manual_seed(seed))
    latents[labels == 1, :, : size // 2] += 0.8
    return latents, labels


def silent(done: int, total: int) -> None:
    """Progress nobody watches."""


# --- the judge ------------------------------------------------------------------------------------------------------


def test_copies_are_found_and_held_out_pictures_are_not() -> None:
    train, _ = some_latents(300, 0)
    valid, _ = some_latents(100, 1)
    judge = measure_held_out(Classifier(8, 4, 2), train, valid)
    copies = nearest_training(train[:40] + 0.1 * torch.randn(40, 4, 8, 8), train)
    assert (copies.ratio <= judge.threshold).all()
    assert torch.equal(copies.rows[:, 0], torch.arange(40))
    fresh = nearest_training(some_latents(200, 2)[0], train)
    assert float((fresh.ratio <= judge.threshold).double().mean()) < 0.05
    assert float(fresh.distance.median()) == pytest.approx(judge.distance, rel=0.1)


def test_dull_samples_are_near_to_everything_and_yet_no_copies() -> None:
    """The mean picture is nearer to its nearest training picture than any real one is."""
    train, _ = some_latents(300, 0)
    judge = measure_held_out(Classifier(8, 4, 2), train, some_latents(100, 1)[0])
    dull = nearest_training(train.mean(0, keepdim=True), train)
    assert float(dull.distance[0]) < judge.distance
    assert float(dull.ratio[0]) > judge.threshold


def test_distances_do_not_hang_on_the_size_of_latents() -> None:
    wide, narrow = (nearest_training(torch.zeros(1, 4, s, s), torch.full((5, 4, s, s), 0.5)) for s in (32, 8))
    assert float(wide.distance[0]) == pytest.approx(float(narrow.distance[0])) == pytest.approx(0.5)


@pytest.mark.parametrize("size", [4, 8, 12, 32])
def test_the_classifier_learns_classes_of_any_size_of_latents(size: int) -> None:
    train, labels = some_latents(64, 0, size)
    valid, wanted = some_latents(40, 1, size)
    model = train_classifier(train, labels, 2, torch.device("cpu"), silent)
    assert float((model(valid).argmax(1) == wanted).double().mean()) > 0.8


def test_the_same_latents_give_the_same_classifier() -> None:
    train, labels = some_latents(32, 0)
    one, two = (train_classifier(train, labels, 2, torch.device("cpu"), silent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


# --- the user's own latents -----------------------------------------------------------------------------------------


def write(path: Path, latents: Any, labels: Any) -> Path:
    if path.suffix == ".npz":
        np.savez_compressed(path, latents=np.asarray(latents), labels=np.asarray(labels))
    else:
        save_file({"latents": torch.as_tensor(latents), "labels": torch.as_tensor(labels)}, path)
    return path


@pytest.mark.parametrize("name", ["own.safetensors", "own.npz"])
def test_own_latents_from_file_to_samples_and_figures(tmp_path: Path, name: str) -> None:
    latents, labels = some_latents(60, 0, 12)
    path = write(tmp_path / name, 5 * latents + 2, labels + 7)
    job = LatentCfg({"data": str(path), "sample_steps": 2})
    told: set[str] = set()
    job.prepare(tmp_path / "cache", lambda done, total, text: told.add(text))
    assert not any("VAE" in text or "pictures" in text for text in told)
    assert job.info().train_samples == len(job.dataset("train")) == 54  # type: ignore[arg-type]
    train = torch.stack([job.dataset("train")[row]["latent"] for row in range(54)])
    assert train.shape == (54, 4, 12, 12)
    assert float(train.std()) == pytest.approx(1.0, abs=0.02)
    model = job.model()
    (grid,) = job.sample(model, tmp_path / "out", 3)
    with Image.open(grid) as picture:
        assert picture.size == (5 * (96 + 3) - 3 + 24, 2 * (96 + 3) - 3), "8 pixels for each cell of a latent"
    figures = job.assess(model, tmp_path / "out", 3)
    assert figures["class_match_real"] > 0.7
    assert (tmp_path / "out" / "classes-3.csv").read_text().splitlines()[2].startswith("1,8,8,")
    assert job.trivial()["class_match"].value == 0.5


def test_the_last_rows_of_each_class_are_held_out(tmp_path: Path) -> None:
    labels = torch.tensor([3] * 20 + [1] * 5)
    latents = torch.arange(25.0).view(25, 1, 1, 1).expand(25, 4, 8, 8).contiguous()
    source = LatentFile(write(tmp_path / "own.safetensors", latents, labels))
    assert source.classes == ("1", "3")
    assert source.counts == (22, 3)
    rows = source.load()
    assert rows.valid[:, 0, 0, 0].tolist() == [18.0, 19.0, 24.0]
    assert rows.valid_labels.tolist() == [1, 1, 0]
    assert set(rows.train[:, 0, 0, 0].tolist()).isdisjoint(rows.valid[:, 0, 0, 0].tolist())


def test_half_precision_latents_are_taken(tmp_path: Path) -> None:
    latents, labels = some_latents(8, 0)
    assert (
        LatentFile(write(tmp_path / "own.safetensors", latents.bfloat16(), labels)).load().train.dtype == torch.float32
    )


def broken_row(latents: Tensor) -> Tensor:
    latents[5, 2, 0, 7] = float("nan")
    return latents


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x[:, :3], y), r"'latents' has shape \[12, 3, 8, 8\]; expected `latents`, floats \[N, 4, s, s\]"),
        (lambda x, y: (x[:, :, :6, :6], y), r"'latents' has sides of 6, which is no multiple of 4"),
        (lambda x, y: (x, y[:7]), r"'labels' has shape \[7\], but 'latents' \[12, 4, 8, 8\]"),
        (lambda x, y: (x, y.float()), r"'labels' must be whole numbers, got torch\.float32"),
        (lambda x, y: (x.long(), y), r"'latents' must be floats, got torch\.int64"),
        (lambda x, y: (x, 0 * y), r"'labels' must name at least 2 classes, but there are 1"),
        (lambda x, y: (x, torch.tensor([0] * 9 + [4] + [0] * 2)), r"'labels' row 9 is the only one of class 4"),
        (lambda x, y: (broken_row(x), y), r"'latents' row 5, channel 2, place \(0, 7\) is nan"),
        (lambda x, y: (x[:0], y[:0]), r"'labels' must name at least 2 classes, but there are 0"),
    ],
)
def test_wrong_latents_get_one_line_with_file_key_and_row(
    tmp_path: Path, suffix: str, spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], message: str
) -> None:
    latents, labels = spoil(*some_latents(12, 0))
    path = write(tmp_path / f"own{suffix}", latents.contiguous(), labels)
    with pytest.raises(WorkloadError, match=message) as caught:
        LatentCfg({"data": str(path)}).prepare(tmp_path / "cache", lambda done, total, text: None)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def pickled(path: Path) -> None:
    np.savez(path, latents=np.array([{"a": 1}], dtype=object), labels=np.zeros(1, dtype=np.int64))


def without_labels(path: Path) -> None:
    np.savez(path, latents=np.zeros((4, 4, 8, 8), dtype=np.float32), label=np.zeros(4))


def cut_short(path: Path) -> None:
    content = io.BytesIO()
    np.savez(content, latents=np.zeros((4, 4, 8, 8)), labels=np.zeros(4))
    path.write_bytes(content.getvalue()[:700])


def no_arrays(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickled, "'latents' holds Python objects, which are never opened"),
        (without_labels, "there is no 'labels'; it holds label, latents"),
        (cut_short, "cannot be read"),
        (no_arrays, "there is no 'latents'; it holds nothing"),
        (lambda path: path.write_text("hello"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: None, "cannot be read (No such file or directory)"),
    ],
)
def test_files_that_are_no_latents(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "own.npz"
    spoil(path)
    with pytest.raises(WorkloadError) as caught:
        LatentCfg({"data": str(path)})
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_safetensors_file_and_one_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    with pytest.raises(WorkloadError, match="cannot be read"):
        LatentCfg({"data": str(path)})
    path.write_bytes(b"\x00" * 50)
    with pytest.raises(WorkloadError, match="cannot be read"):
        LatentCfg({"data": str(path)})


def test_steps_of_a_codec_make_no_sense_with_latents(tmp_path: Path) -> None:
    path = write(tmp_path / "own.npz", *some_latents(8, 0))
    with pytest.raises(WorkloadError, match=r"options\.vae_steps: .*own\.npz holds latents"):
        LatentCfg({"data": str(path), "vae_steps": 5})
