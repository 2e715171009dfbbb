"""The loop. It knows nothing of probes, logs or files: those are hooks.

Same configuration, same seed and same position in the stream give the same run, bit for bit on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tuner import stopping
from tuner.contract.allowance import usable_cores
from tuner.contract.config import CompileMode, RunConfig
from tuner.contract.errors import ConfigError
from tuner.engine import compiling
from tuner.engine.clock import StepClock, step_clock
from tuner.engine.distributed import ParallelLoss, this_rank
from tuner.engine.ema import Ema
from tuner.engine.flops import FlopCount
from tuner.engine.global_random import random_state, restore_random, seed_all
from tuner.engine.hooks import Hook
from tuner.engine.loader import Group, Source, StoppedWaiting, StreamSource
from tuner.engine.optim import build_optimizer, lr_schedule, match_layout, set_lr, trained_parameters, with_settings_of
from tuner.engine.precision import Arithmetic
from tuner.engine.step import TOTAL, GradientMaker, MovingBuffers, Span, StepResult, Updated, no_span, update, within

POLL_S = 0.005
"""How often it is asked whether the loader's workers rest."""


class Trainer:
    """Model, optimizer, averaging, loader and clock of one run.

    Raises Unsupported when this machine cannot run `config`. `source` replaces the loader (resident batches);
    `dataset` spares making the workload's own again.
    """

    def __init__(
        self,
        workload: Any,
        config: RunConfig,
        *,
        device: torch.device,
        hooks: Sequence[Hook] = (),
        source: Source | None = None,
        dataset: Any = None,
    ) -> None:
        self.rank = this_rank(config)
        compiling.refuse_illegal(config, device)
        self.workload = workload
        self.config = config
        self.device = device
        self.hooks = list(hooks)
        self.samples = 0
        self.steps = 0
        self.updating = False
        """True while parameters change: a failure then leaves them half updated."""
        self.stop_reason: str | None = None
        self.flops_per_sample: float | None = None
        self.clock: StepClock = step_clock(device)
        self._source = source
        self._ready_before: int | None = None
        """Batches that lay ready when the last break began; None once the loader is back there."""
        self._dataset = dataset
        set_threads(config.threads, config.world_size)
        seed_all(config.seed)
        self.arithmetic = Arithmetic(config.precision, device)
        self.model = self._build_model()
        self.rank.share(self.model)
        self.ema = Ema(self.model, config.ema) if config.ema is not None and self.rank.leads else None
        self.optimizer = build_optimizer(workload, self.model, config.optimizer)
        self.parameters = trained_parameters(self.optimizer)
        self._lr_factor = lr_schedule(workload, config)
        self._gradients = GradientMaker(workload, self.model, self.arithmetic, channels_last=config.channels_last)
        self._keep_gradients = False
        self._buffers = MovingBuffers(self.model) if device.type == "cpu" else None
        self._span: Span = no_span
        self._speed_up()

    def _build_model(self) -> nn.Module:
        model: nn.Module = self.workload.model()
        if self.config.channels_last:
            return model.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload,no-any-return]
        return model.to(self.device).train()

    def _speed_up(self) -> None:
        """Checkpointing, compilation and ranks, after the average has taken its copy of the plain model."""
        if self.config.gradient_checkpointing:
            compiling.checkpoint_blocks(self.workload, self.model)
        compiling.compile_model(self.model, self.config.compile)
        if self.device.type == "cuda" and self.config.compile in compiling.GRAPH_MODES:
            self._gradients.marks_steps = True
            self._keep_gradients = True
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)

        if self.rank.world_size > 1:
            coupled = bool(self.workload.info().batch_coupled)
            self._gradients.ranks = self.rank.world_size
            self._gradients.parallel = ParallelLoss(
                self.workload, self.model, self.rank, self.device, coupled=coupled, compiled=self._compiled
            )

    @property
    def _compiled(self) -> bool:
        return self.config.compile is not CompileMode.EAGER

    @property
    def effective_model(self) -> nn.Module:
        """The model to evaluate, sample from and keep: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema.model

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def run(self, until: int | None = None) -> None:
        """Step until `until` samples have been seen in all (None: until a hook stops the run)."""
        assert len(set(self.rank.gather(self.samples))) == 1, "the ranks stand at different places"
        for hook in self.hooks:
            hook.on_start(self)
        self.clock.rest()
        while (until is None or self.samples < until) and not self._stopped():
            try:
                result = self.step()
            except StoppedWaiting:
                self.heed()
                break
            for hook in self.hooks:
                hook.after_step(self, result)
        for hook in self.hooks:
            hook.on_end(self)

    def rest(self) -> None:
        """A break begins (evaluation, a checkpoint, the host's reference work): its seconds are in no step. Loader
        workers go on meanwhile, so the steps that follow are marked as fed `ahead` until no more batches lie ready
        than now."""
        self.clock.rest()
        if self._source is not None and self._ready_before is None:
            self._ready_before = self._source.ready()

    def loader_rests(self, wait_s: float) -> bool:
        """Have the loader's workers nothing to do, or come there within `wait_s`?"""
        until = time.monotonic() + wait_s
        while self._source is not None and not self._source.idle():
            if time.monotonic() >= until:
                return False
            time.sleep(POLL_S)
        return True

    def _is_ahead(self) -> bool:
        """Is the step that begins fed from what the loader's workers made during a break?"""
        if self._ready_before is not None and self.source.ready() <= self._ready_before:
            self._ready_before = None
        return self._ready_before is not None

    def stop(self, reason: str) -> None:
        """End the run at the next step border; the first reason stands."""
        self.stop_reason = self.stop_reason or reason

    def heed(self) -> None:
        """Stop where a signal has asked for it."""
        if (number := stopping.asked()) is not None:
            self.stop(f"stopped by {number.name}")

    def _stopped(self) -> bool:
        """Has a hook ended the run, on whichever rank? All ranks stop at the same border."""
        if self.rank.world_size > 1 and self.rank.any(self.stop_reason is not None):
            self.stop("stopped by another rank")
        return self.stop_reason is not None

    def step(self) -> StepResult:
        """One optimizer update. Raises what the workload raises, and LoaderFailed."""
        self.clock.begin()
        ahead = self._ready_before is not None and self._is_ahead()
        group = within(self._span, "data_wait", self._next_group)
        samples = group.samples * self.rank.world_size
        count = FlopCount() if self._counts_flops() else None
        if self._buffers is not None:
            self._buffers.keep()
        losses = self.rank.add(self._gradients(group, count))
        lr = self._schedule(samples)
        self.updating = True
        updated = within(self._span, "optimizer", self._clip_and_step, losses[TOTAL])
        if self._buffers is not None:
            self._buffers.settle(left_out=updated.left_out is True)
        if self.ema is not None:
            within(self._span, "ema", self.ema.update, self.samples + samples, samples)
        self.samples += samples
        self.steps += 1
        self.updating = False
        self.clock.end()
        if count is not None:
            self.flops_per_sample = count.total / self.config.micro_batch_size or None
        elements = group.elements * self.rank.world_size
        return StepResult(samples, losses, updated.norm, lr, group.wait_s, elements, ahead, updated.left_out)

    def _next_group(self) -> Group:
        return self._whole(self.source.next_group())

    def _whole(self, group: Group) -> Group:
        """This rank's micro-batches of a step, with the weights of all ranks."""
        if self._gradients.parallel is None:
            return group
        self.rank.reseed(self.config.seed, self.samples)
        return replace(group, weights=self._gradients.parallel.weights(group.weights))

    def _clip_and_step(self, total: torch.Tensor) -> Updated:
        updated = update(self.optimizer, self.parameters, self.arithmetic, self.config.max_grad_norm, total)
        self._forget_gradients()
        return updated

    def _forget_gradients(self) -> None:
        """What `zero_grad` does, without the profiler's mark it sets around itself."""
        if self._keep_gradients:
            self.optimizer.zero_grad(set_to_none=False)
            return
        for parameter in self.parameters:
            parameter.grad = None

    def annotate(self, span: Span) -> None:
        """Hold `span(name)` around the parts of every step from now on: data_wait, transfer, forward, backward,
        optimizer, ema. `no_span` ends it."""
        self._span = self._gradients.span = span

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradient of the next group, without an update: what the equivalence probe compares."""
        self.optimizer.zero_grad(set_to_none=True)
        self._gradients(self.source.next_group())
        named = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return named

    def _counts_flops(self) -> bool:
        if self.steps or self.flops_per_sample is not None:
            return False
        return self.config.compile is CompileMode.EAGER and not self.config.gradient_checkpointing

    def _schedule(self, step_samples: int) -> float:
        """The rate at the middle of the step: the same curve whatever the batch size."""
        middle = self.samples + step_samples / 2
        lr = self.config.optimizer.lr * self._lr_factor(middle)
        set_lr(self.optimizer, lr)
        return lr

    @property
    def source(self) -> Source:
        if self._source is None:
            self._source = StreamSource(
                self.workload, self.config, self.device, start=self.samples, dataset=self._dataset
            )
        return self._source

    @property
    def loss_scale(self) -> float | None:
        """The fp16 loss scale; None without a scaler. Waits for the device."""
        return float(self.arithmetic.scaler.get_scale()) if self.arithmetic.scaler is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Everything from which the run goes on exactly: tensors and plain values only."""
        scaler = self.arithmetic.scaler
        return {
            "samples": self.samples,
            "steps": self.steps,
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": random_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises ConfigError when it belongs to another model or optimizer."""
        try:
            self.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.model.load_state_dict(state["ema"] or state["model"])
            self.optimizer.load_state_dict(with_settings_of(self.optimizer, state["optimizer"]))
        except (RuntimeError, ValueError, KeyError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"the checkpoint does not fit this configuration: {first}") from error
        match_layout(self.optimizer)
        if self.arithmetic.scaler is not None and state["scaler"]:
            self.arithmetic.scaler.load_state_dict(state["scaler"])
        self.samples, self.steps = int(state["samples"]), int(state["steps"])
        self.close_loader()
        _ = self.source  # the loader before the random state, so that making it cannot disturb it
        restore_random(state["random"], self.device)

    def close_loader(self) -> None:
        """End the loader's workers; a next step would start new ones where the stream stands."""
        if self._source is not None:
            self._source.close()
            self._source = None
        self._ready_before = None

    def close(self) -> None:
        """End the loader's workers and put process-wide switches back."""
        self.close_loader()
        self.arithmetic.close()


def set_threads(threads: int, ranks: int = 1) -> None:
    """Intra-op threads; 0 = every core this process may use, shared with the other ranks on this machine."""
    torch.set_num_threads(threads or max(1, usable_cores() // ranks))
