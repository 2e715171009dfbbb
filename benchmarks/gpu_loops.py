"""The loop of `tuner` against the same steps written out by hand, on this device, with a model of next to no work.

    python -m benchmarks.gpu_loops --rounds 20          one JSON object

`benchmarks.loops` compares with other frameworks; this one asks what our own loop costs where a GPU is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch

from benchmarks.gpu_fault_jobs import Hungry
from benchmarks.ratio import interleaved, paired_ratio
from tuner.contract.config import RunConfig
from tuner.engine.device import choose_device
from tuner.engine.loader import Group, ResidentSource, first_batches, to_device
from tuner.engine.trainer import Trainer

STEPS = 200
"""Of a block; the device is waited for at its end."""


def by_hand(job: Hungry, config: RunConfig, group: Group, device: torch.device) -> Callable[[], None]:
    """Forward, backward, update and the loss kept, nothing else."""
    model = job.model().to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.lr)
    losses: list[torch.Tensor] = []

    def block() -> None:
        losses.clear()
        for _ in range(STEPS):
            batch = group.batches[0]
            error = job.loss(model, batch)["error"]
            loss = error.sum / error.weight
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        wait(device)

    return block


def ours(job: Hungry, config: RunConfig, group: Group, device: torch.device) -> Callable[[], None]:
    """The same through `Trainer`: checks, clocks, schedule and all; hooks apart."""
    trainer = Trainer(job, config, device=device, source=ResidentSource([group]))

    def block() -> None:
        for _ in range(STEPS):
            trainer.step()
        wait(device)
        trainer.clock.take(wait=True)

    return block


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(rounds: int) -> dict[str, object]:
    device = choose_device("auto")
    torch.set_num_threads(1)
    config = Hungry({}).info().baseline.model_copy(update={"threads": 1})
    batch = to_device(first_batches(Hungry({}), config, 1)[0], device, channels_last=False)
    group = Group([batch], {"error": float(config.micro_batch_size)})
    made = {"by hand": by_hand, "tuner": ours}
    seconds = interleaved({name: make(Hungry({}), config, group, device) for name, make in made.items()}, rounds)
    ratio = paired_ratio(seconds["tuner"], seconds["by hand"])
    return {
        "device": device.type,
        "rounds": rounds,
        "step_s": {name: min(times) / STEPS for name, times in seconds.items()},
        "ratio": {"value": ratio.value, "low": ratio.low, "high": ratio.high},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    json.dump(measure(parser.parse_args().rounds), sys.stdout)
