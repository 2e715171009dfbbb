"""graph: attention and its reference, masking, loss, what is measured, and what it tells the tuner."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tuner.contract.base import Scalar, parse_json
from tuner.contract.config import RunConfig
from tuner.contract.documents import load_document
from tuner.contract.errors import WorkloadError
from tuner.contract.study import StudyFile
from tuner.contract.workload import Workload
from tuner.prepared import entries
from tuner.randomness import sample_seeds
from tuner.testing import WorkloadContract
from workloads.graph import workload as described
from workloads.graph.attention import BandAttention, EdgeAttention, band_mask, edge_index
from workloads.graph.masking import draw_hidden, fixed_hidden, hidden_count, measure_need
from workloads.graph.model import GraphNet, Sizes
from workloads.graph.workload import Graph

ROOT = Path(__file__).resolve().parents[2]
TIERS = {  # the guide's sizes: parameters with 6 and with 32 channels, 7 classes
    (32, 1, 1, 1, 1): (10_143, 14_247),
    (64, 2, 2, 1, 2): (45_471, 51_527),
    (128, 3, 3, 2, 4): (339_359, 359_431),
}


def quiet(done: int, total: int, text: str) -> None:
    """Progress nobody reads."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graph")


@pytest.fixture(scope="module")
def job(cache: Path) -> Graph:
    made = Graph({})
    made.prepare(cache, quiet)
    return made


def batch_of(job: Graph, indices: Tensor, split: str = "train") -> dict[str, Tensor]:
    items = job.dataset("train" if split == "train" else "valid")
    made = job.collate([items[int(index)] for index in indices])
    return {**made, "sample_seed": sample_seeds(0, 0, indices)}


def seeded_model(job: Graph) -> nn.Module:
    torch.manual_seed(0)
    return job.model()


class TestContract(WorkloadContract):
    """The suite every workload must pass, in this process and in real workers."""

    workload = "graph"

    @pytest.fixture(scope="class")
    @classmethod
    def cache_dir(cls, job: Graph, cache: Path) -> Path:
        """What `job` has prepared is found here."""
        return cache


# --- the graph ------------------------------------------------------------------------------------------------------


def test_edges_join_neighbours_in_time_and_each_node_with_itself() -> None:
    made = {(int(source), int(target)) for source, target in edge_index(9, 2).T}
    assert made == {(i, j) for i in range(9) for j in range(9) if abs(i - j) <= 2}
    assert int(band_mask(9, 2).sum()) == len(made) == edge_index(9, 2).shape[1]


@pytest.mark.parametrize(("steps", "time_k"), [(5, 1), (12, 3), (64, 3), (7, 6)])
def test_banded_attention_equals_going_edge_by_edge(steps: int, time_k: int) -> None:
    drawn = torch.Generator().manual_seed(steps)
    values, source, target = (
        torch.randn(3, steps, 2, *width, generator=drawn).requires_grad_() for width in ((8,), (), ())
    )
    ways = BandAttention(band_mask(steps, time_k)), EdgeAttention(edge_index(steps, time_k))
    banded, by_edge = (way(values, source, target) for way in ways)
    assert float((banded - by_edge).detach().abs().max()) < 1e-6
    gradients = [torch.autograd.grad(out.square().sum(), (values, source, target)) for out in (banded, by_edge)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["band", "edges"])
def test_shares_of_each_target_node_sum_to_one(kind: str) -> None:
    """The original took the softmax over all edges of the graph, so that a node got a share that shrank with T."""
    steps = 40
    way = BandAttention(band_mask(steps, 2)) if kind == "band" else EdgeAttention(edge_index(steps, 2))
    scores = torch.randn(2, 1, steps, 1, generator=torch.Generator().manual_seed(1)) * 5
    got = way(torch.ones(1, steps, 1, 4), scores[0], scores[1])
    assert torch.allclose(got, torch.ones_like(got), atol=1e-6)


def test_a_node_sees_its_neighbours_and_nothing_else() -> None:
    way = BandAttention(band_mask(20, 2))
    values = torch.zeros(1, 20, 1, 1)
    values[0, 10] = 1.0
    reached = way(values, torch.zeros(1, 20, 1), torch.zeros(1, 20, 1))[0, :, 0, 0]
    assert reached.nonzero()[:, 0].tolist() == [8, 9, 10, 11, 12]
    assert reached[10] == pytest.approx(1 / 5)


