"""Prepared cases -> the numbered stream of training crops.

Sample number n of a run is a pure function of (seed, n): which case, where the crop lies and how it
is augmented. So a resumed run, another number of workers or of processes sees the same samples,
and nothing but the number of finished steps has to be saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sammed3d_backbone.data.preparation import PreparedCase
from sammed3d_backbone.data.preprocessing import Preprocessing


class Augmentation(Protocol):
    """The interface of MONAI's random transforms on dictionaries."""

    def set_random_state(self, seed: int) -> object:
        """Makes the next call depend on the seed only."""

    def __call__(self, data: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The augmented ``image`` and ``label``."""


class CropStream(Dataset[dict[str, Tensor]]):
    """Training samples of a run, by number; every case comes once per epoch, in a new order.

    Shapes:
        returns: ``image`` (C, X, Y, Z) float32 and ``label`` (1, X, Y, Z) int64, of `crop_vox`;
            ``annotated`` (K,) bool, as in `PreparedCase`.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        preprocessing: Preprocessing,
        *,
        samples: int,
        seed: int,
        on_foreground: float = 0.5,
        augment: Augmentation | None = None,
    ) -> None:
        """All samples of a run.

        Args:
            cases: Prepared cases, none smaller than the crop.
            preprocessing: Size of the crop, and how a crop is normalised before augmentation.
            samples: Number of samples of the whole run.
            seed: Seed of the run.
            on_foreground: Share of crops centred on a voxel of a class. A class is drawn the
                likelier the fewer cases have it, so that those annotated here and there are seen
                about as often as the others.
            augment: Applied to every crop.
        """
        self.cases = cases
        self.preprocessing = preprocessing
        self.samples = samples
        self.seed = seed
        self.on_foreground = on_foreground
        self.augment = augment
        self.foreground = [_foreground(case.label, len(case.annotated)) for case in cases]
        self.cases_with = Counter(value for classes in self.foreground for value in classes)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        epoch, position = divmod(number, len(self.cases))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.cases))
        which = int(order[position])
        rng = np.random.default_rng((self.seed, 1, number))
        case = self.cases[which]
        corner = self._corner(rng, which)
        sides = self.preprocessing.crop_vox
        window = (slice(None), *(slice(c, c + n) for c, n in zip(corner, sides, strict=True)))
        image = self.preprocessing.crops(case.image[window].clone()[None])[0]
        sample = {"image": image, "label": case.label[window].clone()}
        if self.augment is not None:
            self.augment.set_random_state(seed=int(rng.integers(2**32)))
            sample = dict(self.augment(sample))
        # MONAI gives its own subclass of tensors, which would slow every operation down from here
        return {
            "image": sample["image"].as_subclass(Tensor).float().contiguous(),
            "label": sample["label"].as_subclass(Tensor).long().contiguous(),
            "annotated": case.annotated,
        }

    def _corner(self, rng: np.random.Generator, which: int) -> list[int]:
        """First voxel of the crop."""
        sides, shape = self.preprocessing.crop_vox, self.cases[which].image.shape[1:]
        room = [n - side for n, side in zip(shape, sides, strict=True)]
        classes = self.foreground[which]
        if classes and rng.random() < self.on_foreground:
            values = sorted(classes)
            rarity = np.array([1 / self.cases_with[value] for value in values])
            voxels = classes[int(rng.choice(values, p=rarity / rarity.sum()))]
            centre = voxels[int(rng.integers(len(voxels)))].tolist()
            wanted = [c - side // 2 for c, side in zip(centre, sides, strict=True)]
            return [min(max(w, 0), r) for w, r in zip(wanted, room, strict=True)]
        return [int(rng.integers(r + 1)) for r in room]


def _foreground(label: Tensor, classes: int, most: int = 4096) -> dict[int, Tensor]:
    """Some voxels of each class that occurs, to centre crops on, evenly picked.

    Shapes:
        label: (1, X, Y, Z).
        returns: class -> (N, 3) indices, N at most `most`.
    """
    voxels = {}
    for value in torch.unique(label).tolist():
        if 0 < value < classes:
            found = torch.nonzero(label[0] == value)
            # A strided view would keep the indices of all voxels in memory.
            voxels[int(value)] = found[:: -(-len(found) // most)].clone()
    return voxels
