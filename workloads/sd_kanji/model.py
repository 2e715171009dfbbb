"""The model: KL autoencoder, text encoder and denoiser as one module, and pictures drawn from prompts with it.

Autoencoder and denoiser learn together. The denoiser sees latents drawn from the autoencoder's posterior, cut off from
its gradient: otherwise the noise loss would teach the autoencoder to make latents that are easy to denoise rather than
to decode. No scale is measured or kept for them: the KL term pulls the drawn latents towards variance 1 as a whole,
from the first step on, and `latent_std` of the evaluation shows where they are. Normalisation is GroupNorm alone, so
no picture depends on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner import randomness
from tuner.contract.errors import WorkloadError

from .cache import to_float
from .tokens import TokenSpec

TIMESTEPS = 1000
BETAS = (1e-4, 2e-2)
"""First and last variance added, linear between (Ho et al., arXiv:2006.11239, section 4)."""
CAPTION_DROP = 0.1
LATENT_CHANNELS = 4
LATENT_BOUND = 4.0
"""Estimates of clean latents are kept within four standard deviations of what the KL term holds them to."""

STREAM_TIMESTEP, STREAM_NOISE, STREAM_DROP, STREAM_POSTERIOR = 0, 1, 2, 3
"""One stream of random numbers for each kind of draw, so that none depends on another."""


@dataclass(frozen=True)
class Sizes:
    """What decides the shape of every weight."""

    picture: int
    """Pixels of a side."""
    patch: int
    """Side of the pixel blocks that are folded into channels before the autoencoder, and unfolded behind it."""
    vae_widths: tuple[int, ...]
    """Channels from there inwards; each step after the first halves the side."""
    vae_layers: int
    unet_widths: tuple[int, ...]
    unet_layers: int
    heads: int
    """Attention heads of the denoiser."""
    text_width: int
    text_layers: int
    text_heads: int
    groups: int
    """Of GroupNorm."""
    tokens: TokenSpec

    @property
    def latent(self) -> int:
        """Side of the latents."""
        return int(self.picture // self.patch // 2 ** (len(self.vae_widths) - 1))


class Losses(NamedTuple):
    """One number a picture: float32 [B] each."""

    noise: Tensor
    """Mean squared error of the predicted noise; 1.0 for predicting none."""
    recon: Tensor
    """Mean squared error of the restored picture, in units of [-1, 1]."""
    kl: Tensor
    """Divergence from the prior in nats per picture element. `recon` is per picture element too, so the balance of the
    two is that of a likelihood bound (Kingma, Welling, arXiv:1312.6114, eq. 10), whatever the batch or the size."""
    power: Tensor
    """Mean square of the latents the denoiser sees; near 1."""


class KanjiDiffusion(nn.Module):
    """Pictures are uint8 [B, 1 or 3, s, s], tokens int64 [B, length], latents float [B, 4, s', s']."""

    signal: Tensor
    no_prompt: Tensor

    def __init__(self, sizes: Sizes, text_encoder: Path | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        self.vae = _vae(sizes)
        self.text = _text(sizes) if text_encoder is None else load_text_encoder(text_encoder, sizes.tokens)
        self.unet = _unet(sizes, int(self.text.config.hidden_size))
        self.register_buffer("signal", alpha_bar(), persistent=False)
        self.register_buffer("no_prompt", sizes.tokens.empty(), persistent=False)

    def forward(self, pictures: Tensor, tokens: Tensor, seeds: Tensor, timestep: Tensor | None = None) -> Losses:
        """The loss terms of each picture. Every draw derives from its own seed, int64 [B]; `timestep`, int64 [B]
        below 1,000, takes the place of the drawn ones."""
        clean = to_float(pictures)
        mean, logvar = self.posterior(clean)
        drawn = randomness.normal(seeds, mean.shape[1:], stream=STREAM_POSTERIOR)
        latents = mean + (0.5 * logvar).exp() * drawn
        recon = (self.decode(latents) - clean).square().mean(dim=(1, 2, 3))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)) / clean[0].numel()
        latents = latents.detach()
        if timestep is None:
            timestep = randomness.integers(seeds, TIMESTEPS, stream=STREAM_TIMESTEP)
        noise = self._noise_loss(latents, tokens, seeds, timestep)
        return Losses(noise, recon, kl, latents.square().mean(dim=(1, 2, 3)))

    def _noise_loss(self, latents: Tensor, tokens: Tensor, seeds: Tensor, timestep: Tensor) -> Tensor:
        """Squared error of the noise, unweighted (Ho et al., eq. 14): float32 [B]."""
        noise = randomness.normal(seeds, latents.shape[1:], stream=STREAM_NOISE)
        signal = self.signal[timestep].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        context = self.context(torch.where(dropped(seeds)[:, None], self.no_prompt, tokens))
        return (self.predict_noise(noisy, timestep, context) - noise).square().mean(dim=(1, 2, 3))

    def posterior(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures, float [B, 3, s, s] -> mean and log variance of their latents, float32."""
        found = self.vae.encode(functional.pixel_unshuffle(clean, self.sizes.patch), return_dict=False)[0]
        return found.mean.float(), found.logvar.float()

    def decode(self, latents: Tensor) -> Tensor:
        """float32 [B, 3, s, s], about -1..1"""
        folded: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return functional.pixel_shuffle(folded, self.sizes.patch).float()

    def context(self, tokens: Tensor) -> Tensor:
        """What the denoiser attends to: [B, length, width]."""
        states: Tensor = self.text(input_ids=tokens).last_hidden_state
        return states

    def predict_noise(self, noisy: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """float32, shaped as `noisy`"""
        predicted: Tensor = self.unet(noisy, timestep, encoder_hidden_states=context, return_dict=False)[0]
        return predicted.float()

    def blocks(self) -> list[nn.Module]:
        """The stages whose activations are worth recomputing."""
        stages = [self.unet, self.vae.encoder, self.vae.decoder]
        return [
            block for part in stages for block in (*_children(part, "down"), part.mid_block, *_children(part, "up"))
        ]


def alpha_bar() -> Tensor:
    """Share of signal variance left at each timestep: float32 [1000]."""
    betas = torch.linspace(*BETAS, TIMESTEPS, dtype=torch.float64)
    return (1 - betas).cumprod(0).float()


def spread_timesteps(places: Tensor) -> Tensor:
    """Timesteps for evaluation: int64 [B] -> int64 [B]. Successive places cover the range evenly (multiples of the
    golden ratio), as the noise loss of a few hundred pictures at random timesteps would be off by a twentieth."""
    return ((places.double() * 0.6180339887498949) % 1 * TIMESTEPS).long()


def dropped(seeds: Tensor) -> Tensor:
    """Which samples are trained without their prompt: bool [B]. Guidance needs both (Ho, Salimans: 2207.12598)."""
    return randomness.uniform(seeds, (), stream=STREAM_DROP) < CAPTION_DROP


@torch.no_grad()
def generate(
    model: KanjiDiffusion, tokens: Tensor, seeds: Tensor, *, steps: int, guidance: float, part: int = 64
) -> Tensor:
    """Pictures for prompts: int64 [N, length], int64 [N] -> float32 [N, 3, s, s] in [-1, 1], `part` at a time.

    Deterministic DDIM (Song et al., arXiv:2010.02502, eq. 12) over `steps` of the 1,000 timesteps, with classifier-free
    guidance (1 = none). Each picture derives from its own seed.
    """
    pairs = zip(tokens.split(part), seeds.split(part), strict=True)
    made = [model.decode(_latents(model, some, own, steps, guidance)) for some, own in pairs]
    return torch.cat(made).clamp(-1, 1)


def _latents(model: KanjiDiffusion, tokens: Tensor, seeds: Tensor, steps: int, guidance: float) -> Tensor:
    side = model.sizes.latent
    x = randomness.normal(seeds, (LATENT_CHANNELS, side, side), stream=STREAM_NOISE)
    predict = _guided(model, tokens, guidance)
    times = torch.linspace(TIMESTEPS - 1, 0, steps, device=x.device).round().long()
    signals = torch.cat((model.signal[times], torch.ones(1, device=x.device)))
    for index in range(steps):
        signal, following = signals[index], signals[index + 1]
        noise = predict(x, times[index])
        clean = ((x - (1 - signal).sqrt() * noise) / signal.sqrt()).clamp(-LATENT_BOUND, LATENT_BOUND)
        noise = (x - signal.sqrt() * clean) / (1 - signal).sqrt()
        x = following.sqrt() * clean + (1 - following).sqrt() * noise
    return x


def _guided(model: KanjiDiffusion, tokens: Tensor, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The noise at (latents, timestep): that of no prompt, moved `guidance` times towards the prompt's."""
    if guidance == 1.0:
        context = model.context(tokens)
        return lambda x, time: model.predict_noise(x, time.expand(len(x)), context)
    both = model.context(torch.cat((tokens, model.no_prompt.expand_as(tokens))))

    def predict(x: Tensor, time: Tensor) -> Tensor:
        found, without = model.predict_noise(torch.cat((x, x)), time.expand(2 * len(x)), both).chunk(2)
        return without + guidance * (found - without)

    return predict


def load_text_encoder(folder: Path, spec: TokenSpec) -> Any:
    """A CLIP text encoder from a folder on disk, frozen. Raises WorkloadError when it does not fit CLIP's tokens."""
    from transformers.models.clip.modeling_clip import CLIPTextModel

    try:
        loaded = CLIPTextModel.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WorkloadError(
            f"options.text_encoder: no CLIP text encoder can be loaded from {folder}: {reason}"
        ) from None
    config = loaded.config
    if config.vocab_size != spec.vocabulary or config.max_position_embeddings < spec.length:
        raise WorkloadError(
            f"options.text_encoder: {folder} takes {config.max_position_embeddings} tokens of {config.vocab_size}"
            f" kinds, but prompts have {spec.length} of CLIP's {spec.vocabulary}; give one trained with CLIP's tokens"
        )
    return loaded.eval().requires_grad_(False)


def _children(stage: Any, which: str) -> list[nn.Module]:
    return list(getattr(stage, f"{which}_blocks", ()))


def _vae(sizes: Sizes) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels = len(sizes.vae_widths)
    return AutoencoderKL(
        in_channels=3 * sizes.patch**2,
        out_channels=3 * sizes.patch**2,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae_widths,
        layers_per_block=sizes.vae_layers,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=sizes.groups,
        sample_size=sizes.picture // sizes.patch,
    )


def _unet(sizes: Sizes, context_width: int) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    inner = len(sizes.unet_widths) - 1
    return UNet2DConditionModel(
        sample_size=sizes.latent,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * inner + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * inner,
        block_out_channels=sizes.unet_widths,
        layers_per_block=sizes.unet_layers,
        cross_attention_dim=context_width,
        attention_head_dim=sizes.heads,
        norm_num_groups=sizes.groups,
    )


def _text(sizes: Sizes) -> Any:
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=sizes.tokens.vocabulary,
            hidden_size=sizes.text_width,
            intermediate_size=4 * sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            max_position_embeddings=sizes.tokens.length,
            bos_token_id=sizes.tokens.start,
            eos_token_id=sizes.tokens.end,
            pad_token_id=sizes.tokens.end,
        )
    )
