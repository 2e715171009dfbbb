"""The two sizes of the job: tiny, a rehearsal for a CPU core, and full, the guide's model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuner.contract.config import Cadence, LossBands

from .vae import VaeSpec

EMA_HALF_LIFE = round(math.log(0.5) / math.log(0.9995) * 16)
"""0.9995 a step at 16 samples a step, counted in samples: 22,173."""
TINY_NOTE = (
    "tiny is a rehearsal: the same data, losses and code on 64 px pictures with a UNet of 0.7 M parameters. Its samples"
    " are small and coarse, and its speeds say nothing about full; run `preset: full` for the real model"
)
FULL_NOTE = (
    "full is the guide's model: 256 px pictures, latents 4 x 32 x 32, UNet dim 48, 150,000 steps of 16. Samples and a"
    " checkpoint every 2,000 steps; the best and the last are kept, and one from 50,000 or 100,000 steps may be enough."
    " Its codec is trained first: minutes on a GPU, hours on a CPU, where `vae_steps: 0` keeps the linear code"
)


@dataclass(frozen=True)
class Preset:
    vae: VaeSpec
    vae_steps: int
    dim: int
    threads: int
    """CPU threads; 0 = every core. Steps of tiny are too short to share: a second thread mostly waits."""
    sample_steps: int
    assess_steps: int
    """Fewer than for samples to keep: an assessment is made every 2,000 steps."""
    assess_per_class: int
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
        assess_steps=25,
        assess_per_class=8,
        horizon_samples=100_000,
        cadence=Cadence(log_samples=1_600, evaluate_samples=16_000, sample_samples=16_000, checkpoint_samples=16_000),
        loss_bands=LossBands(normal_low=0.05, normal_high=0.3, warn_low=1e-4, warn_high=1.0),
        note=TINY_NOTE,
    ),
    "full": Preset(
        # Three and a half times cheaper than a codec that begins at single pixels, (64, 128, 256) on patches of 2, and
        # as good after the same time: the linear code it starts from restores 0.94 of these smooth pictures.
        vae=VaeSpec(size=256, patch=4, widths=(96, 192), layers=1, lr=1e-3),
        vae_steps=1500,
        dim=48,
        threads=0,
        sample_steps=250,
        assess_steps=50,
        assess_per_class=16,
        horizon_samples=2_400_000,
        # Every 1,000 steps the loss is held against its band, every 2,000 samples and a checkpoint are written.
        cadence=Cadence(log_samples=16_000, evaluate_samples=32_000, sample_samples=32_000, checkpoint_samples=32_000),
        loss_bands=LossBands(normal_low=0.001, normal_high=0.1, warn_low=1e-4, warn_high=1.0),
        note=FULL_NOTE,
    ),
}
