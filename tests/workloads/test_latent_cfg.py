"""latent_cfg: the loss, sampling, judging on the default data, and what it tells the tuner."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tuner.contract.base import Scalar, parse_json
from tuner.contract.config import LossBands, QualityConfig, RunConfig
from tuner.contract.documents import load_document
from tuner.contract.errors import WorkloadError
from tuner.contract.study import StudyFile
from tuner.contract.workload import Batch, Workload
from tuner.randomness import sample_seeds
from tuner.search.points import lr_rule
from tuner.testing import WorkloadContract
from workloads.latent_cfg.model import Denoiser, alpha_bar, dropped, min_snr_weight, per_sample_loss, sample_latents
from workloads.latent_cfg.workload import LatentCfg

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, Scalar] = {"vae_steps": 4}


def quiet(done: int, total: int, text: str) -> None:
    """Progress nobody reads."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latent_cfg")


@pytest.fixture(scope="module")
def job(cache: Path) -> LatentCfg:
    made = LatentCfg(OPTIONS)
    made.prepare(cache, quiet)
    return made


def batch_of(job: LatentCfg, indices: Tensor, split: str = "train") -> dict[str, Tensor]:
    items = job.dataset("train" if split == "train" else "valid")
    made = job.collate([items[int(index)] for index in indices])
    return {**made, "sample_seed": sample_seeds(0, 0, indices)}


def seeded_model(job: LatentCfg) -> nn.Module:
    torch.manual_seed(0)
    return job.model()


# --- preparing ------------------------------------------------------------------------------------------------------


def test_latents_are_standardised_and_typed(job: LatentCfg) -> None:
    train = job.dataset("train")
    batch = batch_of(job, torch.arange(1350))
    assert batch["latent"].shape == (1350, 4, 8, 8)
    assert batch["latent"].dtype == torch.float32
    assert float(batch["latent"].std()) == pytest.approx(1.0, abs=0.01)
    assert batch["label"].dtype == torch.int64
    assert torch.equal(train[7]["latent"], train[7]["latent"])


def test_the_codec_restores_far_better_than_the_mean_picture(job: LatentCfg) -> None:
    assert job._cache is not None
    assert job._cache.vae_quality()["r2"] > 0.7


def test_a_second_preparation_finds_everything(job: LatentCfg, cache: Path) -> None:
    told: list[str] = []
    again = LatentCfg(OPTIONS)
    before = sorted((file, file.stat().st_mtime_ns) for file in cache.rglob("*"))
    again.prepare(cache, lambda done, total, text: told.append(text))
    assert told == []
    assert sorted((file, file.stat().st_mtime_ns) for file in cache.rglob("*")) == before
    assert torch.equal(again.dataset("valid")[3]["latent"], job.dataset("valid")[3]["latent"])


# --- loss -----------------------------------------------------------------------------------------------------------


def test_two_halves_sum_to_the_whole_and_so_do_their_gradients(job: LatentCfg) -> None:
    model = seeded_model(job).double()
    batch = {
        key: value.double() if key == "latent" else value for key, value in batch_of(job, torch.arange(16)).items()
    }
    whole = job.loss(model, batch)["v"]
    halves = [job.loss(model, _part(batch, part))["v"] for part in (slice(0, 8), slice(8, 16))]
    assert sum(float(half.weight) for half in halves) == whole.weight == 16
    assert (halves[0].sum + halves[1].sum).item() == pytest.approx(whole.sum.item(), rel=1e-6)
    parameters = list(model.parameters())
    one = torch.cat([part.flatten() for part in torch.autograd.grad(whole.sum, parameters)])
    two = torch.cat([part.flatten() for part in torch.autograd.grad(halves[0].sum + halves[1].sum, parameters)])
    assert float((one - two).norm() / one.norm()) < 1e-5


def _part(batch: Batch, part: slice) -> dict[str, Tensor]:
    return {key: value[part] for key, value in batch.items()}


