"""The job: class-conditional latent diffusion with classifier-free guidance, as the tuner sees it.

                 tiny                          full
pictures         64 x 64                       256 x 256
latents          4 x 8 x 8                     4 x 32 x 32
UNet             dim 16, 701,204 parameters    dim 48, 6,261,556 parameters (10 classes)
horizon          100,000 samples               2,400,000 samples (150,000 steps of 16)
sampling         DDIM, 25 steps                DDIM, 250 steps
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tuner import randomness
from tuner.contract.base import Scalar
from tuner.contract.config import Cadence, EmaConfig, LossBands, OptimizerConfig, RunConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Batch, Progress, Split, Term, WorkloadInfo
from workloads.latent_cfg.cache import LatentCache, Latents
from workloads.latent_cfg.data import open_source
from workloads.latent_cfg.model import Denoiser, per_sample_loss, sample_latents
from workloads.latent_cfg.vae import FACTOR, VaeSpec

OPTIONS = ("preset", "data", "dim", "vae_steps", "guidance", "sample_steps")
EVALUATION_SEED = 1 << 20
EMA_HALF_LIFE = round(math.log(0.5) / math.log(0.9995) * 16)
"""0.9995 a step at 16 samples a step, counted in samples: 22,173."""
GRID_CLASSES, GRID_COLUMNS = 12, 4
TINY_NOTE = (
    "tiny is a rehearsal: the same data, losses and code on 64 px pictures with a UNet of 0.7 M parameters. Its samples"
    " are small and coarse, and its speeds say nothing about full; run `preset: full` for the real model"
)
FULL_NOTE = "full is the guide's model: 256 px pictures, latents 4 x 32 x 32, UNet dim 48, 150,000 steps of 16"


@dataclass(frozen=True)
class Preset:
    vae: VaeSpec
    vae_steps: int
    dim: int
    threads: int
    """CPU threads; 0 = every core. Steps of tiny are too short to share: a second thread mostly waits."""
    sample_steps: int
    horizon_samples: int
    cadence: Cadence
    loss_bands: LossBands
    note: str


PRESETS = {
    "tiny": Preset(
        # One thread: a step is too small to share. A second core gains a third when idle and costs several times that
        # when others use it; and so the latents do not depend on the number of cores.
        vae=VaeSpec(size=64, patch=8, widths=(64,), layers=1, threads=1),
        vae_steps=120,
        dim=16,
        threads=1,
        sample_steps=25,
        horizon_samples=100_000,
        cadence=Cadence(log_samples=1_600, evaluate_samples=16_000, sample_samples=16_000, checkpoint_samples=16_000),
        loss_bands=LossBands(normal_low=0.05, normal_high=0.3, warn_low=1e-4, warn_high=1.0),
        note=TINY_NOTE,
    ),
    "full": Preset(
        vae=VaeSpec(size=256, patch=2, widths=(64, 128, 256), layers=1, lr=1e-3),
        vae_steps=1500,
        dim=48,
        threads=0,
        sample_steps=250,
        horizon_samples=2_400_000,
        cadence=Cadence(log_samples=32_000, evaluate_samples=32_000, sample_samples=32_000, checkpoint_samples=32_000),
        loss_bands=LossBands(normal_low=0.001, normal_high=0.1, warn_low=1e-4, warn_high=1.0),
        note=FULL_NOTE,
    ),
}


class LatentDataset(Dataset[Mapping[str, Tensor]]):
    """Latents in memory; an item is a view, nothing is copied before batches are stacked."""

    def __init__(self, latents: Tensor, labels: Tensor) -> None:
        self._latents, self._labels = latents.unbind(), labels.unbind()

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """{"latent": float32 [4, s, s], "label": int64 scalar}"""
        return {"latent": self._latents[index], "label": self._labels[index]}


class LatentCfg:
    """Options: preset (tiny, full), data (folder of class folders), dim, vae_steps, guidance, sample_steps."""

    preload: Sequence[str] = ("diffusers.models.unets.unet_2d", "safetensors.torch")

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        _refuse_unknown(options)
        name = options.get("preset", "tiny")
        if name not in PRESETS:
            raise WorkloadError(f"options.preset: unknown value {name!r}; known: {', '.join(PRESETS)}")
        self._preset_name, self._preset = str(name), PRESETS[str(name)]
        data = options.get("data")
        if data is not None and not isinstance(data, str):
            raise WorkloadError(f"options.data: must be the path of a folder, got {data!r}")
        self._options = dict(options)
        self._source = open_source(data)
        self._vae_steps = _whole(options, "vae_steps", self._preset.vae_steps, low=0, high=1_000_000)
        self._dim = _whole(options, "dim", self._preset.dim, low=16, high=512)
        if self._dim % 16:
            raise WorkloadError(f"options.dim: must be a multiple of 16 (attention heads are 32 wide), got {self._dim}")
        self._sample_steps = _whole(options, "sample_steps", self._preset.sample_steps, low=1, high=1000)
        self._guidance = _guidance(options)
        self._size = self._preset.vae.size // FACTOR
        self._cache: LatentCache | None = None
        self._latents: Latents | None = None

    def info(self) -> WorkloadInfo:
        return WorkloadInfo(
            name="latent_cfg",
            summary="Class-conditional latent diffusion with classifier-free guidance on motion spectrograms",
            unit="image",
            preset=self._preset_name,
            preset_note=self._preset.note,
            train_samples=self._source.counts[0],
            baseline=self._baseline(),
        )

    def _baseline(self) -> RunConfig:
        """What the guide's authors ran before they tuned: 8 x 2."""
        return RunConfig(
            workload="latent_cfg",
            options={**self._options, "preset": self._preset_name},
            micro_batch_size=8,
            accumulation_steps=2,
            optimizer=OptimizerConfig(lr=1e-4, betas=(0.9, 0.99)),
            ema=EmaConfig(half_life_samples=EMA_HALF_LIFE),
            max_grad_norm=1.0,
            horizon_samples=self._preset.horizon_samples,
            cadence=self._preset.cadence,
            loss_bands=self._preset.loss_bands,
            threads=self._preset.threads,
        )

    def prepare(self, cache_dir: Path, progress: Progress) -> None:
        """Pictures, codec, latents: made once, afterwards loaded. Raises WorkloadError."""
        cache = LatentCache(cache_dir, self._source, self._preset.vae, self._vae_steps)
        self._latents = cache.ensure(progress)
        self._cache = cache

    def model(self) -> nn.Module:
        return Denoiser(self._dim, self._size, len(self._source.classes))

    def dataset(self, split: Split) -> Dataset[Mapping[str, Tensor]]:
        latents, _ = self._prepared()
        if split == "train":
            return LatentDataset(latents.train, latents.train_labels)
        return LatentDataset(latents.valid, latents.valid_labels)

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """{"latent": float32 [B, 4, s, s], "label": int64 [B]}"""
        return {key: torch.stack([item[key] for item in items]) for key in ("latent", "label")}

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        losses = per_sample_loss(model, batch["latent"], batch["label"], batch["sample_seed"], self._null_class)
        return {"v": Term(sum=losses.sum(), weight=float(len(losses)))}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        """The training loss on held-out pictures. Its draws hang on a picture's place alone, so runs are comparable."""
        total, seen = 0.0, 0
        for batch in batches:
            places = torch.arange(seen, seen + len(batch["label"]), device=batch["label"].device)
            seeds = randomness.sample_seeds(EVALUATION_SEED, 0, places)
            losses = per_sample_loss(model, batch["latent"], batch["label"], seeds, self._null_class)
            total, seen = total + float(losses.double().sum()), seen + len(losses)
        return {"loss": total / max(1, seen)}

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, Denoiser)
        return model.blocks()

    @torch.no_grad()
    def sample(self, model: nn.Module, out_dir: Path, seed: int) -> Sequence[Path]:
        """Write sample-SEED.png: a row for each class; left a held-out picture through the codec, then samples."""
        latents, cache = self._prepared()
        device = next(model.parameters()).device
        rows = min(GRID_CLASSES, len(self._source.classes))
        labels = torch.arange(rows, device=device).repeat_interleave(GRID_COLUMNS)
        made = sample_latents(
            model,
            labels,
            randomness.sample_seeds(seed, 0, torch.arange(len(labels), device=device)),
            size=self._size,
            null_class=self._null_class,
            steps=self._sample_steps,
            guidance=self._guidance,
            bound=float(latents.bound),
        )
        first = torch.stack([latents.valid[latents.valid_labels == row][0] for row in range(rows)]).to(device)
        shown = torch.cat((first[:, None], made.unflatten(0, (rows, GRID_COLUMNS))), dim=1)
        raw = shown.flatten(0, 1) * latents.deviation.to(device) + latents.mean.to(device)
        vae = cache.vae(device)
        pictures = torch.cat([vae.decode(part).float().cpu() for part in raw.split(16)])
        return [_write_grid(pictures.unflatten(0, shown.shape[:2]), out_dir, seed)]

    @property
    def _null_class(self) -> int:
        return len(self._source.classes)

    def _prepared(self) -> tuple[Latents, LatentCache]:
        if self._latents is None or self._cache is None:
            raise RuntimeError("prepare(cache_dir, progress) must be called before data or samples are asked for")
        return self._latents, self._cache


