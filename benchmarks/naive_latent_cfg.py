"""latent_cfg: a training step on cached latents, against encoding the pictures by the frozen VAE in every step.

python -m benchmarks.naive_latent_cfg
python -m benchmarks.naive_latent_cfg --preset full --rounds 6 --steps 1

Both ways draw the same pictures, timesteps and noise, and begin with the same weights; that their losses are equal is
checked first. Batch 16, one thread; 68 of the training pictures, as the gain does not depend on how many there are.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.ratio import interleaved, print_table
from tuner.contract.workload import Batch
from tuner.randomness import sample_seeds
from workloads.latent_cfg.data import WatchRecordings
from workloads.latent_cfg.presets import PRESETS
from workloads.latent_cfg.vae import KlVae, encode_all, to_float, train_vae
from workloads.latent_cfg.workload import LatentCfg

BATCH = 16
SAME_LOSS = 1e-4
"""Relative; a picture's latents differ in the last digits between batches of different size."""


@dataclass(frozen=True)
class Data:
    """The same training pictures twice: uint8 [N, 3, size, size], and as standardised latents [N, 4, s, s]."""

    pictures: Tensor
    labels: Tensor
    vae: KlVae
    mean: Tensor
    deviation: Tensor
    latents: Tensor

    def cached(self, rows: Tensor) -> Tensor:
        return self.latents[rows]

    @torch.no_grad()
    def encoded(self, rows: Tensor) -> Tensor:
        found = self.vae.encode(to_float(self.pictures[rows]))[0]
        return (found - self.mean) / self.deviation


class Training:
    """A model of its own, and batches that depend on the step's number alone."""

    def __init__(self, job: LatentCfg, model: nn.Module, data: Data, read: Callable[[Tensor], Tensor]) -> None:
        self._job, self._model, self._data, self._read = job, copy.deepcopy(model), data, read
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=1e-4, betas=(0.9, 0.99))
        self.steps = 0

    def step(self) -> float:
        """One update; returns the loss."""
        rows = torch.randint(len(self._data.pictures), (BATCH,), generator=torch.Generator().manual_seed(self.steps))
        batch: Batch = {
            "latent": self._read(rows),
            "label": self._data.labels[rows],
            "sample_seed": sample_seeds(0, self.steps, rows),
        }
        term = self._job.loss(self._model, batch)["v"]
        loss = term.sum / term.weight
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.steps += 1
        return loss.item()

    def steps_of_a_call(self, count: int) -> Callable[[], None]:
        def call() -> None:
            for _ in range(count):
                self.step()

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20, help="training steps in each call")
    parser.add_argument("--preset", default="tiny", choices=tuple(PRESETS))
    words = parser.parse_args()
    torch.set_num_threads(1)
    job, data = LatentCfg({"preset": words.preset}), prepared(words.preset)
    torch.manual_seed(0)
    model = job.model()
    naive, fast = (Training(job, model, data, read) for read in (data.encoded, data.cached))
    apart = largest_difference(naive, fast)
    seconds = interleaved(
        {
            "pictures encoded in every step": naive.steps_of_a_call(words.steps),
            "cached latents": fast.steps_of_a_call(words.steps),
        },
        words.rounds,
    )
    print_table(
        f"latent_cfg {words.preset}: a training step of 16",
        seconds,
        "pictures encoded in every step",
        units_per_call=words.steps,
        unit="step",
    )
    print(f"losses of 5 steps equal within {apart:.1e} (relative)")


def prepared(preset: str) -> Data:
    """With the codec untrained: how long it takes to encode does not depend on that."""
    spec, device = PRESETS[preset].vae, torch.device("cpu")
    found = WatchRecordings().load(spec.size, silent)
    pictures, labels = found.train[::20].clone(), found.train_labels[::20]
    vae = train_vae(spec, pictures, 0, device, silent)
    raw = encode_all(vae, pictures, device)
    mean, deviation = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), keepdim=True)
    return Data(pictures, labels, vae, mean, deviation, (raw - mean) / deviation)


def silent(done: int, total: int) -> None:
    """Progress nobody watches."""


def largest_difference(naive: Training, fast: Training) -> float:
    """Of the losses of the first five steps, relative. Ends the program when the two are not the same training."""
    apart = max(abs(naive.step() / fast.step() - 1) for _ in range(5))
    if apart > SAME_LOSS:
        raise SystemExit(f"the two ways give different losses: {apart:.1e} apart (relative)")
    return apart


if __name__ == "__main__":
    main()
