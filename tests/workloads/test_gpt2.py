"""gpt2: its batches and losses, a model folder, quality figures, what it writes, and what it tells the tuner."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tuner.contract.base import Scalar, parse_json
from tuner.contract.config import CompileMode, LoaderConfig, OptimizerName, RunConfig, ScheduleKind
from tuner.contract.documents import load_document
from tuner.contract.errors import WorkloadError
from tuner.contract.study import StudyFile
from tuner.contract.workload import Batch, Split, Workload
from tuner.engine.compiling import refuse_illegal
from tuner.engine.failure import Unsupported
from tuner.engine.trainer import Trainer
from tuner.randomness import sample_seeds
from tuner.testing import WorkloadContract
from workloads.gpt2.metrics import auc, best_threshold, score
from workloads.gpt2.model import Classifier, Decoder, LanguageModel, Size, label_losses
from workloads.gpt2.workload import Gpt2

ROOT = Path(__file__).resolve().parents[2]
PREPARE = """
import sys
from pathlib import Path
from workloads.gpt2.workload import Gpt2
Gpt2({}).prepare(Path(sys.argv[1]), lambda *said: print(*said, flush=True))
"""


def quiet(done: int, total: int, text: str) -> None:
    """Progress nobody reads."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpt2")


def made(cache: Path, **options: Scalar) -> Gpt2:
    job = Gpt2(options)
    job.prepare(cache, quiet)
    return job


@pytest.fixture(scope="module")
def job(cache: Path) -> Gpt2:
    return made(cache)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's file: texts whose words say their labels, of which one is rarer than the other."""
    path = tmp_path_factory.mktemp("own") / "comments.jsonl"
    words = {(0, 0): "calm kind fair", (0, 1): "calm loud fair", (1, 0): "rude kind fair", (1, 1): "rude loud fair"}
    with path.open("w") as file:
        for number in range(240):
            insult, noise = int(number % 3 == 0), int(number % 2 == 0)
            text = f"{words[insult, noise]} {'and so on ' * (number % 7)}{number}"
            file.write(json.dumps({"comment_text": text, "insult": insult, "noise": noise}) + "\n")
    return path


@pytest.fixture(scope="module")
def own(cache: Path, table: Path) -> Gpt2:
    return made(cache, data=str(table))


@pytest.fixture(scope="module")
def language(cache: Path, table: Path) -> Gpt2:
    return made(cache, data=str(table), task="lm", max_tokens=16)


def batch_of(job: Gpt2, indices: range, split: Split = "train") -> dict[str, Tensor]:
    data = job.dataset(split)
    batch = job.collate([data[index] for index in indices])
    return {**batch, "sample_seed": sample_seeds(0, 0, torch.tensor(list(indices)))}


def all_batches(job: Gpt2, size: int) -> list[Batch]:
    count = len(job.dataset("valid"))
    return [batch_of(job, range(at, min(at + size, count)), "valid") for at in range(0, count, size)]


def seeded_model(job: Gpt2) -> nn.Module:
    torch.manual_seed(0)
    return job.model().eval()


# --- batches and losses ---------------------------------------------------------------------------------------------


