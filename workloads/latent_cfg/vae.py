"""The picture codec: an AutoencoderKL that makes latents [4, size/8, size/8] of pictures [3, size, size].

No trained weights can be assumed, so it is trained here, and it must be usable after seconds on a CPU. Therefore it
starts as the best linear code of 8x8 patches (principal components, in closed form); the network learns what that code
misses. Losses are means over elements, so their balance does not depend on picture or batch size, and normalisation is
GroupNorm, so that no picture depends on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

CHANNELS, FACTOR, GROUPS = 4, 8, 8
KL_WEIGHT = 1e-4
PATCH_VALUES = 3 * FACTOR * FACTOR
FIRST_LOGVAR = -5.0

Step = Callable[[int, int], None]
"""(steps done, steps in all)."""


@dataclass(frozen=True)
class VaeSpec:
    """`patch` is folded into channels before the network, whose levels halve the rest of the factor 8."""

    size: int
    patch: int
    widths: tuple[int, ...]
    layers: int
    batch: int = 16
    lr: float = 2e-3
    threads: int = 0
    """CPU threads for making it; 0 = as the process has it."""

    def __post_init__(self) -> None:
        assert self.patch * 2 ** (len(self.widths) - 1) == FACTOR


class KlVae(nn.Module):
    """Linear patch code plus network, for encoder and decoder alike. Pictures are floats in [-1, 1]."""

    def __init__(self, spec: VaeSpec) -> None:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        super().__init__()
        self.spec = spec
        levels, folded = len(spec.widths), 3 * spec.patch**2
        self.network = AutoencoderKL(
            in_channels=folded,
            out_channels=folded,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=spec.widths,
            layers_per_block=spec.layers,
            latent_channels=CHANNELS,
            norm_num_groups=GROUPS,
            sample_size=spec.size // spec.patch,
            mid_block_add_attention=False,
        )
        self.into = nn.Conv2d(PATCH_VALUES, CHANNELS, 1)
        self.out = nn.Conv2d(CHANNELS, PATCH_VALUES, 1)

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, [B, 4, size/8, size/8] each."""
        latents = self.network.encode(F.pixel_unshuffle(pictures, self.spec.patch), return_dict=False)[0]
        return latents.mean + self.into(F.pixel_unshuffle(pictures, FACTOR)), latents.logvar

    def decode(self, latents: Tensor) -> Tensor:
        detail = self.network.decode(latents, return_dict=False)[0]
        return F.pixel_shuffle(self.out(latents), FACTOR) + F.pixel_shuffle(detail, self.spec.patch)

    @torch.no_grad()
    def start_linear(self, pictures: Tensor) -> None:
        """Set the linear code to the four principal components of 8x8 patches, and the network's share to zero."""
        patches = F.pixel_unshuffle(pictures, FACTOR).permute(0, 2, 3, 1).reshape(-1, PATCH_VALUES)
        mean = patches.mean(0)
        centred = patches - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(patches))
        deviation = variances[-CHANNELS:].clamp(min=1e-6).sqrt()
        directions = directions[:, -CHANNELS:]
        encoder = (directions / deviation).T
        _assign(self.into, encoder, -encoder @ mean)
        _assign(self.out, directions * deviation, mean)
        _zero(self.network.quant_conv)
        self.network.quant_conv.bias[CHANNELS:] = FIRST_LOGVAR
        _zero(self.network.decoder.conv_out)


def train_vae(spec: VaeSpec, pictures: Tensor, steps: int, device: torch.device, step_done: Step) -> KlVae:
    """Fit to uint8 `pictures`; the same pictures and steps give the same weights but for rounding."""
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = KlVae(spec).to(device)
    vae.start_linear(to_float(pictures[:: max(1, len(pictures) * spec.size**2 // (1 << 23))]).to(device))
    optimizer = torch.optim.Adam(vae.parameters(), lr=spec.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _lr_factor(done, steps))
    for done in range(steps):
        chosen = torch.randint(len(pictures), (spec.batch,), generator=draw)
        optimizer.zero_grad()
        vae_loss(vae, to_float(pictures[chosen]).to(device), draw).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step_done(done + 1, steps)
    return vae.eval().requires_grad_(False)


def vae_loss(vae: KlVae, pictures: Tensor, draw: torch.Generator) -> Tensor:
    """Squared error per element + 1e-4 x KL per latent element (Kingma and Welling, arXiv:1312.6114, appendix B)."""
    mean, logvar = vae.encode(pictures)
    noise = torch.randn(mean.shape, generator=draw).to(mean.device)
    restored = vae.decode(mean + (0.5 * logvar).exp() * noise)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.mse_loss(restored, pictures) + KL_WEIGHT * kl


@torch.no_grad()
def encode_all(vae: KlVae, pictures: Tensor, device: torch.device) -> Tensor:
    """Mean latents of uint8 pictures, float32 on the CPU: [N, 4, size/8, size/8]."""
    return torch.cat([vae.encode(to_float(part).to(device))[0].float().cpu() for part in pictures.split(32)])


@torch.no_grad()
def quality(vae: KlVae, pictures: Tensor, mean_picture: Tensor, device: torch.device) -> dict[str, float]:
    """How well uint8 pictures come back. `r2`: share of the squared error of the mean picture that is removed."""
    error = trivial = 0.0
    for part in pictures.split(32):
        wanted = to_float(part).to(device)
        error += float((vae.decode(vae.encode(wanted)[0]) - wanted).square().sum())
        trivial += float((mean_picture.to(device) - wanted).square().sum())
    return {"r2": 1 - error / trivial, "psnr_db": 10 * math.log10(4 * pictures.numel() / error)}


def to_float(pictures: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1"""
    return pictures.float() / 127.5 - 1


def _lr_factor(done: int, steps: int) -> float:
    return min(1.0, (done + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * done / max(1, steps))))


def _assign(layer: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight[:, :, None, None])
    assert layer.bias is not None
    layer.bias.copy_(bias)


def _zero(layer: nn.Conv2d) -> None:
    for parameter in layer.parameters():
        parameter.zero_()
