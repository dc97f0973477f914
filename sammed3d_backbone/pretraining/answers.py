"""A teacher's answers as files, and the stream of training samples that is made of them.

The teacher runs once per crop, whatever the number of epochs and students. Letters as in `teacher`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from sammed3d_backbone.files import atomic_path, make_folder
from sammed3d_backbone.pretraining.sample_stream import SampleStream, random_contrast
from sammed3d_backbone.pretraining.teacher import Answer, masks_of


def write_answer(path: Path, answer: Answer, smallest_vox: int) -> None:
    """Writes the file of a crop; it is complete or not there.

    Its metadata say how many objects it holds: masks, and labels of at least `smallest_vox` voxels.

    Raises:
        ValueError: If a value is not finite.
    """
    if not _is_finite(answer):
        raise ValueError(
            "the teacher's outputs are NaN or infinite; use another teacher=, or mixed_precision=no"
        )
    make_folder(path.parent)
    number = len(answer.logits) + len(_large(answer.labels, smallest_vox))
    tensors = {name: tensor.contiguous() for name, tensor in answer._asdict().items()}
    with atomic_path(path) as draft:
        draft.write_bytes(save(tensors, {"objects": str(number)}))


def objects_in(path: Path) -> int | None:
    """The number of objects in the file of a crop; None if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            is_whole = {*file.keys()} == {*Answer._fields}
            return int((file.metadata() or {})["objects"]) if is_whole else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def read_answer(path: Path) -> Answer:
    """The answer in the file of a crop.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        answer = Answer(**load_file(path))
        if not _is_finite(answer):
            raise ValueError("it holds NaN or infinity")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it, so that the teacher answers again"
        ) from None
    return answer


@dataclass(frozen=True)
class Answers:
    """The files of a source, each with an object."""

    name: str
    paths: tuple[Path, ...]


@dataclass(eq=False, repr=False)
class AnswerStream(SampleStream[Answers]):
    """Training samples made of a teacher's answers; `augment` must not move the image.

    Shapes:
        returns: What `SampleStream` has, objects being the teacher's masks, and labels;
            ``embedding`` (T, x, y, z) float32.

    Args:
        smallest_vox: Smallest size of a labelled object.
        label_share: Share of the objects that are labels, where a crop has both.
    """

    _: KW_ONLY
    smallest_vox: int
    label_share: float = 0.0

    def sample(self, rng: np.random.Generator, source: Answers, number: int) -> dict[str, Tensor]:
        """See `SampleStream`."""
        answer = read_answer(source.paths[int(rng.integers(len(source.paths)))])
        image, labels = answer.image.float()[None], answer.labels[None]
        objects = self._objects(rng, answer)
        if rng.random() < self.contrast_share:
            image = random_contrast(rng, image, labels)
        image, _ = self.augmented(rng, image, labels)
        return {
            "image": image,
            "objects": objects,
            **self.interaction(rng, number),
            "embedding": answer.embedding.float(),
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


def _is_finite(answer: Answer) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in answer)


def _large(labels: Tensor, smallest_vox: int) -> NDArray[np.int64]:
    """The values of labels with at least so many voxels."""
    counts = np.bincount(labels.numpy().ravel())
    counts[:1] = 0  # no object
    values: NDArray[np.int64] = np.flatnonzero(counts >= max(1, smallest_vox))
    return values
