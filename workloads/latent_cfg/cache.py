"""What is made once and kept: the trained codec, the latents of all pictures, and the judge of samples.

Files hold tensors and plain text (safetensors), never code. Where and how they are kept is `tuner.prepared`'s.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tuner import prepared
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Progress

from .classifier import Classifier, train_classifier
from .data import Labelled, PictureSource
from .judge import Judge, measure_held_out
from .latent_file import LatentFile
from .vae import CHANNELS, FACTOR, KlVae, VaeSpec, encode_all, quality, to_float, train_vae

NAME = "latent_cfg"
VAE_VERSION, LATENTS_VERSION, JUDGE_VERSION = 1, 1, 1
"""Raised whenever the same data would give another codec, other latents, or another judge."""
VAE_BYTES, JUDGE_BYTES = 64 << 20, 8 << 20
"""More than any of them takes on disk."""
TENSORS, FIGURES = "tensors.safetensors", "figures"

Source = PictureSource | LatentFile


@dataclass(frozen=True)
class Latents:
    """Standardised latents, float32 [N, 4, s, s], and labels, int64 [N]; `x * deviation + mean` is the codec's own."""

    train: Tensor
    train_labels: Tensor
    valid: Tensor
    valid_labels: Tensor
    mean: Tensor
    """[1, 4, 1, 1], of the training latents."""
    deviation: Tensor
    """[1, 4, 1, 1]"""
    bound: Tensor
    """Scalar: the largest absolute training latent, standardised."""


