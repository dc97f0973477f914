"""The parts of a training loop that every recipe shares: schedule, seeds, log, checkpoints.

Random numbers inside a step (drop path) are seeded by the number of the step, so that a run that
was killed and resumed ends with the same bits as an uninterrupted one. `train` is a whole loop for
recipes whose loss is one call; recipes/finetune_unetr.py writes its loop out.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from sammed3d_backbone.provenance import resident_bytes
from sammed3d_backbone.training import optim
from sammed3d_backbone.training.runs import Progress, Run, State

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
MAX_WORKERS = 8  # processes that make samples, per process that trains

Step = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Schedule:
    """When what happens during a run, in optimiser steps.

    A warm-up that is not shorter than the run becomes a tenth of it, with a warning.
    """

    steps: int
    validate_every: int
    lr: float
    warmup_steps: int
    clip: float  # largest norm of all gradients together
    log_every: int
    save_every_s: float
    seed: int
    freeze_steps: int = 0  # at the start, in which a part of the network is frozen
    first_step: int = 0  # where the run starts; the warm-up begins there
    decay_steps: int | None = None  # last steps, in which a constant rate falls to 0; None: cosine

    def __post_init__(self) -> None:
        room = self.steps - self.freeze_steps - self.first_step
        if self.warmup_steps >= room > 0:
            logger.warning(
                "warmup_steps=%d of %d steps to train would never reach lr=%g: %d are taken",
                *(self.warmup_steps, room, self.lr, room // 10),
            )
            object.__setattr__(self, "warmup_steps", room // 10)
        if self.decay_steps is not None and self.decay_steps > room > 0:
            raise ValueError(
                f"decay_steps={self.decay_steps}, but only {room} steps are trained; give fewer"
            )
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip}; give a positive number, or .inf for no limit")

    @property
    def stops(self) -> int:
        """How often training pauses for validation."""
        return -(-self.steps // self.validate_every)

    def next_stop(self, step: int) -> int:
        """The step after which training pauses for validation, seen from a finished step."""
        return min(self.steps, (step // self.validate_every + 1) * self.validate_every)

    def is_stop(self, step: int) -> bool:
        """Whether training pauses for validation after a step."""
        return step == self.next_stop(step - 1)

    def lr_at(self, step: int) -> float:
        """The learning rate of the last layers in step number `step`, counted from 0.

        Linear warm-up, then cosine decay. While a part is frozen, the rest warms up and keeps its
        rate; when the part joins, all warm up again, since a pretrained part that begins at the
        full rate would lose what it has learned.

        With `decay_steps` the rate is constant until the last steps, in which it falls in a line.

        Source: the sawtooth schedule of Wald et al., An OpenMind for 3D medical vision
        self-supervised learning, 2025.
        """
        if step < self.freeze_steps:
            return self.lr * min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay_steps is not None:
            up = min(1.0, (step - self.first_step + 1) / (self.warmup_steps + 1))
            down = (self.steps - step) / self.decay_steps if self.decay_steps else 1.0
            return self.lr * min(up, down)
        waited = self.freeze_steps
        return self.lr * optim.warmup_cosine(step - waited, self.steps - waited, self.warmup_steps)


def make_accelerator(
    *,
    accumulate: int,
    mixed_precision: str,
    partly_frozen: bool = False,
    **options: Any,  # noqa: ANN401
) -> Accelerator:
    """An accelerator with exactly these settings.

    Args:
        accumulate: Passes per optimiser step.
        mixed_precision: "no" or "bf16".
        partly_frozen: Whether a part of the network has no gradients in some steps, for which DDP
            has to be prepared.
        options: Further arguments of `Accelerator`.

    Raises:
        ValueError: If the environment, which a launcher sets, wins over an argument.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=accumulate,
        mixed_precision=mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=partly_frozen)],
        **options,
    )
    asked = {
        "gradient_accumulation_steps": accumulate,
        "mixed_precision": mixed_precision,
    }
    for name, value in asked.items():
        if (taken := getattr(accelerator, name)) != value:
            raise ValueError(
                f"accelerate takes {name} {taken!r} from its environment, and the configuration "
                f"says {value!r}; unset ACCELERATE_{name.upper()}, or make both the same"
            )
    return accelerator


