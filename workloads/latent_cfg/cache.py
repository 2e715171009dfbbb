"""What is made once and kept: the trained codec and the latents of all pictures.

A file appears under its name only when it is complete and on disk, so a process killed at any moment leaves a usable
cache; what it was writing is removed by the next one. Files hold tensors and plain text (safetensors), never code.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Progress
from workloads.latent_cfg.data import Source
from workloads.latent_cfg.vae import CHANNELS, FACTOR, KlVae, VaeSpec, encode_all, quality, to_float, train_vae

CODE_VERSION = 1
"""Raised whenever the same pictures would give other latents."""
VAE_FILE, LATENTS_FILE = "vae.safetensors", "latents.safetensors"
VAE_BYTES = 64 << 20
"""More than any codec here takes on disk."""


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
    """The folder `cache_dir/latent_cfg-KEY`; KEY names data, codec, its training and this code."""

    def __init__(self, cache_dir: Path, source: Source, spec: VaeSpec, vae_steps: int) -> None:
        self._source, self._spec, self._steps = source, spec, vae_steps
        about = {"code": CODE_VERSION, "data": source.digest(), "spec": asdict(spec), "vae_steps": vae_steps}
        self._key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = cache_dir / f"latent_cfg-{self._key}"

    def ensure(self, progress: Progress) -> Latents:
        """Load the latents, making first whatever is missing or damaged. Raises WorkloadError: disk, data, folder."""
        found = self._load(LATENTS_FILE)
        if found is None or not (self.folder / VAE_FILE).exists():
            try:
                with _threads(self._spec.threads):
                    found = self._make(progress)
            except OSError as error:
                raise self._unusable(error) from None
        return Latents(**found)

    def vae(self, device: torch.device) -> KlVae:
        """The trained codec. Call `ensure` first."""
        state = self._load(VAE_FILE)
        if state is None:
            raise WorkloadError(f"{self.folder / VAE_FILE} is missing or damaged; remove {self.folder} and run again")
        vae = KlVae(self._spec)
        vae.load_state_dict(state)
        return vae.to(device).eval().requires_grad_(False)

    def vae_quality(self) -> dict[str, float]:
        """`r2` and `psnr_db` on held-out pictures, as measured when the latents were made."""
        with safe_open(self.folder / LATENTS_FILE, "pt") as file:
            measured: dict[str, float] = json.loads(file.metadata()["quality"])
        return measured

    def _make(self, progress: Progress) -> dict[str, Tensor]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._refuse_full_disk()
        size, (train_count, valid_count) = self._spec.size, self._source.counts
        progress(0, train_count + valid_count, f"pictures {size} px")
        pictures = self._source.load(size, lambda done, total: progress(done, total, f"pictures {size} px"))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._load(VAE_FILE) is None:
            trained = train_vae(
                self._spec,
                pictures.train,
                self._steps,
                device,
                lambda done, total: progress(done, total, "training VAE"),
            )
            self._save(VAE_FILE, trained.state_dict(), {})
        vae = self.vae(device)
        progress(0, 1, "encoding latents")
        made = _standardise(encode_all(vae, pictures.train, device), encode_all(vae, pictures.valid, device))
        made |= {"train_labels": pictures.train_labels, "valid_labels": pictures.valid_labels}
        mean_picture = to_float(pictures.train.float().mean(0))
        measured = quality(vae, pictures.valid, mean_picture, device)
        self._save(LATENTS_FILE, made, {"quality": json.dumps(measured)})
        progress(1, 1, f"latents ready: VAE restores R2 {measured['r2']:.2f}, PSNR {measured['psnr_db']:.1f} dB")
        return made

    def _load(self, name: str) -> dict[str, Tensor] | None:
        """None when the file is absent, unreadable, or not of this key."""
        try:
            with safe_open(self.folder / name, "pt") as file:
                if (file.metadata() or {}).get("key") != self._key:
                    return None
                return {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None

    def _save(self, name: str, tensors: Mapping[str, Tensor], extra: Mapping[str, str]) -> None:
        partial = self.folder / f".{name}.{os.getpid()}.partial"
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        try:
            save_file(plain, partial, metadata={"key": self._key, **extra})
        except SafetensorError as error:
            raise WorkloadError(f"{partial} cannot be written: {error}; free disk space or set TUNER_CACHE") from None
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, self.folder / name)
        _sync_folder(self.folder)

    def _remove_leftovers(self) -> None:
        for partial in self.folder.glob(".*.partial"):
            partial.unlink(missing_ok=True)

    def _refuse_full_disk(self) -> None:
        latents = sum(self._source.counts) * CHANNELS * (self._spec.size // FACTOR) ** 2 * 4
        need, free = latents + VAE_BYTES, shutil.disk_usage(self.folder).free
        if free < need:
            raise WorkloadError(
                f"cache folder {self.folder}: codec and latents need {need / 2**20:.0f} MiB, but {free / 2**20:.0f} MiB"
                " are free; free disk space or set TUNER_CACHE to another disk"
            )

    def _unusable(self, error: OSError) -> WorkloadError:
        where = error.filename or self.folder
        if error.errno == errno.ENOSPC:
            return WorkloadError(f"{where}: the disk is full; free disk space or set TUNER_CACHE to another disk")
        return WorkloadError(f"cache folder {where} cannot be used: {error.strerror or error}; set TUNER_CACHE")


def _standardise(train: Tensor, valid: Tensor) -> dict[str, Tensor]:
    mean = train.mean(dim=(0, 2, 3), keepdim=True)
    deviation = train.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-6)
    train, valid = (train - mean) / deviation, (valid - mean) / deviation
    return {"train": train, "valid": valid, "mean": mean, "deviation": deviation, "bound": train.abs().max()}


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems refuse; the rename itself is still atomic
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
