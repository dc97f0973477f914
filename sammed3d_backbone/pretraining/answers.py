"""A teacher's answers as files, and the stream of training samples that is made of them.

The teacher runs once per crop, whatever the number of epochs and students. Letters as in `teacher`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from sammed3d_backbone.data.crops import Augmentation
from sammed3d_backbone.files import atomic_path
from sammed3d_backbone.pretraining.object_crops import InteractionPlan, random_contrast
from sammed3d_backbone.pretraining.teacher import Answer, masks_of


def write_answer(path: Path, answer: Answer, smallest_vox: int) -> None:
    """Writes the file of a crop; it is complete or not there.

    Its metadata say how many objects it holds: masks, and labels of at least `smallest_vox` voxels.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number = len(answer.logits) + len(_large(answer.labels, smallest_vox))
    tensors = {name: tensor.contiguous() for name, tensor in answer._asdict().items()}
    with atomic_path(path) as draft:
        draft.write_bytes(save(tensors, {"objects": str(number)}))


def objects_in(path: Path) -> int | None:
    """The number of objects in the file of a crop; None if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return int((file.metadata() or {})["objects"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


@dataclass(frozen=True)
class Answers:
    """The files of a source, each with an object."""

    name: str
    paths: tuple[Path, ...]


class AnswerStream(Dataset[dict[str, Tensor]]):
    """Training samples made of a teacher's answers, by number.

    Shapes:
        returns: ``image``, ``objects``, ``draws``, ``plan`` and ``source`` as `ObjectStream` has
            them, and ``embedding`` (T, x, y, z) float32. Objects are the teacher's masks, and
            labels.
    """

    def __init__(
        self,
        sources: Sequence[Answers],
        shares: Sequence[float],
        *,
        objects: int,
        steps: int,
        samples: int,
        seed: tuple[int, ...],
        smallest_vox: int,
        label_share: float = 0.0,
        augment: Augmentation | None = None,
        contrast_share: float = 0.0,
        plan: InteractionPlan | None = None,
        per_step: int = 1,
    ) -> None:
        """All samples of a run; arguments that are not listed are those of `ObjectStream`.

        Args:
            sources: Each with at least one file.
            shares: Relative frequency of each source.
            objects: Number of objects of a sample.
            steps: Number of steps of an interaction.
            samples: Number of samples of the whole run.
            seed: Seed of the run.
            smallest_vox: Smallest size of a labelled object.
            label_share: Share of the objects that are labels, where a crop has both.
            augment: Changes the student's image only; must not move it.
            contrast_share: Share of crops whose contrast is randomised for the student.
            plan: Steps that have a loss; None for all.
            per_step: Samples of an optimiser step.
        """
        self.sources = sources
        self.shares = np.array(shares) / sum(shares)
        self.objects = objects
        self.steps = steps
        self.samples = samples
        self.seed = seed
        self.smallest_vox = smallest_vox
        self.label_share = label_share
        self.augment = augment
        self.contrast_share = contrast_share
        self.plan = plan or InteractionPlan()
        self.per_step = per_step

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((*self.seed, number))
        which = int(rng.choice(len(self.sources), p=self.shares))
        paths = self.sources[which].paths
        answer = Answer(**load_file(paths[int(rng.integers(len(paths)))]))
        image, labels = answer.image.float()[None], answer.labels
        objects = self._objects(rng, answer)
        if rng.random() < self.contrast_share:
            image = random_contrast(rng, image, labels[None])
        if self.augment is not None:
            self.augment.set_random_state(seed=int(rng.integers(2**32)))
            changed = self.augment({"image": image, "label": labels[None]})
            image = changed["image"].as_subclass(Tensor)
        return {
            "image": image.float().contiguous(),
            "objects": objects,
            "draws": torch.from_numpy(rng.random((self.steps, self.objects, 3), np.float32)),
            "plan": torch.tensor(
                self.plan.draw(self.steps, (*self.seed, 1 << 40, number // self.per_step)),
                dtype=torch.uint8,
            ),
            "embedding": answer.embedding.float(),
            "source": torch.tensor(which),
        }

    def _objects(self, rng: np.random.Generator, answer: Answer) -> Tensor:
        """Objects of a crop, (P, S, S, S) bool; where there are fewer, they come several times."""
        values = rng.permutation(_large(answer.labels, self.smallest_vox))
        numbers = rng.permutation(len(answer.logits))
        from_labels = round(self.label_share * self.objects)
        from_labels = min(from_labels, len(values)) if len(numbers) else self.objects
        chosen = np.resize(values, from_labels).tolist() if from_labels else []
        labelled = [answer.labels == value for value in chosen]
        rest = self.objects - from_labels
        if not rest:
            return torch.stack(labelled)
        masks = masks_of(answer.logits[np.resize(numbers, rest)], len(answer.image))
        return torch.cat([torch.stack(labelled), masks]) if labelled else masks


def _large(labels: Tensor, smallest_vox: int) -> NDArray[np.int64]:
    """The values of labels with at least so many voxels."""
    counts = np.bincount(labels.numpy().ravel())
    counts[:1] = 0  # no object
    values: NDArray[np.int64] = np.flatnonzero(counts >= max(1, smallest_vox))
    return values
