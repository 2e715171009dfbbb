"""The two sizes of the job: tiny, a rehearsal for a CPU core, and full, the guide's model."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.contract.config import Cadence, LossBands

from .model import Sizes

TINY_NOTE = (
    "tiny is a rehearsal: the same recordings, graph and losses on windows of 64 steps (the watch at 10 Hz), with a"
    " small model of its own; its speeds say nothing about full, run `preset: full` for the guide's model"
)
FULL_NOTE = (
    "full is the guide's model: windows of 320 steps at the data's own rate, sizes by the GPU's tier. Even the top tier"
    " has only about 0.35 M parameters: memory decides the batch, hardly whether the model fits"
)


@dataclass(frozen=True)
class Preset:
    window_size: int
    watch_downsample: int
    """Watch rows averaged to one; the user's own data stay at their rate."""
    time_k: int
    sizes: Sizes
    threads: int
    """CPU threads; 0 = every core."""
    horizon_samples: int
    cadence: Cadence
    loss_bands: LossBands
    note: str


PRESETS = {
    "tiny": Preset(
        window_size=64,
        watch_downsample=5,
        time_k=3,
        sizes=Sizes(hidden_channels=32, encoder_layers=1, decoder_layers=1, transformer_layers=1, attention_heads=2),
        threads=1,
        horizon_samples=60_000,
        cadence=Cadence(log_samples=1_600, evaluate_samples=8_000, sample_samples=30_000, checkpoint_samples=15_000),
        loss_bands=LossBands(normal_low=0.3, normal_high=3.0, warn_low=1e-3, warn_high=6.0),
        note=TINY_NOTE,
    ),
    "full": Preset(
        window_size=320,
        watch_downsample=1,
        time_k=4,
        sizes=Sizes(hidden_channels=64, encoder_layers=2, decoder_layers=2, transformer_layers=1, attention_heads=2),
        threads=0,
        horizon_samples=400_000,
        cadence=Cadence(log_samples=4_000, evaluate_samples=16_000, sample_samples=80_000, checkpoint_samples=40_000),
        loss_bands=LossBands(normal_low=0.3, normal_high=3.0, warn_low=1e-3, warn_high=6.0),
        note=FULL_NOTE,
    ),
}