def test_the_whole_model_is_the_same_edge_by_edge(job: Graph) -> None:
    model, batch = seeded_model(job).eval(), batch_of(job, torch.arange(4))
    hidden = fixed_hidden(batch["index"], 6)
    other = GraphNet(Sizes(32, 1, 1, 1, 2), 6, 7, 64, EdgeAttention(edge_index(64, 3))).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for one, two in zip(model(batch["x"], hidden), other(batch["x"], hidden), strict=True):
            assert float((one - two).norm() / one.norm()) < 1e-6


# --- preparing ------------------------------------------------------------------------------------------------------


def test_the_graphs_key_is_window_size_and_time_k_alone(tmp_path: Path) -> None:
    for options in ({}, {"hidden_channels": 16}, {"time_k": 5}, {"window_size": 32}, {"window_size": 32, "time_k": 5}):
        Graph(options).prepare(tmp_path, quiet)
    graphs = [dict(entry.about) for entry in entries(tmp_path) if entry.what == "graph"]
    sizes = sorted((about["window_size"], about["time_k"]) for about in graphs)
    assert sizes == [(32, 3), (32, 5), (64, 3), (64, 5)]
    assert len([entry for entry in entries(tmp_path) if entry.what == "table"]) == 1


def test_a_second_preparation_finds_everything(job: Graph, cache: Path) -> None:
    told: list[str] = []
    before = sorted((file, file.stat().st_mtime_ns) for file in cache.rglob("*") if file.is_file())
    again = Graph({})
    again.prepare(cache, lambda done, total, text: told.append(text))
    assert told == []
    assert sorted((file, file.stat().st_mtime_ns) for file in cache.rglob("*") if file.is_file()) == before
    assert torch.equal(again.dataset("valid")[3]["x"], job.dataset("valid")[3]["x"])


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    Graph({}).prepare(tmp_path, quiet)
    (file,) = tmp_path.glob("graph/table-*/tensors.safetensors")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(WorkloadError, match=r"tensors.safetensors is damaged .* remove .*table-"):
        Graph({}).prepare(tmp_path, quiet)


def test_no_model_before_the_data_are_prepared() -> None:
    with pytest.raises(RuntimeError, match="prepare"):
        Graph({}).model()


# --- what is hidden -------------------------------------------------------------------------------------------------


def test_training_hides_by_sample_seed_and_need() -> None:
    seeds = sample_seeds(0, 0, torch.arange(4000))
    need = torch.tensor([1.0, 1.0, 0.1, 1.0, 1.0, 1.0])
    hidden = draw_hidden(seeds, need)
    assert hidden.sum(1).unique().tolist() == [hidden_count(6)] == [2]
    often = hidden.double().mean(0)
    assert float(often[2]) < 0.1 < 0.3 < float(often[0])
    order = torch.randperm(4000)
    assert torch.equal(draw_hidden(seeds[order], need), hidden[order])


def test_held_out_windows_are_hidden_by_their_index_alone(job: Graph) -> None:
    """The original refilled the needy channels of held-out windows too."""
    model = seeded_model(job).eval()
    batch = batch_of(job, torch.arange(24), "valid")
    before = {name: value.clone() for name, value in batch.items()}
    found = job.evaluate(model, [batch])
    other_seeds = {**batch, "sample_seed": batch["sample_seed"] + 99}
    assert job.evaluate(model, [other_seeds]) == found
    assert all(torch.equal(batch[name], value) for name, value in before.items()), "a held-out window was altered"
    assert job._table is not None
    job._table.need.mul_(0.5)  # whatever training finds hard
    try:
        assert job.evaluate(model, [batch]) == found
    finally:
        job._table.need.mul_(2.0)


def test_evaluation_does_not_hang_on_batches(job: Graph) -> None:
    model = seeded_model(job).eval()
    whole = job.evaluate(model, [batch_of(job, torch.arange(24), "valid")])
    cut = job.evaluate(model, [batch_of(job, torch.arange(at, at + 8), "valid") for at in (0, 8, 16)])
    assert whole == pytest.approx(cut, rel=1e-5)


def test_a_hidden_channel_is_not_seen(job: Graph) -> None:
    model, batch = seeded_model(job).eval(), batch_of(job, torch.arange(2))
    hidden = torch.tensor([[True, False, False, False, False, False]] * 2)
    other = batch["x"].clone()
    other[:, :, 0] += 5.0
    with torch.no_grad():
        assert torch.equal(model(batch["x"], hidden)[1], model(other, hidden)[1])
        assert not torch.equal(model(batch["x"], ~hidden)[1], model(other, ~hidden)[1])


