"""Each workload's own job in the loop people would otherwise run it in: same model, same batches, same optimizer.

latent_cfg   the Trainer of denoising-diffusion-pytorch
sd_kanji     the inner loop of diffusers' text-to-image example, restated: accelerate, EMAModel
gpt2         transformers' Trainer
graph        PyTorch Geometric's loader and a loop around it; once with its own message passing in the model

Every contender has the workload's model and loss, fp32, no checkpointing, a constant rate and one thread. A bare loop
is there as well: micro-batches, clipping, update, averaged weights, as one writes them by hand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.loops_null import always_one
from benchmarks.loops_ours import CPU, PacedSource, train
from benchmarks.loops_pace import Contender, Job, Pace, Paced
from tuner.commands.setup import cache_dir
from tuner.contract.config import Cadence, LoaderConfig, RunConfig, ScheduleConfig
from tuner.contract.workload import SAMPLE_SEED, Batch
from tuner.engine.ema import Ema
from tuner.engine.loader import Group, StreamSampler, count_weights, first_batches, sample_order
from tuner.engine.optim import build_optimizer
from tuner.randomness import sample_seeds
from tuner.registry import load

GROUPS = 8
"""Optimizer steps whose batches lie in memory."""
MAX_NORM = 1.0
IMAGES, IMAGE_SIDE = 100, 8
"""The fewest pictures lucidrains' Trainer takes; none of them is read."""