class LatentCache:
    """Three entries: `vae` (for pictures only), `latents`, `judge`, each under a key of what it is made of."""

    def __init__(self, cache_dir: Path, source: Source, spec: VaeSpec, vae_steps: int) -> None:
        self._cache_dir, self._source, self._spec, self._steps = cache_dir, source, spec, vae_steps
        self._folders: dict[str, Path] = {}
        self._loaded: Labelled | None = None

    def ensure(self, progress: Progress) -> Latents:
        """Load the latents, making first whatever is missing or damaged. Raises WorkloadError: disk, data, folder."""
        for remark in self._source.remarks:
            progress(0, 0, remark)
        about: dict[str, Any] = {"code": LATENTS_VERSION, "data": self._source.digest()}
        if not isinstance(self._source, LatentFile):
            vae = {"code": VAE_VERSION, "data": about["data"], "spec": asdict(self._spec), "vae_steps": self._steps}
            self._keep("vae", vae, lambda folder: self._make_vae(folder, progress), VAE_BYTES)
            about |= {"vae": vae}
        latents = sum(self._source.counts) * CHANNELS * self.size**2 * 4
        self._keep("latents", about, lambda folder: self._make_latents(folder, progress), latents)
        self._loaded = None
        judge = {"code": JUDGE_VERSION, "latents": about}
        self._keep("judge", judge, lambda folder: self._make_judge(folder, progress), JUDGE_BYTES)
        return self._latents()

    @property
    def size(self) -> int:
        """Side of a latent."""
        return self._source.size if isinstance(self._source, LatentFile) else self._spec.size // FACTOR

    def vae(self, device: torch.device) -> KlVae | None:
        """The trained codec; None when the user gave latents. Call `ensure` first."""
        if "vae" not in self._folders:
            return None
        vae = KlVae(self._spec)
        vae.load_state_dict(_load(self._folders["vae"]))
        return vae.to(device).eval().requires_grad_(False)

    def vae_quality(self) -> dict[str, float]:
        """`r2` and `psnr_db` on held-out pictures, as measured when the latents were made; empty without a codec."""
        return _figures(self._folders["latents"])

    def judge(self, device: torch.device) -> Judge:
        """The classifier on `device`, and what it makes of held-out latents. Call `ensure` first."""
        folder = self._folders["judge"]
        state, figures = _load(folder), _figures(folder)
        answers = state.pop("held_out_answers")
        model = Classifier(self.size, CHANNELS, len(self._source.classes))
        model.load_state_dict(state)
        return Judge(
            classifier=model.to(device).eval().requires_grad_(False),
            held_out_answers=answers,
            distance=figures["distance"],
            threshold=figures["threshold"],
        )

    def _keep(self, what: str, about: Mapping[str, Any], make: Callable[[Path], None], need_bytes: int) -> None:
        def on_its_threads(folder: Path) -> None:
            with _threads(self._spec.threads):
                make(folder)

        self._folders[what] = prepared.ensure(self._cache_dir, NAME, what, about, on_its_threads, need_bytes=need_bytes)

    def _make_vae(self, folder: Path, progress: Progress) -> None:
        trained = train_vae(
            self._spec,
            self._pictures(progress).train,
            self._steps,
            _device(),
            lambda done, total: progress(done, total, "training VAE"),
        )
        _save(folder, trained.state_dict(), {})

    def _make_latents(self, folder: Path, progress: Progress) -> None:
        if isinstance(self._source, LatentFile):
            progress(0, 1, "reading latents")
            _save(folder, _standardised(self._source.load()), {})
            progress(1, 1, "latents ready")
            return
        pictures, device = self._pictures(progress), _device()
        vae = self.vae(device)
        assert vae is not None
        progress(0, 1, "encoding latents")
        train, valid = encode_all(vae, pictures.train, device), encode_all(vae, pictures.valid, device)
        made = _standardised(Labelled(train, pictures.train_labels, valid, pictures.valid_labels))
        measured = quality(vae, pictures.valid, to_float(pictures.train.float().mean(0)), device)
        _save(folder, made, measured)
        progress(1, 1, f"latents ready: VAE restores R2 {measured['r2']:.2f}, PSNR {measured['psnr_db']:.1f} dB")

    def _make_judge(self, folder: Path, progress: Progress) -> None:
        latents, classes = self._latents(), len(self._source.classes)
        model = train_classifier(
            latents.train,
            latents.train_labels,
            classes,
            _device(),
            lambda done, total: progress(done, total, "training the judge of samples"),
        )
        judge = measure_held_out(model, latents.train, latents.valid)
        _save(
            folder,
            {**model.state_dict(), "held_out_answers": judge.held_out_answers},
            {"distance": judge.distance, "threshold": judge.threshold},
        )
        right = float((judge.held_out_answers == latents.valid_labels).double().mean())
        progress(
            1, 1, f"judge of samples ready: {100 * right:.0f} % right on held-out data, chance {100 / classes:.0f} %"
        )

    def _pictures(self, progress: Progress) -> Labelled:
        """Loaded once, although two entries are made of them."""
        assert not isinstance(self._source, LatentFile)
        if self._loaded is None:
            size = self._spec.size
            progress(0, sum(self._source.counts), f"pictures {size} px")
            self._loaded = self._source.load(size, lambda done, total: progress(done, total, f"pictures {size} px"))
        return self._loaded

    def _latents(self) -> Latents:
        return Latents(**_load(self._folders["latents"]))


def _standardised(raw: Labelled) -> dict[str, Tensor]:
    mean = raw.train.mean(dim=(0, 2, 3), keepdim=True)
    deviation = raw.train.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-6)
    train, valid = (raw.train - mean) / deviation, (raw.valid - mean) / deviation
    return {
        "train": train,
        "train_labels": raw.train_labels,
        "valid": valid,
        "valid_labels": raw.valid_labels,
        "mean": mean,
        "deviation": deviation,
        "bound": train.abs().max(),
    }


def _save(folder: Path, tensors: Mapping[str, Tensor], figures: Mapping[str, float]) -> None:
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        save_file(plain, folder / TENSORS, metadata={FIGURES: json.dumps(dict(figures))})
    except SafetensorError as error:
        raise WorkloadError(
            f"{folder / TENSORS} cannot be written: {error}; free disk space or set TUNER_CACHE"
        ) from None


def _load(folder: Path) -> dict[str, Tensor]:
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WorkloadError(f"{folder / TENSORS} is damaged ({error}); remove {folder} and run again") from None


def _figures(folder: Path) -> dict[str, float]:
    with safe_open(folder / TENSORS, "pt") as file:
        figures: dict[str, float] = json.loads(file.metadata()[FIGURES])
    return figures


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