def test_need_is_what_the_other_channels_do_not_say() -> None:
    drawn = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    rows = torch.stack((drawn[:, 0], drawn[:, 0], drawn[:, 1]), dim=1)
    need, weights = measure_need(rows)
    assert need.tolist() == pytest.approx([0.1, 0.1, 1.0], abs=0.01)
    assert weights.diagonal().tolist() == [0.0, 0.0, 0.0]
    assert float(weights[0, 1]) == pytest.approx(1.0, abs=0.01)


# --- loss and figures -----------------------------------------------------------------------------------------------


def test_the_terms_are_the_masked_error_and_the_cross_entropy(job: Graph) -> None:
    model, batch = seeded_model(job).eval(), batch_of(job, torch.arange(8))
    assert job._table is not None
    hidden = draw_hidden(batch["sample_seed"], job._table.need)
    with torch.no_grad():
        terms = job.loss(model, batch)
        logits, filled = model(batch["x"], hidden)
    wanted = [(filled[i] - batch["x"][i])[:, hidden[i]].square().mean() for i in range(8)]
    assert float(terms["recon"].sum) == pytest.approx(float(sum(wanted)), rel=1e-5)
    assert float(terms["class"].sum) == pytest.approx(
        float(-logits.log_softmax(1)[torch.arange(8), batch["label"]].sum()), rel=1e-5
    )
    assert {name: (term.weight, term.coefficient) for name, term in terms.items()} == {
        "recon": (8.0, 1.0),
        "class": (8.0, 1.0),
    }


def test_samples_do_not_touch_each_other(job: Graph) -> None:
    """No BatchNorm: a window's answer is the same whichever windows stand beside it."""
    model = seeded_model(job)
    assert not any("BatchNorm" in type(module).__name__ for module in model.modules())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    one, many = batch_of(job, torch.tensor([5])), batch_of(job, torch.arange(5, 13))
    assert torch.allclose(job.predict(model, one)[0], job.predict(model, many)[0], atol=1e-6)
    assert job.predict(model, many).shape == (8, 7)


def test_checkpointed_blocks_give_the_same_gradients(job: Graph) -> None:
    from torch.utils.checkpoint import checkpoint

    model, batch = seeded_model(job).eval(), batch_of(job, torch.arange(4))
    parameters = list(model.parameters())
    plain = torch.autograd.grad(_total(job, model, batch), parameters)
    for block in job.checkpoint_blocks(model):
        block.forward = lambda *args, _own=block.forward: checkpoint(_own, *args, use_reentrant=False)
    again = torch.autograd.grad(_total(job, model, batch), parameters)
    assert len(job.checkpoint_blocks(model)) == 3
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(plain, again, strict=True))