def test_half_of_the_conditions_are_dropped_sample_by_sample() -> None:
    seeds = sample_seeds(3, 0, torch.arange(20_000))
    gone = dropped(seeds)
    assert float(gone.float().mean()) == pytest.approx(0.5, abs=0.02)
    order = torch.randperm(20_000)
    assert torch.equal(dropped(seeds[order]), gone[order])


def test_a_dropped_condition_hides_the_label(job: LatentCfg) -> None:
    model = seeded_model(job)
    batch = batch_of(job, torch.arange(16))
    other = {**batch, "label": (batch["label"] + 1) % 10}
    gone = dropped(batch["sample_seed"])
    assert 0 < int(gone.sum()) < 16
    with torch.no_grad():
        one, two = (
            per_sample_loss(model, which["latent"], which["label"], which["sample_seed"], 10)
            for which in (batch, other)
        )
    assert torch.equal(one == two, gone)


def test_the_schedule_and_its_weights() -> None:
    signal = alpha_bar(torch.arange(1000))
    assert (signal[1:] < signal[:-1]).all()
    assert float(signal[0]) == pytest.approx(1.0, abs=1e-3)
    assert 0 < float(signal[-1]) < 1e-6
    weight = min_snr_weight(torch.tensor([0.5, 5 / 6, 0.99]))
    assert weight.tolist() == pytest.approx([0.5, 5 / 6, 0.05], rel=1e-4)


def test_checkpointed_blocks_give_the_same_gradients(job: LatentCfg) -> None:
    from torch.utils.checkpoint import checkpoint

    model, batch = seeded_model(job), batch_of(job, torch.arange(4))
    parameters = list(model.parameters())
    plain = torch.autograd.grad(job.loss(model, batch)["v"].sum, parameters)
    for block in job.checkpoint_blocks(model):
        block.forward = lambda *args, _own=block.forward, **kw: checkpoint(_own, *args, use_reentrant=False, **kw)
    again = torch.autograd.grad(job.loss(model, batch)["v"].sum, parameters)
    assert len(job.checkpoint_blocks(model)) == 7
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(plain, again, strict=True))


def test_evaluation_is_repeatable_and_does_not_hang_on_batches(job: LatentCfg) -> None:
    model = seeded_model(job)
    whole = job.evaluate(model, [batch_of(job, torch.arange(24), "valid")])
    cut = job.evaluate(model, [batch_of(job, torch.arange(at, at + 8), "valid") for at in (0, 8, 16)])
    assert whole["loss"] == pytest.approx(cut["loss"], rel=1e-5)
    assert 0.2 < whole["loss"] < 1.0


