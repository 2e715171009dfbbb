"""sd_kanji: the model and its loss, drawing and judging pictures, the user's own data, what the tuner is told."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.workloads.test_sd_kanji_data import picture_folder, quiet
from tuner.contract.base import Scalar, parse_json
from tuner.contract.config import RunConfig
from tuner.contract.documents import load_document
from tuner.contract.errors import WorkloadError
from tuner.contract.study import StudyFile
from tuner.contract.workload import Workload
from tuner.engine.optim import build_optimizer
from tuner.randomness import sample_seeds
from tuner.testing import WorkloadContract
from workloads.sd_kanji.model import KanjiDiffusion, alpha_bar, dropped, generate, spread_timesteps
from workloads.sd_kanji.pictures import match_shares
from workloads.sd_kanji.presets import CLIP_TOKENS, PRESETS
from workloads.sd_kanji.workload import SdKanji

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, Scalar] = {"sample_steps": 2}


@pytest.fixture(scope="module")
def cache(kanji_cache: Path) -> Path:
    return kanji_cache


@pytest.fixture(scope="module")
def job(cache: Path) -> SdKanji:
    made = SdKanji(OPTIONS)
    made.prepare(cache, quiet)
    return made


def batch_of(job: SdKanji, indices: Tensor, split: str = "train") -> dict[str, Tensor]:
    items = job.dataset("train" if split == "train" else "valid")
    made = job.collate([items[int(index)] for index in indices])
    return {**made, "sample_seed": sample_seeds(0, 0, indices)}


def seeded_model(job: SdKanji) -> KanjiDiffusion:
    torch.manual_seed(0)
    model = job.model()
    assert isinstance(model, KanjiDiffusion)
    return model


def total_of(job: SdKanji, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    terms = job.loss(model, batch).values()
    return torch.stack([term.coefficient * term.sum / term.weight for term in terms]).sum()


# --- the loss -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_terms_are_the_guides_with_its_coefficients(job: SdKanji) -> None:
    model, batch = seeded_model(job), batch_of(job, torch.arange(6))
    terms = job.loss(model, batch)
    assert {name: term.coefficient for name, term in terms.items()} == {"noise": 1.0, "recon": 0.1, "kl": 0.01}
    assert all(term.weight == 6.0 for term in terms.values())
    assert 0.5 < float(terms["noise"].sum) / 6 < 2.0, "an untrained denoiser is about as good as predicting nothing"
    alone = [
        float(job.loss(model, {key: value[i : i + 1] for key, value in batch.items()})["kl"].sum) for i in range(6)
    ]
    assert sum(alone) == pytest.approx(float(terms["kl"].sum), rel=1e-4), "its weight does not depend on the batch"


@torch.no_grad()
def test_the_picture_restored_has_the_size_of_the_picture(job: SdKanji) -> None:
    model = seeded_model(job)
    mean, logvar = model.posterior(torch.zeros(2, 3, 32, 32))
    assert mean.shape == logvar.shape == (2, 4, 8, 8)
    assert model.decode(mean).shape == (2, 3, 32, 32)


def test_the_noise_loss_does_not_move_the_autoencoder(job: SdKanji) -> None:
    model, batch = seeded_model(job), batch_of(job, torch.arange(4))
    job.loss(model, batch)["noise"].sum.backward()
    assert all(parameter.grad is None for parameter in model.vae.parameters())
    assert all(parameter.grad is not None for parameter in model.unet.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in model.text.parameters() if parameter.grad is not None)


@torch.no_grad()
def test_a_tenth_of_the_prompts_is_dropped_by_seed(job: SdKanji) -> None:
    seeds = sample_seeds(3, 1, torch.arange(20_000))
    assert float(dropped(seeds).float().mean()) == pytest.approx(0.1, abs=0.01)
    chosen = torch.cat((seeds[dropped(seeds)][:2], seeds[~dropped(seeds)][:2]))
    model, batch = seeded_model(job), {**batch_of(job, torch.arange(4)), "sample_seed": chosen}
    other = {**batch, "tokens": batch["tokens"].roll(1, 0)}
    first = model(batch["picture"], batch["tokens"], chosen).noise
    second = model(other["picture"], other["tokens"], chosen).noise
    assert torch.allclose(first[:2], second[:2], atol=1e-6), "without its prompt a picture's loss does not hang on it"
    assert (first[2:] - second[2:]).abs().min() > 1e-6, "with it, it does"


def test_no_layer_normalises_over_the_batch() -> None:
    with torch.device("meta"):
        models = [KanjiDiffusion(preset.sizes) for preset in PRESETS.values()]
    assert not [m for model in models for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


def test_evaluation_sees_every_stretch_of_the_schedule() -> None:
    """654 timesteps lie so that the share of signal they leave is that of all 1,000."""
    found = spread_timesteps(torch.arange(654))
    assert found.min() >= 0
    assert found.max() < 1000
    assert float(alpha_bar()[found].mean()) == pytest.approx(float(alpha_bar().mean()), rel=0.005)


def test_the_schedule_ends_in_noise() -> None:
    signal = alpha_bar()
    assert signal.shape == (1000,)
    assert float(signal[0]) == pytest.approx(1 - 1e-4)
    assert 0 < float(signal[-1]) < 1e-4
    assert (signal.diff() < 0).all()


def test_checkpointed_blocks_give_the_same_gradients(job: SdKanji) -> None:
    from torch.utils.checkpoint import checkpoint

    model, batch = seeded_model(job), batch_of(job, torch.arange(2))
    parameters = list(model.parameters())
    plain = torch.autograd.grad(total_of(job, model, batch), parameters, allow_unused=True)
    blocks = job.checkpoint_blocks(model)
    for block in blocks:
        block.forward = lambda *args, _own=block.forward, **kw: checkpoint(_own, *args, use_reentrant=False, **kw)
    again = torch.autograd.grad(total_of(job, model, batch), parameters, allow_unused=True)
    assert len(blocks) == (2 + 1 + 2) + (2 + 1) + (1 + 2)
    assert all(one is not None for one in plain), "every weight is trained"
    for one, two in zip(plain, again, strict=True):
        assert one is not None
        assert two is not None
        assert torch.allclose(one, two, atol=1e-6)


def test_autoencoder_and_denoiser_have_their_own_rates() -> None:
    full = SdKanji({"preset": "full"})
    with torch.device("meta"):
        model = full.model()
        optimizer = build_optimizer(full, model, full.info().baseline.optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-5])
    counts = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert counts[0] == 83_653_863
    assert sum(counts) == sum(p.numel() for p in model.parameters())


# --- learning and judging -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(job: SdKanji) -> KanjiDiffusion:
    """Seventy steps of eight pictures, seconds long."""
    model = seeded_model(job).train()
    groups = [{**group, "lr": 2e-3 * group["lr_scale"]} for group in job.param_groups(model)]
    optimizer = torch.optim.AdamW(groups)
    for step in range(70):
        drawn = torch.randint(5758, (8,), generator=torch.Generator().manual_seed(step))
        batch = {**batch_of(job, drawn), "sample_seed": sample_seeds(0, step, drawn)}
        optimizer.zero_grad()
        total_of(job, model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def test_seconds_of_training_beat_the_trivial_figures(job: SdKanji, trained: KanjiDiffusion) -> None:
    batches = [batch_of(job, torch.arange(at, at + 64), "valid") for at in (0, 64)]
    figures, trivial = job.evaluate(trained, batches), job.trivial()
    assert trivial["noise"].value == pytest.approx(0.276, abs=1e-3)
    assert trivial["recon"].value == pytest.approx(0.2543, abs=1e-3)
    assert figures["noise"] < 0.6
    assert figures["recon"] < 0.9 * trivial["recon"].value
    assert figures["psnr_db"] > trivial["psnr_db"].value
    assert figures["latent_std"] == pytest.approx(1.0, abs=0.15), "the denoiser's schedule is made for variance 1"


def test_evaluation_is_repeatable_and_does_not_hang_on_batches(job: SdKanji) -> None:
    model = seeded_model(job).eval()
    whole = job.evaluate(model, [batch_of(job, torch.arange(12), "valid")])
    cut = job.evaluate(model, [batch_of(job, torch.arange(at, at + 4), "valid") for at in (0, 4, 8)])
    assert whole == pytest.approx(cut, rel=1e-4)
    assert whole["loss"] == pytest.approx(whole["noise"] + 0.1 * whole["recon"] + 0.01 * whole["kl"])


def test_a_picture_is_drawn_from_its_own_prompt_and_seed(job: SdKanji, trained: KanjiDiffusion) -> None:
    batch = batch_of(job, torch.arange(3))
    together = generate(trained, batch["tokens"], batch["sample_seed"], steps=3, guidance=9.0)
    assert together.shape == (3, 3, 32, 32)
    assert together.abs().max() <= 1
    alone = generate(trained, batch["tokens"][1:2], batch["sample_seed"][1:2], steps=3, guidance=9.0)
    assert torch.allclose(together[1:2], alone, atol=1e-3)
    assert torch.equal(
        generate(trained, batch["tokens"], batch["sample_seed"], steps=3, guidance=9.0, part=64), together
    )
    other = generate(trained, batch["tokens"], batch["sample_seed"] + 1, steps=3, guidance=9.0)
    assert (other - together).abs().max() > 0.1
    plain = generate(trained, batch["tokens"], batch["sample_seed"], steps=3, guidance=1.0)
    assert (plain - together).abs().max() > 1e-3
    assert torch.equal(job.predict(trained, batch), generate(trained, *_of(batch), steps=2, guidance=9.0))


def _of(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["tokens"], batch["sample_seed"]


def test_matching_tells_right_pictures_from_wrong_ones(job: SdKanji) -> None:
    pictures = batch_of(job, torch.arange(80))["picture"].float().expand(-1, 3, -1, -1) / 127.5 - 1
    mean = pictures.mean(0)
    real, others = pictures[:20], pictures[20:]
    noisy = real + 0.5 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    assert match_shares(noisy, real, others, mean).min() > 0.95
    assert float(match_shares(others[:20], real, others[20:], mean).mean()) == pytest.approx(0.5, abs=0.15)


def test_the_judgement_writes_a_grid_and_a_table(job: SdKanji, tmp_path: Path) -> None:
    model = seeded_model(job).eval()
    figures = job.assess(model, tmp_path, 4)
    assert set(figures) == {"match_train", "match_train_se", "match_valid", "match_valid_se"}
    assert job.trivial()["match_valid"].value == 0.5
    assert abs(figures["match_valid"] - 0.5) < 5 * figures["match_valid_se"], "an untrained model is at chance"
    with (tmp_path / "matches-4.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["valid"] * 32 + ["train"] * 32
    mean = sum(float(row["match"]) for row in rows[:32]) / 32
    assert mean == pytest.approx(figures["match_valid"], abs=1e-3)
    with Image.open(tmp_path / "prompts-4.png") as grid:
        assert grid.size == (150 + 2 * 66, 16 * 66 - 2)
    assert job.assess(model, tmp_path, 4) == figures


def test_the_grid_is_one_picture_and_the_seed_decides_it(job: SdKanji, tmp_path: Path) -> None:
    model = seeded_model(job).eval()
    contents = [job.sample(model, tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, same, other = (path.read_bytes() for (path,) in contents)
    assert first == same != other
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["sample-1.png"]
    with Image.open(tmp_path / "a" / "sample-1.png") as grid:
        assert grid.size == (150 + 4 * 66, 10 * 66 - 2)


def test_own_prompts_are_drawn_when_given(cache: Path, tmp_path: Path) -> None:
    asked = SdKanji({"sample_steps": 1, "prompts": "kanji character for success; mountain river;"})
    asked.prepare(cache, quiet)
    (path,) = asked.sample(seeded_model(asked), tmp_path, 0)
    with Image.open(path) as grid:
        assert grid.size == (150 + 4 * 66, 2 * 66 - 2)


# --- the user's own ------------------------------------------------------------------------------------------------


def test_own_pictures_from_folder_to_samples(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "data", [(f"{n:02d}.png", f"shade number {n}") for n in range(20)])
    own = SdKanji({"data": str(folder), "sample_steps": 2})
    own.prepare(tmp_path / "cache", quiet)
    assert own.info().train_samples == len(own.dataset("train")) == 18  # type: ignore[arg-type]
    model = seeded_model(own)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch = batch_of(own, torch.arange(8))
    assert batch["picture"].shape == (8, 3, 32, 32)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = total_of(own, model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert own.evaluate(model, [batch_of(own, torch.arange(2), "valid")])["loss"] > 0
    assert set(own.assess(model, tmp_path, 0)) >= {"match_train", "match_valid"}
    assert own.sample(model, tmp_path, 0)[0].is_file()
    assert all(math.isfinite(trivial.value) for trivial in own.trivial().values())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP text model on disk, as a user has one; random weights, CLIP's vocabulary."""
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    folder = tmp_path_factory.mktemp("encoder")
    config = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_a_given_text_encoder_is_used_and_stays_as_it_is(encoder: Path, tmp_path: Path) -> None:
    data = picture_folder(tmp_path / "data", [("a.png", "a photo of a cat"), ("b.png", "two")])
    given = SdKanji({"text_encoder": str(encoder), "data": str(data)})
    given.prepare(tmp_path / "cache", quiet)
    model = seeded_model(given)
    assert model.text.config.hidden_size == 16
    tokens = {tuple(given.dataset(split)[0]["tokens"].tolist()) for split in ("train", "valid")}
    assert any(own[:6] == (49406, 320, 1125, 539, 320, 2368) for own in tokens), "CLIP's own tokens, in tiny too"
    total_of(given, model, batch_of(given, torch.arange(1))).backward()
    assert all(parameter.grad is None for parameter in model.text.parameters())
    optimizer = build_optimizer(given, model, given.info().baseline.optimizer)
    trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert trained == sum(p.numel() for part in (model.vae, model.unet) for p in part.parameters())