def test_batches_are_padded_to_the_longest_in_steps_of_eight(job: Gpt2) -> None:
    batch = batch_of(job, range(5))
    longest = int(batch["lengths"].max())
    assert batch["ids"].shape == (5, min(64, -(-longest // 8) * 8))
    assert batch["ids"].dtype == torch.int64
    assert batch["labels"].shape == (5, 6)
    item = job.dataset("train")[3]
    assert torch.equal(batch["ids"][3, : len(item["ids"])], item["ids"].long())
    assert (batch["ids"][3, len(item["ids"]) :] == 0).all()


def test_fixed_padding_pads_to_all_tokens_and_leaves_the_order_alone(cache: Path, job: Gpt2) -> None:
    fixed = made(cache, padding="fixed")
    assert batch_of(fixed, range(5))["ids"].shape == (5, 64)
    assert fixed.lengths("train") is None
    assert job.lengths("train") == job.dataset("train").lengths
    assert batch_of(made(cache, pad_multiple=32), range(700, 732))["ids"].shape[1] in (32, 64)


def test_what_is_padded_changes_no_result(cache: Path, job: Gpt2) -> None:
    model, fixed = seeded_model(job), made(cache, padding="fixed")
    short = [index for index in range(200) if job.dataset("train").lengths[index] < 20][:6]
    few, many = (which.collate([which.dataset("train")[i] for i in short]) for which in (job, fixed))
    assert few["ids"].shape[1] < many["ids"].shape[1]
    with torch.no_grad():
        assert torch.allclose(job.predict(model, few), job.predict(model, many), atol=1e-6)
    odd = {**few, "ids": torch.where(few["ids"] == 0, 77, few["ids"])}
    assert torch.allclose(job.predict(model, odd), job.predict(model, few), atol=1e-6)


def test_bucketed_steps_waste_far_less_than_padding_to_all_tokens(job: Gpt2) -> None:
    trainer = Trainer(job, plain(job.info().baseline), device=torch.device("cpu"))
    groups = [trainer.source.next_group() for _ in range(32)]
    trainer.close()
    places = sum(batch["ids"].numel() for group in groups for batch in group.batches)
    tokens = sum(int(batch["lengths"].sum()) for group in groups for batch in group.batches)
    assert tokens / places > 0.85 > 0.7 > tokens / (32 * 32 * 64)
    assert groups[0].batches[0]["ids"].shape[1] == 64


def test_the_loss_does_not_grow_with_the_batch(job: Gpt2) -> None:
    """A sum without its weight would tie the gradient's size to the batch."""
    model = seeded_model(job)
    small, large = (job.loss(model, batch_of(job, range(size)))["bce"] for size in (8, 64))
    means = [float(term.sum.detach()) / float(term.weight) for term in (small, large)]
    assert means[0] == pytest.approx(means[1], rel=0.5)


def test_a_rare_label_weighs_more_and_the_weight_is_bounded(job: Gpt2) -> None:
    model = seeded_model(job)
    assert isinstance(model, Classifier)
    share = job.tokens.train.labels.mean(dim=0)
    assert torch.allclose(model.positive_weight, (1 - share) / share, rtol=1e-3)
    one = label_losses(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([3.0, 3.0]))
    assert float(one) == pytest.approx(2 * math.log(2))


def test_the_language_model_predicts_every_token_exactly_once(language: Gpt2) -> None:
    data, texts = language.dataset("train"), language.tokens.train
    assert max(data.lengths) <= 16
    assert min(data.lengths) >= min(8, int(texts.counts.min()) + 2)  # no piece is a mere leftover
    targets = [data[index]["ids"][1:] for index in range(len(data))]
    assert torch.equal(torch.cat(targets), texts.ids[1:])
    assert len(data) > len(texts.counts)
    batch = batch_of(language, range(9))
    assert language.weights(batch) == {"nll": float(sum(data.lengths[:9]) - 9)}


def test_a_language_models_loss_is_what_plain_arithmetic_gives(language: Gpt2) -> None:
    model, batch = seeded_model(language), batch_of(language, range(3))
    with torch.no_grad():
        term = language.loss(model, batch)["nll"]
        logs = model(batch["ids"]).log_softmax(dim=-1)
    by_hand = sum(
        -float(logs[row, place, batch["ids"][row, place + 1]])
        for row in range(3)
        for place in range(int(batch["lengths"][row]) - 1)
    )
    assert float(term.sum) == pytest.approx(by_hand, rel=1e-5)


def test_checkpointed_blocks_give_the_same_gradients(job: Gpt2) -> None:
    from torch.utils.checkpoint import checkpoint

    model, batch = seeded_model(job), batch_of(job, range(4))
    parameters = list(model.parameters())
    plain_gradients = torch.autograd.grad(job.loss(model, batch)["bce"].sum, parameters)
    for block in job.checkpoint_blocks(model):
        block.forward = lambda *args, _own=block.forward, **kw: checkpoint(_own, *args, use_reentrant=False, **kw)
    again = torch.autograd.grad(job.loss(model, batch)["bce"].sum, parameters)
    assert len(job.checkpoint_blocks(model)) == 2
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(plain_gradients, again, strict=True))


def test_reduce_overhead_with_checkpointing_is_refused_and_not_tried(job: Gpt2) -> None:
    config = job.info().baseline.model_copy(
        update={"compile": CompileMode.REDUCE_OVERHEAD, "gradient_checkpointing": True}
    )
    with pytest.raises(Unsupported):
        refuse_illegal(config, torch.device("cpu"))


class TestContract(WorkloadContract):
    """The suite every workload must pass, in this process and in real workers."""

    workload = "gpt2"

    @pytest.fixture(scope="class")
    @classmethod
    def cache_dir(cls, job: Gpt2, cache: Path) -> Path:
        """What `job` has prepared is found here."""
        return cache


def test_accumulation_changes_no_gradient_of_the_language_model(language: Gpt2) -> None:
    """Its micro-batches weigh by their tokens, which differ."""
    found = []
    for micro, accumulation in ((8, 2), (16, 1)):
        config = plain(language.info().baseline).model_copy(
            update={"micro_batch_size": micro, "accumulation_steps": accumulation}
        )
        trainer = Trainer(language, config, device=torch.device("cpu"))
        trainer.model.eval()  # no dropout
        found.append(torch.cat([value.flatten() for value in trainer.gradients().values()]).double())
        trainer.close()
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-5


# --- preparing ------------------------------------------------------------------------------------------------------


def test_a_second_preparation_finds_everything(job: Gpt2, cache: Path) -> None:
    told: list[str] = []
    again = Gpt2({})
    began = time.perf_counter()
    again.prepare(cache, lambda done, total, text: told.append(text))
    assert time.perf_counter() - began < 5
    assert told == []
    assert torch.equal(again.dataset("valid")[3]["ids"], job.dataset("valid")[3]["ids"])


def test_a_killed_preparation_leaves_nothing_that_is_believed(tmp_path: Path) -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None
    for line in killed.stdout:
        if "reading docstrings" in line:
            break
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.stdout.close()
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert [path.name[:9] for path in (tmp_path / "gpt2").iterdir()] == [".partial-"]


def test_imports_and_preparing_start_no_thread(table: Path, tmp_path: Path) -> None:
    """A process with a second thread cannot be forked safely. BLAS and OpenMP are told to keep to one."""
    code = (
        "import importlib, pathlib, sys\nfrom workloads.gpt2.workload import Gpt2\n"
        "for name in Gpt2.preload: importlib.import_module(name)\n"
        "count = lambda: len(list(pathlib.Path('/proc/self/task').iterdir()))\nbefore = count()\n"
        f"Gpt2({{'data': {str(table)!r}}}).prepare(pathlib.Path({str(tmp_path)!r}), lambda *said: None)\n"
        "print(before, count(), [n for n in ('torchvision', 'optuna', 'sqlalchemy') if n in sys.modules])"
    )
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=True
    )
    assert said.stdout == "1 1 []\n"


# --- learning, on a user's own table --------------------------------------------------------------------------------


def plain(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"loader": LoaderConfig(num_workers=0), "threads": 1})


