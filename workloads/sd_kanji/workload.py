"""The job: text to kanji with a Stable Diffusion trained from scratch, as the tuner sees it.

                 tiny                  middle                 full
pictures         32 x 32               128 x 128              128 x 128
latents          4 x 8 x 8             4 x 16 x 16            4 x 16 x 16
parameters       947,540               135,422,379            369,743,659
prompt           32 tokens of 2,562    77 tokens of 49,408    77 tokens of 49,408
lr               all 3e-3              VAE 1e-4, rest 1e-5    VAE 1e-4, rest 1e-5
batch            2 x 4                 16 x 4                 16 x 4
horizon          5 epochs              25 epochs              25 epochs

Loss = noise + 0.1 recon + 0.01 KL. Without `text_encoder` the text encoder starts random and learns with the denoiser,
from the noise loss, at its rate; a given one stays as it is, as in Stable Diffusion.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tuner import randomness
from tuner.contract.base import Scalar
from tuner.contract.config import Cadence, EmaConfig, OptimizerConfig, OptimizerName, QualityConfig, RunConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import SAMPLE_SEED, Batch, Progress, Split, Term, Trivial, WorkloadInfo

from .cache import Prepared, PromptPictures, Side, prepare, to_float
from .data import Kanji, Source
from .folder import ImageFolder
from .model import KanjiDiffusion, Losses, Sizes, alpha_bar, generate, spread_timesteps
from .pictures import Row, match_shares, write_rows
from .presets import CLIP_TOKENS, PRESETS
from .tokens import PromptTokenizer

OPTIONS = (
    "preset", "data", "text_encoder", "prompts", "guidance", "sample_steps", "unet_width", "text_layers",
)  # fmt: skip
COEFFICIENTS = {"noise": 1.0, "recon": 0.1, "kl": 0.01}
ACCUMULATION = 4
EVALUATION_SEED = 1 << 20
LEAST_HORIZON = 2_000
"""Samples: the epochs of a very small data set would end before the average forgets the first weights."""
SAMPLE_ROWS, SAMPLE_COLUMNS = 10, 3
ASSESSED, SHOWN, COMPARED = 32, 8, 512
"""Prompts of each side that are drawn, how many of them are shown, and the real pictures each is compared with."""


class SdKanji:
    """Options: preset (tiny, middle, full), data (folder with metadata.jsonl or .csv), text_encoder (folder of a CLIP
    text model), prompts (drawn instead of the data's own, `;` between them), guidance, sample_steps (25 fast, 75 good),
    unet_width and text_layers (they change the model)."""

    preload: Sequence[str] = (
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.models.unets.unet_2d_condition",
        "transformers.models.clip.modeling_clip",
    )

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        _refuse_unknown(options)
        name = options.get("preset", "tiny")
        if name not in PRESETS:
            raise WorkloadError(f"options.preset: unknown value {name!r}; known: {', '.join(PRESETS)}")
        self._preset_name, self._preset = str(name), PRESETS[str(name)]
        self._options = dict(options)
        encoder, data = (_text(options, key, "the path of a folder") for key in ("text_encoder", "data"))
        self._encoder = _folder(encoder) if encoder is not None else None
        self._sizes = self._chosen_sizes(options)
        self._prompts = _prompts(options)
        self._guidance = _number(options, "guidance", 9.0, low=1, high=20)
        self._steps = _whole(options, "sample_steps", 25, low=1, high=1000)
        self._source: Source = Kanji() if data is None else ImageFolder(Path(data))
        self._data: Prepared | None = None

    def info(self) -> WorkloadInfo:
        return WorkloadInfo(
            name="sd_kanji",
            summary="Text to kanji: KL autoencoder, CLIP text encoder and denoiser trained jointly from scratch",
            unit="image",
            preset=self._preset_name,
            preset_note=self._preset.note,
            train_samples=self._source.counts[0],
            baseline=self._baseline(),
        )

    def _baseline(self) -> RunConfig:
        """The guide's, with the average's memory counted in samples: one epoch, and less early in the run."""
        preset, epoch = self._preset, self._source.counts[0]
        often = max(preset.evaluate_epochs * epoch, LEAST_HORIZON // 5)
        return RunConfig(
            workload="sd_kanji",
            options={**self._options, "preset": self._preset_name},
            micro_batch_size=preset.micro_batch_size,
            accumulation_steps=ACCUMULATION,
            optimizer=OptimizerConfig(name=OptimizerName.ADAMW, lr=preset.lr, weight_decay=0.01),
            ema=EmaConfig(half_life_samples=epoch, evaluate_raw=True),
            max_grad_norm=1.0,
            horizon_samples=max(preset.epochs * epoch, LEAST_HORIZON),
            cadence=Cadence(
                log_samples=preset.log_samples,
                evaluate_samples=often,
                sample_samples=often,
                checkpoint_samples=often,
            ),
            loss_bands=preset.loss_bands,
            quality=QualityConfig(metric=self._preset.quality_metric, higher_is_better=False),
            threads=preset.threads,
        )

    def prepare(self, cache_dir: Path, progress: Progress) -> None:
        """Pictures and tokens: made once, afterwards mapped from disk. Raises WorkloadError."""
        self._data = prepare(cache_dir, self._source, self._sizes.picture, self._sizes.tokens, progress)

    def model(self) -> nn.Module:
        """Raises WorkloadError when the given text encoder cannot be used."""
        return KanjiDiffusion(self._sizes, self._encoder)

    def param_groups(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        made = _ours(model)
        rest = [*made.unet.parameters(), *made.text.parameters()]
        return [
            {"params": list(made.vae.parameters()), "lr_scale": 1.0},
            {"params": rest, "lr_scale": self._preset.unet_lr_scale},
        ]

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return _ours(model).blocks()

    def dataset(self, split: Split) -> Dataset[Mapping[str, Tensor]]:
        return PromptPictures(self._prepared().side(split))

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """{"picture": uint8 [B, channels, s, s], "tokens": int64 [B, length]}"""
        return {key: torch.stack([item[key] for item in items]) for key in ("picture", "tokens")}

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        losses: Losses = model(batch["picture"], batch["tokens"], batch[SAMPLE_SEED])
        count = float(len(losses.noise))
        return {name: Term(getattr(losses, name).sum(), count, factor) for name, factor in COEFFICIENTS.items()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        """The training losses on held-out pictures; draws hang on a picture's place alone, so runs are comparable.

        `psnr_db` is of the restored pictures; `latent_std` of the latents the denoiser sees, which should be near 1.
        """
        sums, seen = torch.zeros(len(Losses._fields), dtype=torch.float64), 0
        for batch in batches:
            tokens = batch["tokens"]
            places = torch.arange(seen, seen + len(tokens), device=tokens.device)
            seeds = randomness.sample_seeds(EVALUATION_SEED, 0, places)
            losses: Losses = model(batch["picture"], tokens, seeds, spread_timesteps(places))
            sums += torch.stack([values.double().sum() for values in losses]).cpu()
            seen += len(tokens)
        means = Losses(*(sums / max(1, seen)))
        figures = {name: float(getattr(means, name)) for name in COEFFICIENTS}
        total = sum(factor * figures[name] for name, factor in COEFFICIENTS.items())
        return {"loss": total, **figures, "psnr_db": _psnr(figures["recon"]), "latent_std": math.sqrt(means.power)}

    def trivial(self) -> Mapping[str, Trivial]:
        data = self._prepared()
        parts = data.valid.pictures.split(256)
        squares = sum(float((to_float(part) - data.mean).square().double().mean(dim=(1, 2, 3)).sum()) for part in parts)
        recon = squares / len(data.valid.pictures)
        blind = float(alpha_bar().mean())
        chance = Trivial(value=0.5, text="chance: the picture has nothing to do with its prompt")
        noise = "telling noise from latents by their variance alone"  # predicting none at all would give 1
        return {
            "noise": Trivial(value=blind, text=noise, higher_is_better=False),
            "recon": Trivial(value=recon, text="restoring the mean training picture", higher_is_better=False),
            "psnr_db": Trivial(value=_psnr(recon), text="restoring the mean training picture"),
            "loss": Trivial(
                value=blind + COEFFICIENTS["recon"] * recon,
                text=f"{noise}, and restoring the mean training picture",
                higher_is_better=False,
            ),
            "match_train": chance,
            "match_valid": chance,
        }

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """The whole way from prompt to picture, guidance and all steps included: float32 [B, 3, s, s]."""
        return self._generate(model, batch["tokens"], batch[SAMPLE_SEED])

    @torch.no_grad()
    def sample(self, model: nn.Module, out_dir: Path, seed: int) -> Sequence[Path]:
        """Write sample-SEED.png: a row for each prompt; the real picture where there is one, then drawn ones."""
        rows = self._sample_rows()
        device = next(model.parameters()).device
        tokens = torch.stack([tokens for _, tokens, _ in rows]).to(device).repeat_interleave(SAMPLE_COLUMNS, dim=0)
        seeds = randomness.sample_seeds(seed, 0, torch.arange(len(tokens), device=device))
        made = self._generate(model, tokens, seeds).cpu().unflatten(0, (len(rows), SAMPLE_COLUMNS))
        shown = [Row(label, [real, *drawn]) for (label, _, real), drawn in zip(rows, made, strict=True)]
        return [write_rows(shown, out_dir / f"sample-{seed}.png")]

    @torch.no_grad()
    def assess(self, model: nn.Module, out_dir: Path, seed: int) -> Mapping[str, float]:
        """How well drawn pictures fit prompts, training and held-out ones: `match_train`, `match_valid` (chance 0.5).

        `_se` is their standard error: within two of them a figure is not told from chance. Writes matches-SEED.csv, one
        line a prompt, and prompts-SEED.png: prompt, real picture, drawn picture.
        """
        figures: dict[str, float] = {}
        lines: list[tuple[str, str, str, str]] = []
        rows: list[Row] = []
        splits: tuple[Split, Split] = ("valid", "train")
        for number, split in enumerate(splits):
            side = self._prepared().side(split)
            chosen = _evenly(len(side.texts), ASSESSED)
            made, shares = self._matches(model, side, chosen, seed + number)
            figures[f"match_{split}"] = float(shares.mean())
            figures[f"match_{split}_se"] = float(shares.std(correction=0)) / math.sqrt(len(shares))
            for place, share in zip(chosen, shares.tolist(), strict=True):
                lines.append((split, side.names[place], side.texts[place], f"{share:.4f}"))
            for place, drawn in list(zip(chosen, made, strict=True))[:SHOWN]:
                label = f"{'held out' if split == 'valid' else 'training'}: {side.texts[place]}"
                rows.append(Row(label, [to_float(side.pictures[place][None])[0], drawn]))
        write_rows(rows, out_dir / f"prompts-{seed}.png")
        with (out_dir / f"matches-{seed}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("split", "name", "prompt", "match"), *lines])
        return figures

    def _matches(self, model: nn.Module, side: Side, chosen: list[int], seed: int) -> tuple[Tensor, Tensor]:
        """The drawn pictures of the chosen prompts, and the share of other real pictures each leaves behind."""
        device = next(model.parameters()).device
        tokens = side.tokens[chosen].to(device)
        seeds = randomness.sample_seeds(seed, 1, torch.tensor(chosen, device=device))
        made = self._generate(model, tokens, seeds).cpu()
        others = [place for place in _evenly(len(side.texts), COMPARED + ASSESSED) if place not in set(chosen)]
        rest = to_float(side.pictures[others or chosen])
        return made, match_shares(made, to_float(side.pictures[chosen]), rest, self._prepared().mean)

    def _sample_rows(self) -> list[tuple[str, Tensor, Tensor | None]]:
        """Prompt, tokens, real picture: the user's prompts, or held-out ones and then some of the training set."""
        if self._prompts:
            tokens = PromptTokenizer(self._sizes.tokens)(self._prompts)
            return [(text, own, None) for text, own in zip(self._prompts, tokens, strict=True)]
        data = self._prepared()
        return [
            (side.texts[place], side.tokens[place], to_float(side.pictures[place][None])[0])
            for side in (data.valid, data.train)
            for place in _evenly(len(side.texts), SAMPLE_ROWS // 2)
        ]

    def _generate(self, model: nn.Module, tokens: Tensor, seeds: Tensor) -> Tensor:
        return generate(_ours(model), tokens, seeds, steps=self._steps, guidance=self._guidance)

    def _chosen_sizes(self, options: Mapping[str, Scalar]) -> Sizes:
        sizes = self._preset.sizes
        first = sizes.unet_widths[0]
        width = _whole(options, "unet_width", first, low=sizes.groups, high=2048)
        if width % sizes.groups:
            raise WorkloadError(f"options.unet_width: must be a multiple of {sizes.groups}, got {width}")
        layers = _whole(options, "text_layers", sizes.text_layers, low=1, high=96)
        if self._encoder is None:
            tokens = sizes.tokens
        elif "text_layers" in options:
            raise WorkloadError("options.text_layers: the encoder in options.text_encoder has its own; leave one out")
        else:
            tokens = replace(CLIP_TOKENS, length=sizes.tokens.length)
        widths = tuple(width * (other // first) for other in sizes.unet_widths)
        return replace(sizes, unet_widths=widths, text_layers=layers, tokens=tokens)

    def _prepared(self) -> Prepared:
        if self._data is None:
            raise RuntimeError("prepare(cache_dir, progress) must be called before data or samples are asked for")
        return self._data


def _ours(model: nn.Module) -> KanjiDiffusion:
    assert isinstance(model, KanjiDiffusion)
    return model


def _psnr(squared_error: float) -> float:
    """Of pictures in [-1, 1]: their range is 2."""
    return 10 * math.log10(4 / max(squared_error, 1e-12))


def _evenly(total: int, count: int) -> list[int]:
    """At most `count` places out of `total`, evenly spread."""
    wanted = min(total, count)
    return [place * total // wanted for place in range(wanted)]


def _refuse_unknown(options: Mapping[str, Scalar]) -> None:
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise WorkloadError(f"options.{unknown[0]}: sd_kanji does not know it; known: {', '.join(OPTIONS)}")


def _text(options: Mapping[str, Scalar], name: str, what: str) -> str | None:
    value = options.get(name)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise WorkloadError(f"options.{name}: must be {what}, got {value!r}")
    return value


def _folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise WorkloadError(
            f"options.text_encoder: {path} is not a folder; give that of a CLIP text model on this disk"
        )
    return Path(path)


def _prompts(options: Mapping[str, Scalar]) -> list[str]:
    given = _text(options, "prompts", "texts with `;` between them") or ""
    return [part.strip() for part in given.split(";") if part.strip()]


def _whole(options: Mapping[str, Scalar], name: str, default: int, *, low: int, high: int) -> int:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise WorkloadError(f"options.{name}: must be a whole number from {low} to {high}, got {value!r}")
    return value


def _number(options: Mapping[str, Scalar], name: str, default: float, *, low: float, high: float) -> float:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise WorkloadError(f"options.{name}: must be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)