# --- sampling -------------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Knows its data: independent Gaussians of mean 0.5 and deviation 2, of which the best v is a linear function."""

    def forward(self, noisy: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        signal = alpha_bar(timestep).view(-1, 1, 1, 1)
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        clean = 0.5 + 4 * alpha / (4 * signal + 1 - signal) * (noisy - 0.5 * alpha)
        return alpha * (noisy - alpha * clean) / sigma - sigma * clean


def test_samples_of_a_perfect_model_have_the_spread_of_the_data() -> None:
    labels = torch.zeros(64, dtype=torch.int64)
    made = sample_latents(
        Oracle(), labels, torch.arange(64), size=8, null_class=1, steps=100, guidance=3.0, bound=100.0
    )
    assert float(made.mean()) == pytest.approx(0.5, abs=0.1)
    assert float(made.std()) == pytest.approx(2.0, rel=0.05)


def test_after_a_short_training_samples_have_about_the_spread_of_the_latents(job: LatentCfg) -> None:
    model = seeded_model(job)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        batch = batch_of(job, torch.randint(1350, (16,), generator=torch.Generator().manual_seed(step)))
        term = job.loss(model, {**batch, "sample_seed": batch["sample_seed"] + step})["v"]
        optimizer.zero_grad()
        (term.sum / term.weight).backward()
        optimizer.step()
        losses.append(term.sum.item() / 16)
    assert sum(losses[-20:]) / 20 < 0.8 * sum(losses[:5]) / 5
    labels = torch.arange(10).repeat(4)
    made = sample_latents(model, labels, torch.arange(40), size=8, null_class=10, steps=20, guidance=1.0, bound=8.0)
    assert 0.7 < float(made.std()) < 1.4
    assert float(made.abs().max()) > 2.0


def test_the_grid_is_one_picture_and_the_seed_decides_it(job: LatentCfg, tmp_path: Path) -> None:
    quick = LatentCfg({**OPTIONS, "sample_steps": 2})
    quick._cache, quick._latents = job._cache, job._latents
    model = seeded_model(job)
    contents = [quick.sample(model, tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, same, other = (path.read_bytes() for (path,) in contents)
    assert first == same != other
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["sample-1.png"]
    with Image.open(tmp_path / "a" / "sample-1.png") as grid:
        assert grid.size == (5 * 66 - 2 + 16, 10 * 66 - 2)


# --- judging --------------------------------------------------------------------------------------------------------


def test_an_untrained_model_is_judged_no_better_than_chance(job: LatentCfg, tmp_path: Path) -> None:
    """Each sample is compared with all training pictures, and the pictures and tables are written."""
    quick = LatentCfg({**OPTIONS, "sample_steps": 2})
    quick._cache, quick._latents = job._cache, job._latents
    model = seeded_model(job)
    figures = quick.assess(model, tmp_path, 5)
    trivial = quick.trivial()
    assert trivial["class_match"].value == pytest.approx(0.1)
    assert figures["class_match"] < 0.3
    assert figures["class_match_real"] > 0.4, "the judge tells people apart on recordings it has not seen"
    assert figures["memorised_share"] == 0.0
    assert quick.assess(model, tmp_path / "again", 5) == figures
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {
        "classes-5.csv",
        "classes-5.png",
        "nearest-5.csv",
        "nearest-5.png",
    }
    with (tmp_path / "classes-5.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"person_{number:02d}" for number in range(1, 11)]
    matched = sum(int(row["matched"]) for row in rows) / sum(int(row["samples"]) for row in rows)
    assert matched == pytest.approx(figures["class_match"])
    assert (tmp_path / "nearest-5.csv").read_text().count("\n") == 81


def test_the_trivial_loss_is_that_of_predicting_nothing(job: LatentCfg) -> None:
    """Of a schedule and of latents with deviation 1 alone: the mean weight over all timesteps."""
    weights = min_snr_weight(alpha_bar(torch.arange(1000)))
    assert job.trivial()["loss"].value == pytest.approx(float(weights.mean()), rel=0.1)
    assert not job.trivial()["loss"].higher_is_better


def test_prediction_is_one_guided_denoising(job: LatentCfg) -> None:
    model, batch = seeded_model(job), batch_of(job, torch.arange(4))
    predicted = job.predict(model, batch)
    assert predicted.shape == (4, 4, 8, 8)
    assert not predicted.requires_grad
    other = job.predict(model, {**batch, "label": (batch["label"] + 1) % 10})
    assert not torch.equal(predicted, other)


class TestContract(WorkloadContract):
    """The suite every workload must pass, in this process and in real workers."""

    workload = "latent_cfg"
    options = OPTIONS

    @pytest.fixture(scope="class")
    @classmethod
    def cache_dir(cls, job: LatentCfg, cache: Path) -> Path:
        """What `job` has prepared is found here."""
        return cache


# --- what the tuner is told -----------------------------------------------------------------------------------------


def test_the_sizes_are_those_of_the_description() -> None:
    with torch.device("meta"):
        full, tiny = Denoiser(48, 32, 10), Denoiser(16, 8, 10)
    assert sum(parameter.numel() for parameter in full.parameters()) == 6_261_556
    assert sum(parameter.numel() for parameter in tiny.parameters()) == 701_204
    with torch.device("meta"):
        guides = Denoiser(48, 32, 31)
    assert sum(parameter.numel() for parameter in guides.parameters()) == 6_265_588, "31 people, as in the guide"
    text = sys.modules[LatentCfg.__module__].__doc__ or ""
    assert "6,261,556" in text
    assert "6,265,588" in text
    assert "701,204" in text


def test_the_baseline_is_the_guides() -> None:
    info = LatentCfg({"preset": "full"}).info()
    baseline = info.baseline
    assert parse_json(RunConfig, baseline.to_json()) == baseline
    assert (baseline.batch_label, baseline.effective_batch_size) == ("8x2", 16)
    assert baseline.horizon_samples == 150_000 * 16
    assert baseline.cadence.checkpoint_samples == baseline.cadence.sample_samples == 2_000 * 16
    assert baseline.cadence.log_samples == 1_000 * 16, "the guide's bands are per 1,000 steps"
    assert baseline.loss_bands == LossBands(normal_low=0.001, normal_high=0.1, warn_low=1e-4, warn_high=1.0)
    assert baseline.quality == QualityConfig(metric="loss", higher_is_better=False)
    assert baseline.ema is not None
    assert 0.5 ** (16 / baseline.ema.half_life_samples) == pytest.approx(0.9995, rel=1e-6)
    assert "rehearsal" in LatentCfg({}).info().preset_note
    assert isinstance(LatentCfg({}), Workload)


def test_the_study_file_is_valid_and_keeps_the_baseline() -> None:
    text = (ROOT / "studies" / "latent_cfg" / "study.yaml").read_text()
    study = load_document(StudyFile, text, "study.yaml")
    assert study.workload == "latent_cfg"
    assert set(study.presets) == {"tiny", "full"}
    baseline = LatentCfg({}).info().baseline.model_dump(mode="json")
    assert study.baseline["micro_batch_size"] == baseline["micro_batch_size"]
    assert study.baseline["optimizer"]["lr"] == baseline["optimizer"]["lr"]


def test_the_model_size_example_in_the_study_file_holds() -> None:
    """As a user would: take the comment signs away before `options:` and `quality:`."""
    text = (ROOT / "studies" / "latent_cfg" / "study.yaml").read_text()
    assert not load_document(StudyFile, text, "study.yaml").space.options, "the model is never changed silently"
    shown = text.replace("  # options: {dim", "  options: {dim").replace("# quality: {metric", "quality: {metric")
    study = load_document(StudyFile, shown, "study.yaml")
    assert study.space.options == {"dim": (32, 48)}
    assert study.quality is not None
    assert study.quality.metric == "loss"
    for dim in (32, 48):
        assert LatentCfg({"preset": "full", "dim": dim}).info().baseline.options["dim"] == dim


def test_32x1_gets_the_guides_lr() -> None:
    baseline = LatentCfg({"preset": "full"}).info().baseline.optimizer
    assert lr_rule(baseline, 2.0) == pytest.approx(1.4e-4, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre": "tiny"}, "options.pre: latent_cfg does not know it; known: preset, data, dim"),
        ({"preset": "huge"}, "options.preset: unknown value 'huge'; known: tiny, full"),
        ({"dim": 24}, "options.dim: must be a multiple of 16"),
        ({"dim": "48"}, "options.dim: must be a whole number from 16 to 512, got '48'"),
        ({"vae_steps": -1}, "options.vae_steps: must be a whole number from 0"),
        ({"guidance": "much"}, "options.guidance: must be a number"),
        ({"data": 3}, "options.data: must be the path of a folder or a file, got 3"),
    ],
)
def test_bad_options_get_one_clear_line(options: dict[str, str | int], message: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        LatentCfg(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_imported_for_all_probes_starts_no_thread() -> None:
    """A process with a second thread cannot be forked safely. BLAS is told to keep to one, as the tuner does."""
    code = (
        "import importlib, pathlib\nfrom workloads.latent_cfg.workload import LatentCfg\n"
        "for name in LatentCfg.preload: importlib.import_module(name)\n"
        "import sys\nprint(len(list(pathlib.Path('/proc/self/task').iterdir())),"
        " [n for n in ('torchvision', 'optuna', 'sqlalchemy') if n in sys.modules])"
    )
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=True
    )
    assert said.stdout.split(maxsplit=1) == ["1", "[]\n"]
