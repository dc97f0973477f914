"""Training samples of a run by number, and what all kinds of them draw.

As in `crops`, sample number n is a pure function of (seed, n), the random numbers of its clicks
included, so that neither a kill nor another number of processes changes what is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sammed3d_backbone.data.crops import Augmentation
from sammed3d_backbone.pretraining.click_loss import GRADED, WITHOUT_POINT

AnySource = TypeVar("AnySource")


@dataclass(frozen=True)
class InteractionPlan:
    """Draws the steps of an interaction that have a loss, for every optimiser step.

    These are the first step, one of the next three, and later ones with equal probability, so that
    all numbers of clicks are trained while few steps of each interaction need a gradient.

    Args:
        graded: Number of steps with a loss; None for all.
        without_point: Probability that a step but the first has no new click.
    """

    graded: int | None = None
    without_point: float = 0.0

    def draw(self, steps: int, seed: Sequence[int]) -> list[int]:
        """Sums of `GRADED` and `WITHOUT_POINT` for each step, the same for the same seed."""
        rng = np.random.default_rng(seed)
        graded = set(range(steps))
        if self.graded is not None and self.graded < steps:
            graded = {0}
            if self.graded > 1:
                graded.add(int(rng.integers(1, min(4, steps))))
            rest = list(range(max(graded) + 1, steps))
            rest = rest if len(rest) >= self.graded - len(graded) else [*{*range(steps)} - graded]
            graded |= {*rng.permutation(rest)[: self.graded - len(graded)].tolist()}
        is_without = rng.random(steps) < self.without_point
        return [
            GRADED * (step in graded) + WITHOUT_POINT * (step > 0 and bool(is_without[step]))
            for step in range(steps)
        ]


@dataclass(eq=False, repr=False)
class SampleStream(Dataset[dict[str, Tensor]], Generic[AnySource]):
    """Samples of several sources, which subclasses make.

    Shapes:
        returns: ``image`` (1, S, S, S) float32; ``objects`` (P, S, S, S) bool, none of them empty;
            ``draws`` (N, P, 3) float32 from 0 to 1, for the clicks of N steps; ``plan`` (N,) uint8,
            see `InteractionPlan`; ``source`` the number of the source.

    Args:
        sources: Sources that are mixed.
        shares: Relative frequency of each source.
        objects: Number P; where a crop holds fewer, they come several times.
        steps: Number N of steps of an interaction.
        samples: Number of samples of the whole run.
        seed: Seed of the run; streams with other seeds give other samples.
        augment: Applied to every crop, as ``image`` and ``label``.
        contrast_share: Share of crops whose contrast is randomised.
        plan: Draws the steps that have a loss; by default all.
        per_step: Samples of an optimiser step; they share one plan.

    Raises:
        ValueError: If there is not one positive share for every source.
    """

    sources: Sequence[AnySource]
    shares: Sequence[float]
    _: KW_ONLY
    objects: int
    steps: int
    samples: int
    seed: tuple[int, ...]
    augment: Augmentation | None = None
    contrast_share: float = 0.0
    plan: InteractionPlan = InteractionPlan()
    per_step: int = 1

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.sources) or not all(share > 0 for share in self.shares):
            raise ValueError(
                f"{len(self.sources)} sources with shares={list(self.shares)}; give each one a "
                "share above 0"
            )

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((*self.seed, number))
        shares = np.array(self.shares) / sum(self.shares)
        which = int(rng.choice(len(self.sources), p=shares))
        sample = self.sample(rng, self.sources[which], number)
        return {**sample, "source": torch.tensor(which)}

    def sample(self, rng: np.random.Generator, source: AnySource, number: int) -> dict[str, Tensor]:
        """A sample of a source, without its number."""
        raise NotImplementedError

    def augmented(
        self, rng: np.random.Generator, image: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A crop after the augmentation, the image as float32."""
        if self.augment is not None:
            self.augment.set_random_state(seed=int(rng.integers(2**32)))
            changed = self.augment({"image": image, "label": labels})
            # MONAI gives its own subclass of tensors, which would slow down all that follows.
            image, labels = (changed[key].as_subclass(Tensor) for key in ("image", "label"))
        return image.float().contiguous(), labels

    def interaction(self, rng: np.random.Generator, number: int) -> dict[str, Tensor]:
        """The random numbers of the clicks of a sample, and its plan."""
        seed = (*self.seed, 1 << 40, number // self.per_step)
        return {
            "draws": torch.from_numpy(rng.random((self.steps, self.objects, 3), np.float32)),
            "plan": torch.tensor(self.plan.draw(self.steps, seed), dtype=torch.uint8),
        }


def random_contrast(rng: np.random.Generator, image: Tensor, labels: Tensor) -> Tensor:
    """Contrast randomisation: maps the intensities of a scan at random, partly by label.

    All intensities pass one random piecewise linear curve, which need not be monotonic, and each
    label gets an offset with probability 0.5; mean and deviation stay as they are.

    Shapes:
        image: (1, S, S, S) float32.
        labels: (1, S, S, S) integers.
        returns: (1, S, S, S) float32.
    """
    values = image.numpy()
    low, high = float(values.min()), float(values.max())
    knots = np.sort(rng.uniform(low, high, 6))
    levels = rng.normal(0, 1, 8)
    changed = np.interp(values, [low, *knots, high + 1e-3], levels).astype(np.float32)
    offsets = rng.normal(0, 0.7, 1 + int(labels.max())) * (rng.random(1 + int(labels.max())) < 0.5)
    offsets[0] = 0
    changed = changed + offsets.astype(np.float32)[labels.numpy()]
    scale = float(values.std()) / max(float(changed.std()), 1e-3)
    return torch.from_numpy((changed - changed.mean()) * np.float32(scale) + values.mean())
