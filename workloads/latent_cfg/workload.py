"""The job: class-conditional latent diffusion with classifier-free guidance, as the tuner sees it.

                 tiny                          full
pictures         64 x 64                       256 x 256
latents          4 x 8 x 8                     4 x 32 x 32
UNet             dim 16, 701,204 parameters    dim 48, 6,261,556 parameters (10 classes; 6,265,588 with 31)
horizon          100,000 samples               2,400,000 samples (150,000 steps of 16)
sampling         DDIM, 25 steps                DDIM, 250 steps
judged           8 samples a class, 25 steps   16 samples a class, 50 steps

Both have the same data, the motion of ten people or the user's own (class folders, or a file of latents), and the same
baseline, the guide's: 8 x 2 samples a step, Adam (0.9, 0.99) at 1e-4, EMA 0.9995 a step, clip 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tuner import randomness
from tuner.contract.base import Scalar
from tuner.contract.config import EmaConfig, OptimizerConfig, QualityConfig, RunConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Batch, Progress, Split, Term, Trivial, WorkloadInfo

from . import assess
from .cache import LatentCache, Latents, Source
from .data import ClassFolders, WatchRecordings
from .latent_file import SUFFIXES, LatentFile
from .model import Denoiser, guided, per_sample_loss, sample_latents
from .pictures import false_colours, write_grid
from .presets import EMA_HALF_LIFE, PRESETS
from .vae import FACTOR

OPTIONS = ("preset", "data", "dim", "vae_steps", "guidance", "sample_steps")
EVALUATION_SEED = 1 << 20
GRID_CLASSES, GRID_COLUMNS = 12, 4
SAMPLE_CHUNK = 64
"""Samples made at a time, so that making many takes no more memory than training."""
ASSESSED_LIMIT = 512
"""Samples judged at most, however many classes there are."""
PREDICTED_TIMESTEP = 500


def open_source(path: str | None) -> Source:
    """The watch recordings, or the user's folder or file. Raises WorkloadError for what cannot be used."""
    if path is None:
        return WatchRecordings()
    given = Path(path)
    is_file = given.is_file() or given.suffix.lower() in SUFFIXES
    return LatentFile(given) if is_file else ClassFolders(given)


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
    """Options: preset (tiny, full), data (folder of class folders, or file of latents), dim, vae_steps, guidance,
    sample_steps."""

    preload: Sequence[str] = ("diffusers.models.unets.unet_2d", "safetensors.torch")

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        _refuse_unknown(options)
        name = options.get("preset", "tiny")
        if name not in PRESETS:
            raise WorkloadError(f"options.preset: unknown value {name!r}; known: {', '.join(PRESETS)}")
        self._preset_name, self._preset = str(name), PRESETS[str(name)]
        data = options.get("data")
        if data is not None and not isinstance(data, str):
            raise WorkloadError(f"options.data: must be the path of a folder or a file, got {data!r}")
        self._options = dict(options)
        self._source = open_source(data)
        if "vae_steps" in options and isinstance(self._source, LatentFile):
            raise WorkloadError(f"options.vae_steps: {data} holds latents, for which no codec is trained; leave it out")
        self._vae_steps = _whole(options, "vae_steps", self._preset.vae_steps, low=0, high=1_000_000)
        self._dim = _whole(options, "dim", self._preset.dim, low=16, high=512)
        if self._dim % 16:
            raise WorkloadError(f"options.dim: must be a multiple of 16 (attention heads are 32 wide), got {self._dim}")
        self._sample_steps = _whole(options, "sample_steps", self._preset.sample_steps, low=1, high=1000)
        self._guidance = _guidance(options)
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
            quality=QualityConfig(metric="loss", higher_is_better=False),
            threads=self._preset.threads,
        )

    def prepare(self, cache_dir: Path, progress: Progress) -> None:
        """Pictures, codec, latents, judge: made once, afterwards loaded. Raises WorkloadError."""
        cache = LatentCache(cache_dir, self._source, self._preset.vae, self._vae_steps)
        self._latents = cache.ensure(progress)
        self._cache = cache

    def model(self) -> nn.Module:
        return Denoiser(self._dim, self._size, self._null_class)

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
    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """One guided denoising of a batch, of which a sample takes `sample_steps`: [B, 4, s, s]."""
        timestep = torch.full_like(batch["label"], PREDICTED_TIMESTEP)
        return guided(model, batch["latent"], timestep, batch["label"], self._null_class, self._guidance)

    @torch.no_grad()
    def sample(self, model: nn.Module, out_dir: Path, seed: int) -> Sequence[Path]:
        """Write sample-SEED.png: a row for each class; left a held-out picture through the codec, then samples."""
        latents, _ = self._prepared()
        rows = min(GRID_CLASSES, self._null_class)
        made = self._generate(model, torch.arange(rows).repeat_interleave(GRID_COLUMNS), seed, self._sample_steps)
        first = torch.stack([latents.valid[latents.valid_labels == row][0] for row in range(rows)])
        shown = torch.cat((first[:, None], made.unflatten(0, (rows, GRID_COLUMNS))), dim=1)
        pictures = self._show(shown.flatten(0, 1), _device_of(model))
        return [write_grid(pictures.unflatten(0, shown.shape[:2]), out_dir / f"sample-{seed}.png")]

    @torch.no_grad()
    def assess(self, model: nn.Module, out_dir: Path, seed: int) -> Mapping[str, float]:
        """Judge as many samples of every class: `class_match`, `memorised_share` and others (see `assess.figures`).

        Writes classes-SEED.png and .csv (per class), nearest-SEED.png and .csv (nearest training pictures).
        """
        latents, cache = self._prepared()
        device, names = _device_of(model), self._source.classes
        each = max(1, min(self._preset.assess_per_class, ASSESSED_LIMIT // len(names)))
        labels = torch.arange(min(len(names), ASSESSED_LIMIT)).repeat_interleave(each)
        made = self._generate(model, labels, seed, min(self._preset.assess_steps, self._sample_steps))
        judge = cache.judge(device)
        found = assess.judged(made, labels, latents, judge)

        def show(some: Tensor) -> Tensor:
            return self._show(some, device)

        assess.write_class_table(found, names, latents, judge, out_dir / f"classes-{seed}.csv")
        assess.write_nearest_table(found, latents, names, out_dir / f"nearest-{seed}.csv")
        assess.draw_classes(found, latents, show, out_dir / f"classes-{seed}.png")
        assess.draw_nearest(found, latents, show, out_dir / f"nearest-{seed}.png")
        return assess.figures(found, latents, judge)

    def trivial(self) -> Mapping[str, Trivial]:
        """What the figures would be without learning, computed from the held-out data."""
        latents, _ = self._prepared()
        chance = float(latents.valid_labels.bincount().max()) / len(latents.valid_labels)
        return {
            "loss": Trivial(
                value=self.evaluate(_Zero(), _batches(latents))["loss"],
                text="predicting v = 0, the mean",
                higher_is_better=False,
            ),
            "class_match": Trivial(value=1 / self._null_class, text="chance"),
            "class_match_real": Trivial(value=chance, text="always the commonest class"),
            "memorised_share": Trivial(value=1.0, text="copying training pictures", higher_is_better=False),
        }

    def _generate(self, model: nn.Module, labels: Tensor, seed: int, steps: int) -> Tensor:
        """Samples of the classes `labels` [B], on the CPU: [B, 4, s, s]. Each draws its own noise."""
        device, bound = _device_of(model), float(self._prepared()[0].bound)
        seeds = randomness.sample_seeds(seed, 0, torch.arange(len(labels)))
        parts = [
            sample_latents(
                model,
                some.to(device),
                own.to(device),
                size=self._size,
                null_class=self._null_class,
                steps=steps,
                guidance=self._guidance,
                bound=bound,
            ).cpu()
            for some, own in zip(labels.split(SAMPLE_CHUNK), seeds.split(SAMPLE_CHUNK), strict=True)
        ]
        return torch.cat(parts)

    def _show(self, standardised: Tensor, device: torch.device) -> Tensor:
        """Pictures [B, 3, size, size] in [-1, 1], on the CPU: decoded, or in false colours without a codec."""
        latents, cache = self._prepared()
        vae = cache.vae(device)
        if vae is None:
            return false_colours(standardised)
        raw = standardised * latents.deviation + latents.mean
        return torch.cat([vae.decode(part.to(device)).float().cpu() for part in raw.split(16)])

    @property
    def _size(self) -> int:
        """Side of a latent."""
        return self._source.size if isinstance(self._source, LatentFile) else self._preset.vae.size // FACTOR

    @property
    def _null_class(self) -> int:
        return len(self._source.classes)

    def _prepared(self) -> tuple[Latents, LatentCache]:
        if self._latents is None or self._cache is None:
            raise RuntimeError("prepare(cache_dir, progress) must be called before data or samples are asked for")
        return self._latents, self._cache


class _Zero(nn.Module):
    """Predicts v = 0: the best linear rule for one standardised value that does not know what lies around it."""

    def forward(self, noisy: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(noisy)


def _batches(latents: Latents) -> Iterable[Batch]:
    parts = zip(latents.valid.split(256), latents.valid_labels.split(256), strict=True)
    return ({"latent": values, "label": labels} for values, labels in parts)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


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