def trained(job: Gpt2, steps: int) -> nn.Module:
    config = plain(job.info().baseline)
    schedule = config.schedule.model_copy(update={"warmup_samples": 64})
    trainer = Trainer(job, config.model_copy(update={"schedule": schedule}), device=torch.device("cpu"))
    for _ in range(steps):
        trainer.step()
    trainer.close()
    return trainer.model.eval()


def test_a_users_own_table_is_learnt(own: Gpt2, tmp_path: Path) -> None:
    model = trained(own, 60)
    found, trivial = own.evaluate(model, all_batches(own, 16)), own.trivial()
    assert found["macro_auc"] > 0.9 > trivial["macro_auc"].value == 0.5
    assert found["macro_f1"] > trivial["macro_f1"].value + 0.1
    assert found["loss"] < trivial["loss"].value
    assert {"threshold_insult", "threshold_noise"} <= found.keys()
    assert all(0 < found[f"threshold_{name}"] < 1 for name in ("insult", "noise"))
    assessed = own.assess(model, tmp_path, 0)
    assert assessed["auc_insult"] + assessed["auc_noise"] == pytest.approx(2 * found["macro_auc"])
    with (tmp_path / "labels.csv").open() as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert float(rows["insult"]["threshold"]) == pytest.approx(found["threshold_insult"], abs=1e-4)
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")
    (written,) = own.sample(model, tmp_path, 1)
    text = written.read_text()
    assert text.count("true      :") == 12
    assert "fair" in text