def test_a_text_encoder_that_does_not_fit_is_refused(encoder: Path, tmp_path: Path) -> None:
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    with pytest.raises(WorkloadError, match=r"options.text_encoder: no CLIP text encoder can be loaded from"):
        SdKanji({"text_encoder": str(tmp_path)}).model()
    small = CLIPTextConfig(
        vocab_size=100, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    CLIPTextModel(small).save_pretrained(tmp_path / "small")
    with pytest.raises(WorkloadError, match=r"takes 77 tokens of 100 kinds, but prompts have 32 of CLIP's 49408"):
        SdKanji({"text_encoder": str(tmp_path / "small")}).model()
    with pytest.raises(WorkloadError, match=r"options.text_layers: the encoder in options.text_encoder has its own"):
        SdKanji({"text_encoder": str(encoder), "text_layers": 2})


class TestContract(WorkloadContract):
    """The suite every workload must pass, in this process and in real workers."""

    workload = "sd_kanji"
    options = OPTIONS

    @pytest.fixture(scope="class")
    @classmethod
    def cache_dir(cls, job: SdKanji, cache: Path) -> Path:
        """What `job` has prepared is found here."""
        return cache


# --- what the tuner is told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "total", "vae", "unet", "text"),
    [
        ("tiny", 947_540, 223_984, 457_444, 266_112),
        ("middle", 135_422_379, 20_945_575, 51_310_852, 63_165_952),
        ("full", 369_743_659, 83_653_863, 163_029_316, 123_060_480),
    ],
)
def test_the_sizes_are_those_of_the_description(preset: str, total: int, vae: int, unet: int, text: int) -> None:
    """The guide's model has 368 million; its denoiser's widths are not told, so ours come as near as round ones do."""
    with torch.device("meta"):
        model = SdKanji({"preset": preset}).model()
    assert isinstance(model, KanjiDiffusion)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model, model.vae, model.unet, model.text)]
    assert counts == [total, vae, unet, text]
    assert f"{total:,}" in (sys.modules[SdKanji.__module__].__doc__ or "")


