"""A checkpoint is there or it is not: kills, full disks and flipped bits never leave a run without its past."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.engine_toys import toy_config, toy_trainer
from tuner.contract.config import EmaConfig, LoaderConfig, RunConfig
from tuner.contract.errors import ConfigError
from tuner.engine.checkpoint import Checkpointer, CheckpointError
from tuner.engine.trainer import Trainer
from tuner.engine.tree import put_together, take_apart


def run_config(workers: int = 0) -> RunConfig:
    """Everything that has state: dropout, averaging, an optimizer with moments, 200 samples an epoch, steps of 16."""
    return toy_config(
        {"dropout": 0.2, "samples": 200}, ema=EmaConfig(half_life_samples=300), loader=LoaderConfig(num_workers=workers)
    )


def steps(trainer: Trainer, count: int) -> list[float]:
    return [float(trainer.step().losses["total"]) for _ in range(count)]


def same(first: Any, second: Any) -> bool:
    tensors, plain = take_apart(first)
    others, other_plain = take_apart(second)
    equal = all(torch.equal(value, others[name]) for name, value in tensors.items())
    return equal and tensors.keys() == others.keys() and json.dumps(plain) == json.dumps(other_plain)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(workers: int, tmp_path: Path) -> None:
    """Interrupted twice, over the borders of epochs (every 12.5 steps); parameters, average, moments, losses, noise."""
    config = run_config(workers)
    whole = toy_trainer(config)
    losses = steps(whole, 40)
    keeper, chance = Checkpointer(tmp_path), random.Random(5)
    done: list[float] = []
    cuts = [0, *sorted(chance.sample(range(1, 40), 2)), 40]
    for begin, end in itertools.pairwise(cuts):
        torch.manual_seed(chance.randrange(1000))
        trainer = toy_trainer(config)
        if begin:
            torch.rand(7)
            trainer.load_state_dict(keeper.latest() or {})
        done += steps(trainer, end - begin)
        keeper.save(trainer.state_dict())
        trainer.close()
    assert done == losses
    assert same(keeper.latest(), whole.state_dict())
    whole.close()


def test_settings_of_the_present_run_win_over_saved_ones(tmp_path: Path) -> None:
    config = run_config()
    trainer = toy_trainer(config)
    steps(trainer, 2)
    changed = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"weight_decay": 0.1, "fused": True})}
    )
    other = toy_trainer(changed)
    other.load_state_dict(trainer.state_dict())
    steps(other, 1)
    (group,) = other.optimizer.param_groups
    assert (group["weight_decay"], group["fused"]) == (0.1, True)


def test_a_checkpoint_of_another_model_is_refused_in_one_line() -> None:
    state = toy_trainer(toy_config({"width": 8})).state_dict()
    with pytest.raises(ConfigError, match="does not fit this configuration"):
        toy_trainer(toy_config()).load_state_dict(state)


def saved(keeper: Checkpointer, *samples: int) -> None:
    for count in samples:
        keeper.save({"samples": count, "w": torch.full((2000,), float(count))})


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "remove", "no manifest", "bad json"])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_noticed_and_passed_over(damage: str, name: str, tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep=3)
    saved(keeper, 10, 20)
    newest = keeper.all()[0]
    hurt(newest, name, damage)
    notices: list[str] = []
    state = keeper.latest(notices.append)
    assert state is not None
    assert state["samples"] == 10
    assert torch.equal(state["w"], torch.full((2000,), 10.0))
    assert len(notices) == 1
    assert newest.name in notices[0]


def hurt(folder: Path, name: str, damage: str) -> None:
    target = folder / ("manifest.json" if damage in ("no manifest", "bad json") else name)
    data = bytearray(target.read_bytes())
    if damage in ("remove", "no manifest"):
        target.unlink()
        return
    if damage == "truncate":
        del data[len(data) // 2 :]
    elif damage == "zero":
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    elif damage == "bad json":
        data = bytearray(b"{")
    else:
        data[len(data) - 1] ^= 1
    target.write_bytes(bytes(data))


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_single_flipped_bit_is_loaded(place: float, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    keeper = Checkpointer(tmp_path_factory.mktemp("flip"))
    saved(keeper, 10)
    target = keeper.all()[0] / "tensors.safetensors"
    data = bytearray(target.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    target.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is intact"):
        keeper.latest()


def test_only_the_newest_are_kept_and_leftovers_swept(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep=2)
    (tmp_path / ".step-000000000005.123").mkdir()
    saved(keeper, 10, 20, 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000020", "step-000000000030"]
    assert Checkpointer(tmp_path / "nothing").latest() is None


def test_saving_again_at_the_same_place_replaces_a_damaged_one(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path)
    saved(keeper, 10)
    hurt(keeper.all()[0], "tensors.safetensors", "flip")
    saved(keeper, 10)
    assert (keeper.latest() or {})["samples"] == 10


def test_a_checkpoint_holds_nothing_that_could_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("owned",)

    with pytest.raises(CheckpointError, match="plain values only"):
        Checkpointer(tmp_path).save({"samples": 1, "evil": Evil()})
    saved(Checkpointer(tmp_path), 1)
    for file in next(tmp_path.glob("step-*")).iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError, AttributeError)):
            pickle.loads(file.read_bytes())


def test_states_of_any_shape_come_back_as_they_were() -> None:
    shared = torch.arange(6.0)
    state = {
        "tied": [shared, shared],
        "view": shared[::2],
        "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "numbers": {0: (1, 2.5, None), 7: "x"},
        "none": None,
    }
    tensors, plain = take_apart(state)
    back = put_together(tensors, json.loads(json.dumps(plain)))
    assert torch.equal(back["tied"][1], shared)
    assert torch.equal(back["view"], shared[::2])
    assert torch.equal(back["image"], state["image"])  # type: ignore[arg-type]
    assert back["numbers"] == state["numbers"]
    assert len(tensors) == 3