class Means:
    """Scalars of steps, averaged from one line of the log to the next."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._noted: list[Mapping[str, Tensor]] = []

    def note(self, figures: Mapping[str, Tensor]) -> None:
        """Takes the scalars of a step, the same names every time."""
        self._noted.append({name: value.detach() for name, value in figures.items()})

    def taken(self) -> dict[str, float]:
        """The means over all steps since the last call, and over all processes."""
        noted, self._noted = self._noted, []
        rows = torch.stack([torch.stack(list(figures.values())) for figures in noted])
        means = self._accelerator.reduce(rows.mean(0), "mean")
        return dict(zip(noted[0], means.tolist(), strict=True))


class Meter:
    """Loss, gradient norm, speed and memory, written to log and progress bar every few steps.

    Args:
        accelerator: The one that prepared the model.
        run: Gets the lines of the log.
        progress: Its clocks are advanced.
        schedule: The numbers of the whole run.
        bar: Shows the newest line.
        figures: More figures for a line of the log; called once per line.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: Run,
        progress: Progress,
        schedule: Schedule,
        bar: tqdm[Any],
        figures: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.accelerator, self.run, self.progress = accelerator, run, progress
        self.schedule, self.bar, self.figures = schedule, bar, figures
        self.restart()

    def restart(self) -> None:
        """Begins a new average and starts the clocks; called after a pause such as validation."""
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._images = 0
        self._saved = self._clock = time.monotonic()
        self._cpu_clock = time.process_time()

    def note(self, loss: Tensor, norm: Tensor | None, images: int) -> None:
        """Takes the figures of one pass; the norm is None unless it ended a step."""
        self._losses.append(loss.detach())
        self._images += images
        if norm is not None:
            self._norms.append(norm)

    def log(self, state: State) -> None:
        """Writes a line after every `log_every` steps and the last, and a checkpoint if it is time.

        A checkpoint is written only together with a line, so that no line averages over a resume,
        and not where training pauses: there it comes after the validation.

        Raises:
            FloatingPointError: If loss or gradient are not finite. An infinite norm clips a step to
                nothing, so the run would continue without learning.
        """
        step, schedule = self.progress.step, self.schedule
        if step % schedule.log_every and step != schedule.steps:
            return
        now, cpu_now = time.monotonic(), time.process_time()
        self.progress.seconds += now - self._clock
        self.progress.cpu_seconds += cpu_now - self._cpu_clock
        loss = float(self.accelerator.reduce(torch.stack(self._losses).mean(), "mean"))
        norm = float(torch.stack(self._norms).mean())
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"the loss is {loss} and the gradient's norm {norm} at step {step}; lower lr=, or "
                "set mixed_precision=no"
            )
        speed = self._images * self.accelerator.num_processes / (now - self._clock)
        peak = max(self.progress.peak_bytes, peak_bytes(self.accelerator.device))
        self.progress.peak_bytes = peak
        lr = schedule.lr_at(step - 1)
        self.run.record(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            images_per_s=round(speed, 3),
            memory_gib=round(peak / 2**30, 3),
            seconds=round(self.progress.seconds, 1),
            cpu_seconds=round(self.progress.cpu_seconds, 1),
            **self.figures(),
        )
        dice = "-" if self.progress.dice is None else f"{self.progress.dice:.3f}"
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, Dice {dice}, lr {lr:.1e}, {speed:.2g} images/s, "
            f"{peak / 2**30:.1f} GiB",
            refresh=False,
        )
        saved = self._saved
        self.restart()
        self._saved = saved
        is_due = torch.tensor(
            float(now - saved > schedule.save_every_s), device=self.accelerator.device
        )  # the clocks of several processes differ
        if self.accelerator.reduce(is_due, "sum") > 0 and not schedule.is_stop(step):
            self.save(state)

    def save(self, state: State) -> None:
        """Writes a checkpoint, and counts the time to the next one from here."""
        self.run.save(self.accelerator, state)
        self._saved = time.monotonic()


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
        figures: More figures for a line of the log; called once per line.
    """
    model, optimizer, progress = state.model, state.optimizer, state.progress
    model.train()
    meter = Meter(accelerator, run, progress, schedule, bar, figures)
    for number, batch in enumerate(batches):
        optim.set_lr(optimizer, schedule.lr_at(progress.step))
        share = number % accelerator.gradient_accumulation_steps
        seed_step(schedule.seed, progress.step, share, accelerator.process_index)
        norm = None
        with accelerator.accumulate(model):
            loss = step(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), schedule.clip)
            optimizer.step()  # this and the next do nothing before the last pass of a step
            optimizer.zero_grad()
        meter.note(loss, norm, len(batch["image"]))
        if norm is None:
            continue
        progress.step += 1
        state.ema.update(accelerator.unwrap_model(model), step=progress.step)
        bar.update()
        meter.log(state)


def loader_workers(asked: int | None, device: torch.device) -> int:
    """The number of processes that make samples, unless it is given.

    None on a CPU, where the network needs every core itself.
    """
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else min(torch.get_num_threads(), MAX_WORKERS)


def peak_bytes(device: torch.device) -> int:
    """The largest memory that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resident_bytes("VmHWM")


def seed_step(*parts: int) -> None:
    """Seeds torch by the run's seed and the numbers of step, pass and process."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
