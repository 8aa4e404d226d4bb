"""Assembles a training step and launches it: eagerly, compiled where that pays, or captured as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar.config import RunConfig
from fastcifar.data.loader import Loader
from fastcifar.device import synchronize
from fastcifar.engine.compile import (
    CapturedSteps,
    Obstacle,
    Recorder,
    Why,
    compile_function,
    mark_of,
    obstacle_to_capture,
    obstacle_to_compiling,
    timed,
)
from fastcifar.engine.evaluate import Evaluator
from fastcifar.engine.objective import BatchMetrics, Objective
from fastcifar.engine.state import TrainingState
from fastcifar.engine.step import (
    Average,
    Backward,
    Clip,
    Forward,
    Observer,
    Part,
    SlicedPass,
    Step,
    Update,
    Workspace,
    unobserved,
)
from fastcifar.errors import FastcifarError, reason
from fastcifar.optim.sharpness import Ascend, Return

SMALL_STEP_FLOPS = 1e11
"""Below this, a large GPU takes a fraction of a millisecond for a step, so several steps share one launch."""


class Launcher:
    """Launches a run's steps, with `evaluator` captured alongside; `training_flops`, for one image, takes a while."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainingState,
        objective: Objective,
        evaluator: Evaluator,
        loader: Loader,
        training_flops: Callable[[], float],
    ) -> None:
        self.config, self.state, self.objective = config, state, objective
        self.evaluator, self.loader, self.training_flops = evaluator, loader, training_flops
        self.pass_size = min(config.engine.micro_batch or config.batch_size, config.batch_size)
        self.compiled = False
        self.captured: CapturedSteps | None = None
        self.step = self.build_step(objective)

    def build_step(self, objective: Callable[[Tensor, Tensor], BatchMetrics]) -> Step:
        state, optim = self.state, self.config.optim.resolved
        gradient: list[Part] = [Forward(objective, state.shadow), Backward(state.scaler, state.shadow)]
        if self.pass_size < self.config.batch_size:
            gradient = [SlicedPass(objective, state.scaler, state.shadow, self.pass_size)]
        parts = list(gradient)
        if optim.sharpness != "none":
            ascend = Ascend(state.model, state.buckets, optim)
            parts += [ascend, *gradient, Return(ascend)]
        parts += [Clip(state.optimizer, state.scaler, optim.clip_norm)] if optim.clip_norm else []
        parts += [Update(state.optimizer, state.scaler, state.lr, state.momentum)]
        parts += [Average(state.averages, state.book and state.book.decays)] if self.config.average.decays else []
        return Step((*parts, state.book or state.meter))

    def __call__(self, images: Tensor, labels: Tensor, observe: Observer = unobserved) -> None:
        """Launches a step, at once or together with later ones; with `observe`, part by part."""
        if self.captured and observe is unobserved:
            self.captured(images, labels)
        else:
            self.step(Workspace(None if self.state.book else self.state.steps_done, images, labels), observe)

    @property
    def waiting(self) -> int:
        return self.captured.filled if self.captured else 0

    def finish(self) -> None:
        if self.captured:
            self.captured.flush()

    def blank_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns `count` black images and their labels, with the shapes and dtypes of the run's batches."""
        dataset, device = self.loader.dataset, self.state.device
        size, classes = dataset.images.shape[1:3], len(dataset.classes)
        images = torch.zeros(count, *size, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        labels = torch.zeros(count, dtype=torch.int64, device=device)
        return images, F.one_hot(labels, classes).float() if self.loader.policy.mix else labels

    def rehearse(self, objective: Callable[[Tensor, Tensor], BatchMetrics]) -> None:
        """Runs a forward and backward pass and waits for it; the running statistics change."""
        objective(*self.blank_batch(self.pass_size)).loss.backward()
        synchronize(self.state.device)
        self.state.drop_gradients()

    def compile(self, announce: Callable[[], None]) -> float | Obstacle:
        """Announces and compiles the forward and backward pass where that pays; returns the seconds or the obstacle."""
        state, requested = self.state, self.config.engine.compile
        device, remaining = state.device.type, state.total_steps - state.steps_done
        mark = mark_of(self.config, state.device)
        if obstacle := obstacle_to_compiling(requested, remaining, self.eager_step_seconds, device, mark.exists()):
            return obstacle
        announce()
        start = time.perf_counter()
        with state.unchanged():
            compiled = compile_function(self.objective, device, self.rehearse, mark)
        if isinstance(compiled, Obstacle):
            return compiled
        self.step, self.compiled, self.captured = self.build_step(compiled), True, None
        return time.perf_counter() - start

    def eager_step_seconds(self) -> float:
        """Measures the seconds of an uncompiled step, captured where possible, since launching adds the host's time."""
        self.capture()
        with self.state.unchanged():
            if self.captured is None:
                return min([timed(self.rehearse, self.objective) for _ in range(4)][1:])
            return min([timed(self.replay, self.captured) for _ in range(4)][1:]) / self.captured.count

    def replay(self, captured: CapturedSteps) -> None:
        captured.all()
        synchronize(self.state.device)

    def capture(self) -> int | Obstacle:
        """Captures steps and evaluations as CUDA graphs; returns the steps in a launch, or why it was not done.

        Weights and state are left unchanged. Raises FastcifarError where CUDA itself reports an error, after which
        nothing on the device can be trusted.
        """
        state = self.state
        if self.captured:
            return self.captured.count
        if state.book is None or self.config.engine.capture == "off":
            return Obstacle(Why.ASKED)
        if obstacle := obstacle_to_capture(state.optimizer, state.scaler, state.total_steps):
            return obstacle
        try:
            with state.unchanged():
                return self.record()
        except torch.AcceleratorError as error:
            raise FastcifarError(
                f"recording a step as a CUDA graph failed ({reason(error)}); try --capture off, which launches every "
                "kernel by itself."
            ) from error

    def record(self) -> int | Obstacle:
        """Does the work of `capture`; it changes the state by a few steps, and raises CUDA's own errors."""
        images, labels = self.blank_batch(self.config.batch_size)
        count = 8 if self.config.batch_size * self.training_flops() < SMALL_STEP_FLOPS else 1
        try:
            recorder = Recorder(self.state.device)
            recorder.warm_up(lambda: self.step(Workspace(None, images, labels)))
            captured = CapturedSteps(self.step, images, labels, count, recorder)
            self.evaluator.capture((images.shape[2], images.shape[3]), recorder)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            return Obstacle(Why.FAILED, reason(error))
        self.captured = captured
        return count