def _refuse_unknown(options: Mapping[str, Scalar]) -> None:
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise WorkloadError(f"options.{unknown[0]}: latent_cfg does not know it; known: {', '.join(OPTIONS)}")


def _whole(options: Mapping[str, Scalar], name: str, default: int, *, low: int, high: int) -> int:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise WorkloadError(f"options.{name}: must be a whole number from {low} to {high}, got {value!r}")
    return value


def _guidance(options: Mapping[str, Scalar]) -> float:
    value = options.get("guidance", 3.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise WorkloadError(f"options.guidance: must be a number from 0 to 100 (1 = none), got {value!r}")
    return float(value)


def _write_grid(pictures: Tensor, out_dir: Path, seed: int) -> Path:
    """[rows, columns, 3, size, size] in [-1, 1] -> one PNG; the first column stands apart."""
    from PIL import Image

    rows, columns, _, size, _ = pictures.shape
    gap, line = max(2, size // 32), size // 4
    canvas = torch.ones(3, rows * (size + gap) - gap, columns * (size + gap) - gap + line)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (size + gap), column * (size + gap) + (line if column else 0)
            canvas[:, top : top + size, left : left + size] = pictures[row, column]
    pixels = ((canvas.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / f"sample-{seed}.png"
    partial = out_dir / f".{path.name}.partial"
    Image.fromarray(pixels).save(partial, format="PNG")
    partial.replace(path)
    return path