@dataclass
class Setting:
    """A workload as every contender of it gets it."""

    pace: Pace
    job: Any
    config: RunConfig

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """The micro-batches of the first steps of the stream."""
        return first_batches(self.job, self.config, GROUPS * self.config.accumulation_steps)

    def model(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        made: nn.Module = self.job.model()
        return made.train()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(self.job, model, self.config.optimizer)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over a micro-batch."""
        terms = self.job.loss(model, batch)
        total: Tensor = sum(term.coefficient * (term.sum / term.weight) for term in terms.values())
        return total


def setting(pace: Pace) -> Setting:
    job = load(pace.job.case)({"preset": "tiny"})
    job.prepare(cache_dir(), silent)
    base: RunConfig = job.info().baseline
    pace.per_step = base.accumulation_steps
    config = base.model_copy(
        update={
            "loader": LoaderConfig(),
            "schedule": ScheduleConfig(),
            "gradient_checkpointing": False,
            "horizon_samples": pace.job.all_steps * base.effective_batch_size,
            "cadence": Cadence(log_samples=base.cadence.log_samples),
            "quality": None,
            "threads": 1,
        }
    )
    return Setting(pace, job, config)


def silent(done: int, total: int, text: str) -> None:
    """Progress nobody watches."""


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, always_one)


# --- on all four ------------------------------------------------------------------------------------------------------


def by_hand(pace: Pace) -> nn.Module:
    own = setting(pace)
    return loop_by_hand(own, Paced(pace, own.batches))


def loop_by_hand(own: Setting, batches: Any) -> nn.Module:
    model, parts = own.model(), own.config.accumulation_steps
    optimizer = own.optimizer(model)
    average = Ema(model, own.config.ema) if own.config.ema is not None else None
    size, losses = own.config.effective_batch_size, []
    for number, batch in enumerate(batches, start=1):
        loss = own.loss(model, batch) / parts
        loss.backward()
        losses.append(loss.detach())
        if number % parts:
            continue
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update(number // parts * size, size)
    return model


class Watched:
    """The workload without figures that are computed before a run, and with batches that let the pace tick."""

    def __init__(self, own: Setting) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        if name == "trivial":
            raise AttributeError(name)
        return getattr(self._own.job, name)

    def dataset(self, split: str) -> Any:
        data = self._own.job.dataset(split)
        return Ticking(data, self._own.pace) if split == "train" else data


class Ticking(Dataset[Mapping[str, Tensor]]):
    """A data set asked for whole batches."""

    def __init__(self, data: Any, pace: Pace) -> None:
        self._data = data
        self._pace = pace

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Tensor]]:
        self._pace.tick()
        found: list[Mapping[str, Tensor]] = self._data.__getitems__(indices)
        return found


def ours(pace: Pace) -> nn.Module:
    own = setting(pace)
    parts = own.config.accumulation_steps
    cuts = [own.batches[at : at + parts] for at in range(0, len(own.batches), parts)]
    groups = [Group(list(cut), count_weights(own.job, cut)) for cut in cuts]
    return train(Watched(own), own.config, PacedSource(pace, groups))


# --- latent_cfg -------------------------------------------------------------------------------------------------------


class Movable(dict[str, Tensor]):
    """A batch that can be asked to move, as that Trainer asks its tensors."""

    def to(self, device: torch.device) -> Movable:
        return Movable({name: value.to(device) for name, value in self.items()})


class Losses(nn.Module):
    """Model and loss in one module, with what lucidrains' Trainer wants to know of a diffusion model."""

    channels, image_size, is_ddim_sampling = 3, IMAGE_SIDE, False

    def __init__(self, inner: nn.Module, loss: Callable[[nn.Module, Batch], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self._loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.inner, batch)


def lucidrains(pace: Pace) -> nn.Module:
    from denoising_diffusion_pytorch import Trainer

    own = setting(pace)
    settings = own.config.optimizer
    # a lambda is copied as it is: the Trainer's average copies the module, which must not copy the data set too
    model = Losses(own.model(), lambda inner, batch: own.loss(inner, batch))
    with tempfile.TemporaryDirectory(prefix="tuner-loops-") as folder:
        write_pictures(Path(folder))
        trainer = Trainer(
            model,
            folder,
            train_batch_size=own.config.micro_batch_size,
            gradient_accumulate_every=own.config.accumulation_steps,
            train_lr=settings.lr,
            adam_betas=settings.betas,
            train_num_steps=pace.job.all_steps,
            save_and_sample_every=10 * pace.job.all_steps,
            results_folder=f"{folder}/results",
            calculate_fid=False,
        )
        trainer.dl = iter(Paced(pace, [Movable(batch) for batch in own.batches]))
        trainer.train()
    return model.inner


def write_pictures(folder: Path) -> None:
    for number in range(IMAGES):
        Image.fromarray(np.zeros((IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)).save(folder / f"{number}.png")


# --- sd_kanji ---------------------------------------------------------------------------------------------------------


def diffusers_script(pace: Pace) -> nn.Module:
    """What that script does in a step: accumulate, gather the loss and read it, clip, update, average, tell."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    own = setting(pace)
    parts = own.config.accumulation_steps
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    made = own.model()
    optimizer = own.optimizer(made)
    average = EMAModel(made.parameters())
    model, optimizer, schedule = accelerator.prepare(made, optimizer, constant(optimizer))
    bar = tqdm(total=pace.job.all_steps, disable=False)
    running = 0.0
    for batch in Paced(pace, own.batches):
        with accelerator.accumulate(model):
            loss = own.loss(model, batch)
            everywhere = accelerator.gather(loss.repeat(own.config.micro_batch_size)).mean()
            running += everywhere.item() / parts
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(made.parameters())
            bar.update(1)
            accelerator.log({"train_loss": running})
            running = 0.0
        bar.set_postfix(step_loss=loss.detach().item(), lr=schedule.get_last_lr()[0])
    return made


# --- gpt2 -------------------------------------------------------------------------------------------------------------


class Answering(nn.Module):
    """Model and loss as transformers' Trainer calls them. `batch` is one argument, so it takes no labels apart."""

    def __init__(self, own: Setting) -> None:
        super().__init__()
        self.inner = own.model()
        self._own = own

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self._own.loss(self.inner, batch)}


def hf_trainer(pace: Pace) -> nn.Module:
    from transformers import Trainer, TrainingArguments

    own = setting(pace)
    batches = Paced(pace, [{"batch": batch} for batch in own.batches])

    class Fed(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return batches

    model = Answering(own)
    optimizer = own.optimizer(model.inner)
    with tempfile.TemporaryDirectory(prefix="tuner-loops-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=pace.job.all_steps,
            gradient_accumulation_steps=own.config.accumulation_steps,
            max_grad_norm=MAX_NORM,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        data = own.job.dataset("train")
        Fed(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, constant(optimizer))).train()
    return model.inner


# --- graph ------------------------------------------------------------------------------------------------------------


def ours_from_loader(pace: Pace) -> nn.Module:
    """With the run's own loader, as its peer has one too."""
    own = setting(pace)
    return train(Watched(own), own.config)


def by_hand_from_loader(pace: Pace) -> nn.Module:
    """With the workload's own batches, made one by one in the order of the run."""
    own = setting(pace)
    data = Ticking(own.job.dataset("train"), pace)

    def batches() -> Iterator[Batch]:
        for keys in keys_of(own):
            indices = [index for _, index in keys]
            seeds = sample_seeds(own.config.seed, torch.tensor([epoch for epoch, _ in keys]), torch.tensor(indices))
            yield {**own.job.collate(data.__getitems__(indices)), SAMPLE_SEED: seeds}

    return loop_by_hand(own, batches())


def keys_of(own: Setting) -> Iterator[list[tuple[int, int]]]:
    """(epoch, index) of the samples of each batch, for the whole pace."""
    order = sample_order(own.job, own.config, len(own.job.dataset("train")))
    keys = iter(StreamSampler(order, own.config.micro_batch_size, 0))
    return (next(keys) for _ in range(own.pace.batches))


class Sparse(nn.Module):
    """Attention over the edges of a batched graph, with PyTorch Geometric's softmax and scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.edges: Tensor | None = None

    def forward(self, values: Tensor, source: Tensor, target: Tensor) -> Tensor:
        from torch_geometric.utils import scatter, softmax

        assert self.edges is not None
        begin, end = self.edges
        nodes = values.shape[0] * values.shape[1]
        scores = nn.functional.leaky_relu(source.flatten(0, 1)[begin] + target.flatten(0, 1)[end], 0.2)
        shares = softmax(scores, end, num_nodes=nodes)
        messages = shares[..., None] * values.flatten(0, 1)[begin]
        mixed: Tensor = scatter(messages, end, dim=0, dim_size=nodes, reduce="sum")
        return mixed.view_as(values)


def geometric(pace: Pace, *, sparse: bool) -> nn.Module:
    """Windows as graphs with edges of their own, batched into one large graph in every step."""
    from torch_geometric.loader import DataLoader

    own = setting(pace)
    model = own.model()
    attention = Sparse() if sparse else None
    if attention is not None:
        replace_attention(model, attention)
    optimizer = own.optimizer(model)
    size, losses = own.config.micro_batch_size, []
    for batch in DataLoader(Graphs(own), batch_size=size):
        moved = batch.to(CPU)
        optimizer.zero_grad()
        if attention is not None:
            attention.edges = moved.edge_index
        parts = {"x": moved.x.unflatten(0, (size, -1)), "label": moved.y, "index": moved.place, SAMPLE_SEED: moved.seed}
        loss = own.loss(model, parts)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        losses.append(loss.detach())
    return model


class Graphs(Dataset[Any]):
    """The windows of the whole pace in the run's order, each a graph that was made beforehand."""

    def __init__(self, own: Setting) -> None:
        from torch_geometric.data import Data

        from workloads.graph.attention import edge_index

        data, self._pace = own.job.dataset("train"), own.pace
        edges = edge_index(*window_shape(data, own.job))
        self._graphs = []
        for keys in keys_of(own):
            epochs, indices = (torch.tensor(list(part)) for part in zip(*keys, strict=True))
            seeds = sample_seeds(own.config.seed, epochs, indices)
            for item, seed in zip(data.__getitems__(indices.tolist()), seeds, strict=True):
                made = Data(x=item["x"], edge_index=edges, y=item["label"][None])
                made.place, made.seed = item["index"][None], seed[None]
                self._graphs.append(made)

    def __len__(self) -> int:
        return len(self._graphs)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        self._pace.tick()
        return [self._graphs[index] for index in indices]


def window_shape(data: Any, job: Any) -> tuple[int, int]:
    """(steps of a window, neighbours each side)"""
    return int(data[0]["x"].shape[0]), int(job._time_k)


def replace_attention(model: nn.Module, attention: nn.Module) -> None:
    from workloads.graph.model import GatLayer

    for layer in model.modules():
        if isinstance(layer, GatLayer):
            layer.attention = attention


BARE, OURS = "bare loop", "tuner train"
COMMON = {BARE: Contender(by_hand), OURS: Contender(ours)}
PEERS: dict[str, dict[str, Contender]] = {
    "latent_cfg": {
        **COMMON,
        "lucidrains Trainer": Contender(lucidrains, ("denoising-diffusion-pytorch", "torchvision", "accelerate")),
    },
    "sd_kanji": {**COMMON, "diffusers script": Contender(diffusers_script, ("diffusers", "accelerate"))},
    "gpt2": {**COMMON, "HF Trainer": Contender(hf_trainer, ("transformers", "accelerate"))},
    "graph": {
        BARE: Contender(by_hand_from_loader),
        OURS: Contender(ours_from_loader),
        "PyG loader": Contender(partial(geometric, sparse=False), ("torch_geometric",)),
        "PyG loader and layers": Contender(partial(geometric, sparse=True), ("torch_geometric",)),
    },
}


def find(job: Job) -> Contender:
    return PEERS[job.case][job.contender]
