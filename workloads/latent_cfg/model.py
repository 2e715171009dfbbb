"""The denoiser and its diffusion: cosine schedule, v-prediction, min-SNR weights, guided DDIM sampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tuner import randomness

TIMESTEPS = 1000
MIN_SNR_GAMMA = 5.0
CONDITION_DROP = 0.5
LATENT_CHANNELS = 4
MULTIPLES = (1, 2, 4)
GROUPS, HEAD_WIDTH = 8, 32
_OFFSET = 0.008

STREAM_TIMESTEP, STREAM_NOISE, STREAM_DROP = 0, 1, 2
"""One stream of random numbers for each kind of draw, so that none depends on another."""


class Denoiser(nn.Module):
    """UNet2DModel with a class embedding; class number `classes` means "no condition"."""

    def __init__(self, dim: int, size: int, classes: int) -> None:
        from diffusers.models.unets.unet_2d import UNet2DModel

        super().__init__()
        self.null_class = classes
        self.size = size
        self.unet = UNet2DModel(
            sample_size=size,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            block_out_channels=tuple(dim * multiple for multiple in MULTIPLES),
            layers_per_block=1,
            norm_num_groups=GROUPS,
            attention_head_dim=HEAD_WIDTH,
            num_class_embeds=classes + 1,
        )

    def forward(self, noisy: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """[B, 4, s, s], int64 [B], int64 [B] -> predicted v [B, 4, s, s]"""
        predicted: Tensor = self.unet(noisy, timestep, class_labels=labels, return_dict=False)[0]
        return predicted

    def blocks(self) -> list[nn.Module]:
        """The stages whose activations are worth recomputing."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]


def alpha_bar(timestep: Tensor) -> Tensor:
    """Share of signal variance left at `timestep` (0 to 999): float32, same shape.

    Cosine schedule of Nichol and Dhariwal, arXiv:2102.09672, eq. 17. Their limit beta <= 0.999 acts on the last step
    alone; a formula instead of a table leaves nothing to keep on a device.
    """
    return (
        torch.maximum(_curve(timestep + 1), 0.001 * _curve(timestep))
        / math.cos(_OFFSET / (1 + _OFFSET) * math.pi / 2) ** 2
    )


def _curve(timestep: Tensor) -> Tensor:
    return torch.cos((timestep.float() / TIMESTEPS + _OFFSET) * (math.pi / 2 / (1 + _OFFSET))).square()


def per_sample_loss(model: nn.Module, latents: Tensor, labels: Tensor, seeds: Tensor, null_class: int) -> Tensor:
    """Weighted squared error of v, one number a sample: float32 [B].

    v = alpha * noise - sigma * x (Salimans and Ho, arXiv:2202.00512); weight min(snr, 5) / (snr + 1) as min-SNR demands
    for v (Hang et al., arXiv:2303.09556, section 3.4). Every draw derives from the sample's own seed.
    """
    timestep = randomness.integers(seeds, TIMESTEPS, stream=STREAM_TIMESTEP)
    noise = randomness.normal(seeds, latents.shape[1:], stream=STREAM_NOISE)
    labels = torch.where(dropped(seeds), null_class, labels)
    signal = alpha_bar(timestep)
    alpha, sigma = signal.sqrt().view(-1, 1, 1, 1), (1 - signal).sqrt().view(-1, 1, 1, 1)
    predicted = model(alpha * latents + sigma * noise, timestep, labels)
    error = (predicted.float() - (alpha * noise - sigma * latents)).square().mean(dim=(1, 2, 3))
    weighted: Tensor = error * min_snr_weight(signal)
    return weighted


def min_snr_weight(signal: Tensor) -> Tensor:
    """signal = alpha^2, so snr = signal / (1 - signal) and 1 / (snr + 1) = 1 - signal."""
    snr = signal / (1 - signal)
    return snr.clamp(max=MIN_SNR_GAMMA) * (1 - signal)


def dropped(seeds: Tensor) -> Tensor:
    """Which samples are trained without their condition: bool [B] (Ho and Salimans, arXiv:2207.12598)."""
    return randomness.uniform(seeds, (), stream=STREAM_DROP) < CONDITION_DROP


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    labels: Tensor,
    seeds: Tensor,
    *,
    size: int,
    null_class: int,
    steps: int,
    guidance: float,
    bound: float,
) -> Tensor:
    """Latents for `labels` by deterministic DDIM (Song et al., arXiv:2010.02502, eq. 12): float32 [B, 4, size, size].

    The estimate of x is kept within +-`bound`, the range of the training latents. They have standard deviation 1, so
    the customary limit of 1 for pictures would squash them.
    """
    x = randomness.normal(seeds, (LATENT_CHANNELS, size, size), stream=STREAM_NOISE)
    times = torch.linspace(TIMESTEPS - 1, 0, steps, device=x.device).round().long()
    signals = torch.cat((alpha_bar(times), torch.ones(1, device=x.device)))
    for index in range(steps):
        v = guided(model, x, times[index].expand(len(x)), labels, null_class, guidance)
        alpha, sigma = signals[index].sqrt(), (1 - signals[index]).sqrt()
        clean = (alpha * x - sigma * v).clamp(-bound, bound)
        noise = (x - alpha * clean) / sigma
        x = signals[index + 1].sqrt() * clean + (1 - signals[index + 1]).sqrt() * noise
    return x


def guided(model: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor, null_class: int, guidance: float) -> Tensor:
    """v of the null class, moved `guidance` times towards the class's v; 1 = no guidance, one pass only."""
    if guidance == 1.0:
        predicted: Tensor = model(x, timestep, labels)
        return predicted.float()
    both = torch.cat((labels, torch.full_like(labels, null_class)))
    with_class, without = model(torch.cat((x, x)), torch.cat((timestep, timestep)), both).float().chunk(2)
    moved: Tensor = without + guidance * (with_class - without)
    return moved