def test_a_language_model_learns_and_goes_on_where_a_text_ends(language: Gpt2, tmp_path: Path) -> None:
    model = trained(language, 40)
    found, trivial = language.evaluate(model, all_batches(language, 16)), language.trivial()
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name] < trivial[name].value
        assert not trivial[name].higher_is_better
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    first, same, other = (
        language.sample(model, tmp_path / name, seed)[0] for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.read_text() == same.read_text() != other.read_text()
    assert first.read_text().count(" >>> ") == 12
    assert 0 < language.assess(model, tmp_path, 0)["distinct_pairs"] <= 1


def test_bits_are_counted_by_the_texts_own_bytes(language: Gpt2) -> None:
    counts = language.tokens.byte_counts(2048)
    tokens = language.tokens.valid.ids
    text = "".join(language.tokens.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True))
    assert int(counts[tokens.long()].sum()) == len(text.encode())


def test_evaluation_does_not_hang_on_how_validation_is_cut(job: Gpt2) -> None:
    model = seeded_model(job)
    whole, cut = (job.evaluate(model, all_batches(job, size)) for size in (64, 37))
    assert whole == pytest.approx(cut, rel=1e-4)
    part = job.evaluate(model, itertools.islice(all_batches(job, 4), 1))
    assert all(math.isfinite(value) for value in part.values())


