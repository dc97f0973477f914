"""What a run will cost, before it begins: memory by calculation, time by doing the first steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from sammed3d_backbone.training import engine, memory
from sammed3d_backbone.training.runs import Progress, Run, State


@dataclass(frozen=True)
class Rehearsal:
    """Cost of a run.

    Args:
        expected: Memory, calculated before the steps.
        peak_bytes: Memory as it was: weights, their average, and all that the steps added.
        step_seconds: Of each step that was done.
        steps: Of the whole run.
    """

    expected: memory.Memory
    peak_bytes: int
    step_seconds: tuple[float, ...]
    steps: int

    def __str__(self) -> str:
        """Two lines."""
        each = ", ".join(f"{seconds:.2f}" for seconds in self.step_seconds)
        total = timedelta(seconds=round(self.steps * statistics.median(self.step_seconds)))
        return (
            f"memory: {self.expected}; in {len(self.step_seconds)} steps it was "
            f"{self.peak_bytes / 2**30:.2f} GiB\n"
            f"time: {total} for {self.steps} steps, validation left out (measured: {each} s a step)"
        )

    def figures(self) -> dict[str, object]:
        """The same as plain values."""
        return {
            "expected_bytes": self.expected.total,
            "expected_parts_bytes": dict(self.expected.parts),
            "peak_bytes": self.peak_bytes,
            "step_seconds": [round(seconds, 3) for seconds in self.step_seconds],
        }


def rehearse(
    accelerator: Accelerator,
    step: engine.Step,
    model: nn.Module,
    batches: Iterator[engine.Batch],
    optimizer: torch.optim.Optimizer,
    ema: ModelEmaV3,
    schedule: engine.Schedule,
) -> Rehearsal:
    """Trains for up to three steps and measures them; writes nothing, and spoils what it trains.

    Args:
        accelerator: As for `engine.train`, like the other arguments.
        step: Loss of a batch.
        model: Is trained.
        batches: Those of the first steps.
        optimizer: Is used.
        ema: Of a model that is not trained yet.
        schedule: Of the run that is to come.
    """
    first = next(batches)
    learning = {
        name for name, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad
    }
    # The average is a copy that the accelerator has not wrapped.
    expected = memory.estimate(ema.module, learning, step, first, accelerator)
    upcoming = chain([first], batches)
    count = min(3, schedule.steps)
    # Neither the log nor a checkpoint comes due.
    quiet = replace(schedule, steps=schedule.steps + 1, log_every=count + 1)
    state = State(model, optimizer, ema, Progress(accelerator.num_processes))
    run = Run(Path(), writes=False)
    seconds = []
    before = memory.forget_peak(accelerator.device)
    for _ in range(count):
        began = time.monotonic()
        now = islice(upcoming, accelerator.gradient_accumulation_steps)
        bar = tqdm(disable=True)
        engine.train(accelerator, step, state, now, run, quiet, bar)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
        seconds.append(time.monotonic() - began)
    held = expected.parts["weights"] + expected.parts["average"]
    added = memory.peak_bytes(accelerator.device) - before
    return Rehearsal(expected, held + added, tuple(seconds), schedule.steps)