def test_levers_of_the_model_change_it() -> None:
    with torch.device("meta"):
        wide, deep, plain = (SdKanji(o).model() for o in ({"unet_width": 32}, {"text_layers": 3}, {}))
    assert isinstance(wide, KanjiDiffusion)
    assert wide.sizes.unet_widths == (32, 64)
    counts = [sum(p.numel() for p in model.parameters()) for model in (wide, deep, plain)]
    assert counts[0] > counts[2] < counts[1]


def test_the_baseline_is_the_guides() -> None:
    info = SdKanji({"preset": "full"}).info()
    baseline = info.baseline
    assert parse_json(RunConfig, baseline.to_json()) == baseline
    assert (info.train_samples, baseline.batch_label) == (5758, "16x4")
    assert baseline.optimizer.lr == 1e-4
    assert baseline.max_grad_norm == 1.0
    assert baseline.horizon_samples == 25 * 5758
    assert baseline.cadence.evaluate_samples == baseline.cadence.checkpoint_samples == 5 * 5758
    assert baseline.ema is not None
    assert baseline.ema.evaluate_raw
    left = 0.5 ** (baseline.horizon_samples / baseline.ema.half_life_samples)
    assert left < 1e-6, "of the first weights nothing is left in the average"
    assert PRESETS["full"].sizes.tokens == CLIP_TOKENS
    assert "rehearsal" in SdKanji({}).info().preset_note
    assert isinstance(SdKanji({}), Workload)


