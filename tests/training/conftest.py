"""A training run small enough to be done many times."""

import io

import pytest
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from sammed3d_backbone.training import engine, optim
from sammed3d_backbone.training.runs import Progress, Run, State


class Noisy(nn.Module):
    """A linear layer with dropout, so that a step draws random numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.layer(self.drop(x))


class Toy:
    """One process's view of a run: everything a recipe sets up, and its loop."""

    def __init__(
        self,
        folder,
        *,
        steps=8,
        validate_every=4,
        log_every=2,
        save_every_s=0.0,
        accumulate=1,
        bad=None,
    ):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.accumulate = accumulate
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        torch.manual_seed(0)
        model = Noisy()
        self.ema = ModelEmaV3(model, decay=0.9, use_warmup=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optim.layer_decayed(model))
        self.progress, self.run = Progress(), Run(folder)
        self.training = State(self.model, self.optimizer, self.ema, self.progress)
        self.resumed = self.run.resume(self.accelerator, self.training)
        self.schedule = engine.Schedule(
            steps=steps,
            validate_every=validate_every,
            lr=1e-2,
            warmup_steps=2,
            clip=1.0,
            log_every=log_every,
            save_every_s=save_every_s,
            seed=5,
        )
        self.bar = tqdm(file=io.StringIO())
        self.bad = bad  # step whose loss is not finite

    def batch(self, number):
        generator = torch.Generator().manual_seed(number)
        return {"image": torch.randn(6, 4, generator=generator), "number": torch.tensor(number)}

    def batches(self, first, stop):
        """Batches of some steps, split into the accumulated shares."""
        for number in range(first, stop):
            batch = self.batch(number)
            for share in batch["image"].chunk(self.accumulate):
                yield batch | {"image": share}

    def step(self, model, batch):
        loss = model(batch["image"]).square().mean()
        is_bad = self.bad is not None and int(batch["number"]) == self.bad
        return loss * float("nan") if is_bad else loss

    def go(self):
        """The loop of a recipe, with a validation that takes the weight's mean."""
        while self.progress.step < self.schedule.steps:
            first = self.progress.step
            engine.train(
                self.accelerator,
                self.step,
                self.training,
                self.batches(first, self.schedule.next_stop(first)),
                self.run,
                self.schedule,
                self.bar,
            )
            score = float(self.ema.module.layer.weight.detach().mean())
            self.run.record(step=self.progress.step, mean_dice=score)
            self.progress.scored(score)
            self.run.save(self.accelerator, self.training)

    def state(self):
        """Everything that has to be equal after a resume."""
        tensors = [*self.model.state_dict().values(), *self.ema.state_dict().values()]
        for entry in self.optimizer.state_dict()["state"].values():
            tensors += [value for _, value in sorted(entry.items())]
        return tensors

    def log(self):
        """The log without times."""
        clocks = ("seconds", "cpu_seconds", "images_per_s", "memory_gib")
        return [{k: v for k, v in r.items() if k not in clocks} for r in self.run.records()]


@pytest.fixture
def toy(tmp_path):
    """Sets up the run of a name, as a new process would."""

    def make(name="run", **changes):
        return Toy(tmp_path / name, **changes)

    return make
