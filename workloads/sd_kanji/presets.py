"""The three sizes of the job, and what each trains for. Data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.contract.config import LossBands

from .model import Sizes
from .tokens import ALL_MERGES, CLIP_LENGTH, TokenSpec

CLIP_TOKENS = TokenSpec(merges=ALL_MERGES, length=CLIP_LENGTH)


@dataclass(frozen=True)
class Preset:
    sizes: Sizes
    micro_batch_size: int
    lr: float
    """Of the autoencoder."""
    unet_lr_scale: float
    """Denoiser's and text encoder's rate as a multiple of it."""
    epochs: int
    evaluate_epochs: int
    """Validation, samples and a checkpoint every so many epochs."""
    log_samples: int
    threads: int
    """CPU threads; 0 = every core. Steps of tiny are too short to share: a second thread mostly waits."""
    loss_bands: LossBands
    quality_metric: str
    """The figure of the validation whose best checkpoint is kept; the lower the better."""
    note: str


PRESETS = {
    "tiny": Preset(
        # Blocks of 2 x 2 pixels become channels, as most of the time would go into 32 x 32 convolutions otherwise; one
        # attention head, and a vocabulary of CLIP's first 2,048 merges, in which no prompt is longer than 32 tokens.
        sizes=Sizes(
            picture=32, patch=2, vae_widths=(32, 32), vae_layers=1, unet_widths=(24, 48), unet_layers=1, heads=1,
            text_width=64, text_layers=2, text_heads=2, groups=8, tokens=TokenSpec(merges=2048, length=32),
        ),
        micro_batch_size=2,
        lr=3e-3,
        unet_lr_scale=1.0,
        epochs=5,
        evaluate_epochs=1,
        log_samples=400,
        threads=1,
        loss_bands=LossBands(normal_low=0.2, normal_high=0.4, warn_low=0.02, warn_high=1.2),
        quality_metric="recon",  # what minutes teach; the noise loss hardly moves in them
        note=(
            "tiny is a rehearsal: the same data, losses and code on 32 px pictures with 0.9 M parameters. Minutes teach"
            " it strokes, not prompts, and its speeds say nothing about full; run `preset: full` for the real model"
        ),
    ),
    "middle": Preset(
        sizes=Sizes(
            picture=128, patch=1, vae_widths=(64, 128, 256, 256), vae_layers=2, unet_widths=(128, 256, 512),
            unet_layers=1, heads=8, text_width=512, text_layers=12, text_heads=8, groups=32, tokens=CLIP_TOKENS,
        ),
        micro_batch_size=16,
        lr=1e-4,
        unet_lr_scale=0.1,
        epochs=25,
        evaluate_epochs=5,
        log_samples=1600,
        threads=0,
        loss_bands=LossBands(normal_low=0.02, normal_high=0.4, warn_low=0.005, warn_high=1.2),
        quality_metric="loss",
        note="middle is the guide's job with a third of the parameters (135 M), for GPUs on which full does not fit",
    ),
    "full": Preset(
        sizes=Sizes(
            picture=128, patch=1, vae_widths=(128, 256, 512, 512), vae_layers=2, unet_widths=(192, 384, 768),
            unet_layers=2, heads=8, text_width=768, text_layers=12, text_heads=12, groups=32, tokens=CLIP_TOKENS,
        ),
        micro_batch_size=16,
        lr=1e-4,
        unet_lr_scale=0.1,
        epochs=25,
        evaluate_epochs=5,
        log_samples=1600,
        threads=0,
        loss_bands=LossBands(normal_low=0.02, normal_high=0.4, warn_low=0.005, warn_high=1.2),
        quality_metric="loss",
        note="full is the guide's job: 128 px, 370 M parameters, 25 epochs, autoencoder at 1e-4, denoiser at 1e-5",
    ),
}  # fmt: skip