def _total(job: Graph, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    terms = job.loss(model, batch)
    return torch.stack([term.sum / term.weight for term in terms.values()]).sum()


def test_a_short_training_beats_what_needs_no_learning(job: Graph, tmp_path: Path) -> None:
    """Held-out people; the pictures and tables of the trained model are written."""
    model = seeded_model(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = job.dataset("train")
    for step in range(160):
        rows = torch.randint(3395, (16,), generator=torch.Generator().manual_seed(step))
        batch = {**job.collate(data.__getitems__(rows.tolist())), "sample_seed": sample_seeds(0, step, rows)}  # type: ignore[attr-defined]
        optimizer.zero_grad()
        _total(job, model, batch).backward()
        optimizer.step()
    model.eval()
    found, trivial = job.evaluate(model, job._valid_batches()), job.trivial()
    assert found["accuracy"] > 0.4 > 2 * trivial["accuracy"].value
    assert found["recording_accuracy"] > 0.4 > 2 * trivial["recording_accuracy"].value
    assert found["masked_mse"] < 0.95 * trivial["masked_mse"].value
    assert found["loss"] < 0.9 * trivial["loss"].value

    assessed = job.assess(model, tmp_path, 7)
    assert set(assessed) == {"balanced_accuracy", "worst_recall"} < set(trivial)
    with (tmp_path / "confusion-7.csv").open() as file:
        rows_of_table = list(csv.reader(file))
    counts = torch.tensor([[int(cell) for cell in row[1:]] for row in rows_of_table[1:]])
    assert int(counts.sum()) == len(job.dataset("valid"))  # type: ignore[arg-type]
    assert float(counts.diagonal().sum() / counts.sum()) == pytest.approx(found["accuracy"])
    with (tmp_path / "channels-7.csv").open() as file:
        channels = list(csv.DictReader(file))
    assert [row["channel"] for row in channels][:2] == ["acceleration_x", "acceleration_y"]
    mean = sum(float(row["zero_fill_mse"]) for row in channels) / 6
    assert mean == pytest.approx(trivial["masked_mse"].value, rel=0.1)
    (picture,) = job.sample(model, tmp_path, 7)
    for path in (picture, tmp_path / "confusion-7.png"):
        with Image.open(path) as image:
            assert min(image.size) > 300


def test_trivial_figures_come_from_the_held_out_people(job: Graph) -> None:
    trivial = job.trivial()
    labels = job._windows("valid").labels
    assert trivial["accuracy"].value <= float(labels.bincount().max()) / len(labels)
    assert 0.05 < trivial["accuracy"].value < 0.3
    assert trivial["recording_accuracy"].value == pytest.approx(1 / 7)
    assert 0.5 < trivial["masked_mse"].value < 1.5
    assert not trivial["masked_mse"].higher_is_better


# --- what the tuner is told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", TIERS)
@pytest.mark.parametrize("channels", [6, 32])
def test_the_tiers_have_the_sizes_of_the_description(sizes: tuple[int, int, int, int, int], channels: int) -> None:
    """On the meta device. The prototype this was planned from had about 349,000 in its top tier; here the skips of the
    first and the last layer grow with the channels, and it lies between the counts for 6 and for 32."""
    with torch.device("meta"):
        model = GraphNet(Sizes(*sizes), channels, 7, 320, BandAttention(band_mask(320, 4)))
        logits, filled = model(torch.empty(2, 320, channels), torch.zeros(2, channels, dtype=torch.bool))
    assert logits.shape == (2, 7)
    assert filled.shape == (2, 320, channels)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == TIERS[sizes][0 if channels == 6 else 1]
    assert channels == 32 or f"{count:,}" in (described.__doc__ or "")


def test_the_top_tier_is_about_the_prototypes() -> None:
    six, many = TIERS[128, 3, 3, 2, 4]
    assert six < 349_000 < many
    assert six / 349_000 == pytest.approx(1.0, abs=0.03)


def test_the_baseline_is_the_guides_middle_tier() -> None:
    info = Graph({"preset": "full"}).info()
    baseline = info.baseline
    assert parse_json(RunConfig, baseline.to_json()) == baseline
    assert (baseline.batch_label, baseline.gradient_checkpointing) == ("16x1", True)
    assert "0.35 M" in info.preset_note
    assert "rehearsal" in Graph({}).info().preset_note
    assert isinstance(Graph({}), Workload)


def test_the_study_file_has_the_guides_tiers() -> None:
    study = load_document(StudyFile, (ROOT / "studies/graph/study.yaml").read_text(), "study.yaml")
    assert study.workload == "graph"
    assert set(study.presets) == {"tiny", "full"}
    names = ("hidden_channels", "encoder_layers", "decoder_layers", "transformer_layers", "attention_heads")
    sizes = [tuple(tier.options[name] for name in names) for tier in study.tiers]
    assert sizes == list(reversed(TIERS))
    assert [tier.above_gib for tier in study.tiers] == [16, 8, 0]
    assert [tier.baseline["micro_batch_size"] for tier in study.tiers] == [32, 16, 8]
    assert [tier.baseline["gradient_checkpointing"] for tier in study.tiers] == [False, True, True]
    assert study.space.options == {}, "the model's sizes are not searched without a quality constraint"
    for tier in study.tiers:
        assert Graph({"preset": "full", **tier.options})._sizes == Sizes(*(int(str(tier.options[n])) for n in names))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 4}, "options.hidden: graph does not know it; known: preset, data, block_column"),
        ({"preset": "huge"}, "options.preset: unknown value 'huge'; known: tiny, full"),
        ({"hidden_channels": 33}, "options.hidden_channels: must be a multiple of attention_heads (2), got 33"),
        ({"encoder_layers": 0}, "options.encoder_layers: must be a whole number from 1 to 32, got 0"),
        ({"window_size": "64"}, "options.window_size: must be a whole number from 8 to 16384, got '64'"),
        ({"time_k": 64}, "options.time_k: must be a whole number from 1 to 63, got 64"),
        ({"data": 3}, "options.data: must be the path of a CSV or parquet file"),
        ({"label_column": "exercise"}, "options.label_column: names a column of your own table"),
        ({"data": ".", "block_column": 4}, "options.block_column: must be the name of a column, got 4"),
    ],
)
def test_bad_options_get_one_clear_line(options: dict[str, Scalar], message: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        Graph(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_longer_than_the_recordings() -> None:
    with pytest.raises(WorkloadError, match=r"block 'person_\d+' is shorter than a window: .*recording \d+.* 9000"):
        Graph({"window_size": 9000}).info()
