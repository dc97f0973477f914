"""The body of the training loop, once: step, clip, learning rate, EMA, log, checkpoint.

A recipe passes `step(model, batch) -> loss`; everything task-specific is in it and in the batches.
Random numbers inside a step (drop path) are seeded by the number of the step, so that a run that
was killed and went on ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from sammed3d_backbone.training import optim
from sammed3d_backbone.training.memory import peak_bytes
from sammed3d_backbone.training.runs import Run, State

Batch = Mapping[str, Tensor]
Step = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How a run unfolds over its optimiser steps."""

    steps: int
    validate_every: int
    lr: float
    warmup_steps: int
    clip: float  # largest norm of all gradients together
    log_every: int
    save_every_s: float
    seed: int
    freeze_steps: int = 0  # at the start, in which a part of the network waits

    def next_stop(self, step: int) -> int:
        """The step after which training pauses for validation, seen from a finished step."""
        return min(self.steps, (step // self.validate_every + 1) * self.validate_every)

    def lr_at(self, step: int) -> float:
        """The learning rate of the last layers in step number `step`, counted from 0.

        Up in a line, then down along a cosine. If a part waits, the rest goes up and stays there,
        and when all learn, everything starts from low again: a part that begins to learn at the
        full rate would lose what it knows.

        Source: the sawtooth schedule of Wald et al., An OpenMind for 3D medical vision
        self-supervised learning, 2025.
        """
        if step < self.freeze_steps:
            return self.lr * min(1.0, (step + 1) / (self.warmup_steps + 1))
        waited = self.freeze_steps
        return self.lr * optim.warmup_cosine(step - waited, self.steps - waited, self.warmup_steps)


class Means:
    """Figures of steps, averaged from one line of the log to the next."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._noted: list[Mapping[str, Tensor]] = []

    def note(self, figures: Mapping[str, Tensor]) -> None:
        """Takes the scalars of a step, the same ones every time."""
        self._noted.append({name: value.detach() for name, value in figures.items()})

    def taken(self) -> dict[str, float]:
        """The means over all steps since the last call, and over all processes."""
        noted, self._noted = self._noted, []
        rows = torch.stack([torch.stack(list(figures.values())) for figures in noted])
        means = self._accelerator.reduce(rows.mean(0), "mean")
        return dict(zip(noted[0], means.tolist(), strict=True))


def train(
    accelerator: Accelerator,
    step: Step,
    state: State,
    batches: Iterable[Batch],
    run: Run,
    schedule: Schedule,
    bar: tqdm[Any],
    figures: Callable[[], Mapping[str, float]] = dict,
) -> None:
    """Trains on the given batches, and logs and saves on the way.

    As many batches as the accelerator accumulates make one optimiser step, on the mean of their
    gradients. It is that of one large batch if the loss is a mean over cases.

    Args:
        accelerator: The one that prepared model, batches and optimiser.
        step: Loss of a batch.
        state: Is trained; the model is left in training mode.
        batches: The batches of the steps to do now.
        run: Gets a line every `log_every` steps and a checkpoint every `save_every_s` seconds.
        schedule: The numbers of the whole run.
        bar: Advanced by one per step.
        figures: What else a line of the log says; asked once per line.
    """
    model, optimizer, ema, progress = state.model, state.optimizer, state.ema, state.progress
    model.train()
    stop = schedule.next_stop(progress.step)
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    saved = clock = time.monotonic()
    cpu_clock = time.process_time()
    for batch in batches:
        lr = schedule.lr_at(progress.step)
        optim.set_lr(optimizer, lr)
        share = len(losses) % accelerator.gradient_accumulation_steps
        seed_step(schedule.seed, progress.step, share, accelerator.process_index)
        with accelerator.accumulate(model):
            loss = step(model, batch)
            losses.append(loss.detach())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), schedule.clip))
            optimizer.step()  # this and the next do nothing before the last share
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        progress.step += 1
        ema.update(accelerator.unwrap_model(model), step=progress.step)
        bar.update()
        if progress.step % schedule.log_every == 0 or progress.step == schedule.steps:
            now = time.monotonic()
            cpu_now = time.process_time()
            progress.seconds += now - clock
            progress.cpu_seconds += cpu_now - cpu_clock
            mean = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
            norm = float(torch.stack(norms).mean())
            # An infinite norm clips a step to nothing, so the run would go on and learn little.
            if not math.isfinite(mean + norm):
                raise FloatingPointError(
                    f"the loss is {mean} and the gradient's norm {norm} at step {progress.step}; "
                    "lower lr=, or set mixed_precision=no"
                )
            rate = len(losses) * len(batch["image"]) * accelerator.num_processes / (now - clock)
            clock, cpu_clock = now, cpu_now
            progress.peak_bytes = max(progress.peak_bytes, peak_bytes(accelerator.device))
            gib = progress.peak_bytes / 2**30
            run.record(
                step=progress.step,
                loss=mean,
                lr=lr,
                grad_norm=norm,
                images_per_s=round(rate, 3),
                memory_gib=round(gib, 3),
                seconds=round(progress.seconds, 1),
                cpu_seconds=round(progress.cpu_seconds, 1),
                **figures(),
            )
            bar.set_postfix_str(
                f"loss {mean:.3f}, Dice {_shown(progress.dice)}, lr {lr:.1e}, "
                f"{rate:.2g} images/s, {gib:.1f} GiB",
                refresh=False,
            )
            losses, norms = [], []
            # Only here, so that no line of the log averages over a restart, and not at the stop,
            # where the checkpoint has to come after the validation.
            if progress.step < stop and _agreed(accelerator, now - saved > schedule.save_every_s):
                run.save(accelerator, state)
                saved = time.monotonic()


def _shown(dice: float | None) -> str:
    """A score, or that there is none yet."""
    return "-" if dice is None else f"{dice:.3f}"


def _agreed(accelerator: Accelerator, wish: bool) -> bool:
    """Whether any process wishes; the clocks of several processes differ."""
    flag = torch.tensor(float(wish), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)


def seed_step(*parts: int) -> None:
    """Seeds torch by the run's seed and the numbers of step, pass and process."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