# --- a model folder -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, own: Gpt2) -> Path:
    """A small GPT-2 as `save_pretrained` writes it, with its language-model head, and a tokeniser."""
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    path = tmp_path_factory.mktemp("gpt2-small")
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=2048, n_positions=96, n_embd=64, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(path)
    own.tokens.tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_a_model_folder_brings_weights_shape_and_tokeniser(cache: Path, table: Path, folder: Path) -> None:
    from safetensors.torch import load_file

    job = made(cache, data=str(table), pretrained=str(folder), trained_blocks=1)
    model = job.model()
    assert isinstance(model, Decoder)
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(model.trunk.h[2].mlp.c_fc.weight, saved["transformer.h.2.mlp.c_fc.weight"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {"trunk.wte.weight", "trunk.wpe.weight", "trunk.h.0.ln_1.weight", "trunk.h.1.ln_1.weight"} <= frozen
    assert not {name for name in frozen if name.startswith(("trunk.h.2", "trunk.ln_f", "head"))}
    assert len(job.checkpoint_blocks(model)) == 1
    after = trained(job, 6)
    assert isinstance(after, Decoder)
    assert torch.equal(after.trunk.h[1].mlp.c_fc.weight, saved["transformer.h.1.mlp.c_fc.weight"])
    assert not torch.equal(after.trunk.h[2].mlp.c_fc.weight, saved["transformer.h.2.mlp.c_fc.weight"])


def test_the_outputs_of_a_model_folder_are_those_of_its_maker(cache: Path, table: Path, folder: Path) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    job = made(cache, data=str(table), pretrained=str(folder), task="lm", max_tokens=32)
    batch = batch_of(job, range(1))
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.allclose(job.model().eval()(batch["ids"]), theirs(batch["ids"]).logits, atol=1e-5)


def test_a_vocabulary_and_merges_make_the_same_tokeniser(
    cache: Path, table: Path, folder: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    whole = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(whole["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in whole["merges"]))
    first, second = (made(cache, data=str(table), pretrained=str(path)) for path in (folder, tmp_path))
    assert torch.equal(first.tokens.train.ids, second.tokens.train.ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.safetensors", "model.safetensors does not exist; give the folder of a GPT-2"),
        ("tokenizer.json", "has neither tokenizer.json nor vocab.json with merges.txt"),
        ("n_layer", "is no GPT-2's: KeyError 'n_layer'"),
        ("vocab_size", "its tokeniser has"),
        ("n_embd", "weights are missing or of another shape, first wte.weight"),
    ],
)
def test_a_model_folder_that_does_not_fit(
    cache: Path, table: Path, folder: Path, tmp_path: Path, change: str, message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json"):
        if name != change:
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    if change == "n_layer":
        del config[change]
    elif change in config:
        config[change] //= 16 if change == "vocab_size" else 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WorkloadError) as caught:
        made(cache, data=str(table), pretrained=str(tmp_path)).model()
    assert message in str(caught.value)


# --- quality figures ------------------------------------------------------------------------------------------------


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    draw = np.random.default_rng(0)
    said, truth = np.round(draw.random(60), 1), (draw.random(60) < 0.3).astype(np.float64)
    pairs = [(a > b) + 0.5 * (a == b) for a in said[truth > 0] for b in said[truth == 0]]
    assert auc(said, truth) == pytest.approx(np.mean(pairs))
    assert math.isnan(auc(said, np.zeros(60)))


def test_the_best_threshold_is_the_best_of_all() -> None:
    draw = np.random.default_rng(1)
    said, truth = np.round(draw.random(80), 2), (draw.random(80) < 0.3).astype(np.float64)

    def f1_of(bound: float) -> float:
        hits = float((truth * (said >= bound)).sum())
        return 2 * hits / float((said >= bound).sum() + truth.sum())

    assert f1_of(best_threshold(said, truth)) == pytest.approx(max(f1_of(bound / 200) for bound in range(200)))


def test_thresholds_do_not_flatter_noise() -> None:
    """The F1 of a threshold chosen on the rows it is judged on would be higher than any honest one."""
    draw = np.random.default_rng(2)
    said, truth = draw.random((40, 400)), (draw.random((40, 400)) < 0.5).astype(np.float64)
    scores = score(said, truth, np.arange(40) % 2)
    flattered = [best_threshold(said[:, i], truth[:, i]) for i in range(400)]
    hits = ((said >= flattered) & (truth > 0)).sum(axis=0)
    overfitted = float((2 * hits / ((said >= flattered).sum(axis=0) + truth.sum(axis=0))).mean())
    assert float(scores.f1.mean()) < overfitted - 0.02
    assert scores.macro_auc == pytest.approx(0.5, abs=0.02)


def test_always_yes_is_the_trivial_f1(job: Gpt2) -> None:
    labels = job.tokens.valid.labels.double()
    always = [2 * float(column.sum()) / (float(column.sum()) + len(column)) for column in labels.T]
    assert job.trivial()["macro_f1"].value == pytest.approx(sum(always) / 6)


# --- what the tuner is told -----------------------------------------------------------------------------------------


def test_the_sizes_are_those_of_the_description() -> None:
    """GPT-2 small has 124,439,808 parameters; the head of six labels adds 768 x 6 + 6."""
    with torch.device("meta"):
        own_words = Classifier(Size(12, 768, 12, 50_257, 1024, trained_blocks=8), torch.ones(6))
        full = Classifier(Size(12, 768, 12, 8192, 1024), torch.ones(6))
        tiny = Classifier(Size(2, 128, 2, 2048, 64), torch.ones(6))
        language = LanguageModel(Size(12, 768, 12, 50_257, 1024))
    counts = [sum(p.numel() for p in model.parameters()) for model in (own_words, full, tiny, language)]
    assert counts == [124_439_808 + 4_614, 92_138_502, 667_910, 124_439_808]
    assert sum(p.numel() for p in own_words.parameters() if p.requires_grad) == 8 * 7_087_872 + 1_536 + 4_614
    text = sys.modules[Gpt2.__module__].__doc__ or ""
    for count in counts[:3]:
        assert f"{count:,}" in text


def test_full_is_built_on_the_meta_device(cache: Path, table: Path) -> None:
    job = made(cache, data=str(table), preset="full")
    with torch.device("meta"):
        model = job.model()
    assert sum(p.numel() for p in model.parameters()) == 92_138_502 - 4 * 769
    groups = job.param_groups(model)
    assert [group.get("lr_scale", 1.0) for group in groups] == [1.0, 20.0]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_baseline_is_the_guides() -> None:
    baseline = Gpt2({"preset": "full"}).info().baseline
    assert parse_json(RunConfig, baseline.to_json()) == baseline
    assert baseline.batch_label == "32x1"
    assert (baseline.loader.num_workers, baseline.loader.prefetch_factor) == (4, 2)
    assert (baseline.optimizer.name, baseline.optimizer.lr) == (OptimizerName.ADAMW, 1e-4)
    assert Gpt2({"task": "lm"}).info().baseline.optimizer.lr == 6e-4
    assert baseline.schedule.kind is ScheduleKind.LINEAR
    assert baseline.schedule.warmup_samples > 0
    assert baseline.max_grad_norm == 1.0
    assert "rehearsal" in Gpt2({}).info().preset_note
    assert "pretrained" in Gpt2({"preset": "full"}).info().preset_note
    assert isinstance(Gpt2({}), Workload)


@pytest.mark.parametrize("preset", ["tiny", "full"])
def test_the_heads_rate_is_the_guides(cache: Path, table: Path, preset: str) -> None:
    job = made(cache, data=str(table), preset=preset)
    with torch.device("meta"):
        head = job.param_groups(job.model())[1]
    assert job.info().baseline.optimizer.lr * head["lr_scale"] == pytest.approx(2e-3)


def test_the_study_file_is_valid_and_keeps_the_baseline() -> None:
    text = (ROOT / "studies" / "gpt2" / "study.yaml").read_text()
    study = load_document(StudyFile, text, "study.yaml")
    baseline = Gpt2({}).info().baseline
    assert study.workload == "gpt2"
    assert set(study.presets) == {"tiny", "full"}
    assert study.baseline["micro_batch_size"] == baseline.micro_batch_size
    assert study.baseline["loader"]["num_workers"] == baseline.loader.num_workers
    assert [tier.baseline["micro_batch_size"] * tier.baseline["accumulation_steps"] for tier in study.tiers] == [32] * 3
    assert {32, 64, 128} <= {*study.space.micro_batch_size, *study.space.effective_batch_size}
    assert CompileMode.REDUCE_OVERHEAD in study.space.compile
    assert (study.targets.gpu_utilisation_min, study.targets.speedup_min) == (0.9, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "options.preset: unknown value 'huge'; known: tiny, full"),
        ({"task": "translate"}, "options.task: unknown value 'translate'; known: classify, lm"),
        ({"padding": "none"}, "options.padding: unknown value 'none'; known: bucket, fixed"),
        ({"max_tokens": 4}, "options.max_tokens: must be a whole number from 8 to 1024, got 4"),
        ({"width": 100}, "options.width: must be a multiple of 64"),
        ({"trained_blocks": 3}, "options.trained_blocks: must be a whole number from 0 to 2, got 3"),
        ({"data": 3}, "options.data: must be a text, got 3"),
        ({"text_column": "x"}, "options.text_column and label_columns are for a table of your own"),
        ({"pretrained": "nowhere"}, "options.pretrained: nowhere/config.json does not exist"),
    ],
)
def test_bad_options_get_one_clear_line(options: dict[str, Scalar], message: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        Gpt2(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