def test_the_study_file_is_valid_and_keeps_the_baseline() -> None:
    study = load_document(StudyFile, (ROOT / "studies" / "sd_kanji" / "study.yaml").read_text(), "study.yaml")
    assert study.workload == "sd_kanji"
    assert set(study.presets) == set(PRESETS)
    assert [(tier.above_gib, tier.baseline["micro_batch_size"]) for tier in study.tiers] == [
        (8, 16),
        (4, 8),
        (2, 4),
        (0, 2),
    ]
    for name in PRESETS:
        baseline = SdKanji({"preset": name}).info().baseline
        assert study.baseline["accumulation_steps"] == baseline.accumulation_steps == 4
        assert study.presets[name]["baseline"]["optimizer"]["lr"] == baseline.optimizer.lr
        assert baseline.optimizer.lr in study.presets[name]["space"]["lr"]
    assert not study.space.options, "the model is not changed silently"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre": "tiny"}, "options.pre: sd_kanji does not know it; known: preset, data, text_encoder"),
        ({"preset": "huge"}, "options.preset: unknown value 'huge'; known: tiny, middle, full"),
        ({"guidance": 0.5}, "options.guidance: must be a number from 1 to 20, got 0.5"),
        ({"guidance": "much"}, "options.guidance: must be a number from 1 to 20, got 'much'"),
        ({"sample_steps": 0}, "options.sample_steps: must be a whole number from 1 to 1000, got 0"),
        ({"unet_width": 20}, "options.unet_width: must be a multiple of 8, got 20"),
        ({"text_layers": True}, "options.text_layers: must be a whole number from 1 to 96, got True"),
        ({"text_encoder": "/nowhere"}, "options.text_encoder: /nowhere is not a folder"),
        ({"prompts": 3}, "options.prompts: must be texts with `;` between them, got 3"),
        ({"data": 3}, "options.data: must be the path of a folder, got 3"),
    ],
)
def test_bad_options_get_one_clear_line(options: dict[str, Scalar], message: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        SdKanji(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_imported_for_all_probes_starts_no_thread() -> None:
    """Nor does tokenising; a process with a second thread cannot be forked safely. BLAS is told to keep to one."""
    code = (
        "import importlib, pathlib, sys\nfrom workloads.sd_kanji.workload import SdKanji\n"
        "assert 'transformers' not in sys.modules, 'the workload alone imports lazily'\n"
        "for name in SdKanji.preload: importlib.import_module(name)\n"
        "from workloads.sd_kanji.tokens import PromptTokenizer\nfrom workloads.sd_kanji.presets import PRESETS\n"
        "PromptTokenizer(PRESETS['tiny'].sizes.tokens)(['mountain'] * 100)\n"
        "print(len(list(pathlib.Path('/proc/self/task').iterdir())),"
        " [n for n in ('torchvision', 'open_clip', 'optuna', 'sqlalchemy') if n in sys.modules])"
    )
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=True
    )
    assert said.stdout.split(maxsplit=1) == ["1", "[]\n"]
