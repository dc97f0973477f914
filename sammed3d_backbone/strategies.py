"""Strategies of simulated clicks, one function each, for the benchmark and for training.

A strategy takes `Errors` and returns a `Click` on a wrong voxel of the mask, or None if there is
nothing left to correct. The first click corrects an empty mask. Training uses `uniform` and
`deepest` in the batched form of `pretraining.click_cells`.

Strategies work on arrays that are reoriented to R, A, S, so that the clicks do not depend on the
order and direction of the axes in a file. Random strategies draw from `Draws`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsInt, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sammed3d_backbone.data.geometry import Triple, nearest_ras
from sammed3d_backbone.data.regions import Mask, bounding_box, depth_mm

Orientation = tuple[Triple, tuple[bool, bool, bool]]  # as returned by `nearest_ras`
Entries = TypeVar("Entries", bound=np.generic)

TOUCHING = np.ones((3, 3, 3), dtype=bool)  # 26-connectivity: corners count
TIE = 1e-6  # depths closer than this share of the greatest count as equal


@dataclass(frozen=True)
class Click:
    """One point on a volume's own grid."""

    point_vox: Triple  # voxel centres at integer indices
    positive: bool  # inside the object
    is_repeat: bool = False  # the best voxel had been clicked before, this is the next best


class Draws:
    """Random numbers that depend on names only, not on order, global state or library version."""

    def __init__(self, *names: str | int) -> None:
        self._names = names
        digest = hashlib.sha256("|".join(map(str, names)).encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "big"))

    def part(self, *names: str | int) -> Draws:
        """The random numbers of a part, independent of what has been drawn so far."""
        return Draws(*self._names, *names)

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1, each as likely."""
        return int(self._bits.random_raw()) * n >> 64


@dataclass(frozen=True, eq=False)
class Errors:
    """The errors of a mask, and everything else that may determine the next click.

    Shapes:
        truth: (X, Y, Z) bool.
        mask: (X, Y, Z) bool, on the grid of the truth.
        affine: (4, 4), voxel -> RAS+ mm.

    Raises:
        ValueError: If truth and mask are not bool, or not on one grid.
    """

    truth: Mask
    mask: Mask
    affine: NDArray[np.float64]
    draws: Draws
    clicked: Sequence[Click] = ()

    def __post_init__(self) -> None:
        if not self.truth.dtype == self.mask.dtype == bool:
            raise ValueError(
                f"truth of type {self.truth.dtype} and mask of type {self.mask.dtype} are not "
                "masks; compare with > 0 or with a class value"
            )
        if self.truth.shape != self.mask.shape:
            raise ValueError(
                f"truth of {self.truth.shape} and mask of {self.mask.shape} voxels are not on one "
                "grid; resample the mask to the truth's"
            )

    @cached_property
    def missed(self) -> Mask:
        """Voxels of the truth outside the mask; axes towards R, A, S."""
        return _towards_ras(self.truth & ~self.mask, self._orientation)

    @cached_property
    def extra(self) -> Mask:
        """Voxels of the mask outside the truth; axes towards R, A, S."""
        return _towards_ras(self.mask & ~self.truth, self._orientation)

    @cached_property
    def spacing_mm(self) -> NDArray[np.float64]:
        """Along R, A, S, (3,)."""
        axes, _ = self._orientation
        spacing_mm: NDArray[np.float64] = np.linalg.norm(self.affine[:3, :3], axis=0)[list(axes)]
        return spacing_mm

    def click_at(
        self, index: Iterable[SupportsInt], positive: bool, *, is_repeat: bool = False
    ) -> Click:
        """The click on a voxel of `missed` or `extra`, in voxels of the truth's own grid."""
        point_vox = [0, 0, 0]
        for axis, flip, place in zip(*self._orientation, index, strict=True):
            point_vox[axis] = self.truth.shape[axis] - 1 - int(place) if flip else int(place)
        i, j, k = point_vox
        return Click((i, j, k), positive, is_repeat)

    def was_clicked(self, click: Click) -> bool:
        """Whether this voxel has been clicked with the same label."""
        return any(
            earlier.point_vox == click.point_vox and earlier.positive == click.positive
            for earlier in self.clicked
        )

    @cached_property
    def _orientation(self) -> Orientation:
        return nearest_ras(self.affine)


Strategy = Callable[[Errors], Click | None]


def connected_parts(mask: Mask, affine: NDArray[np.float64]) -> Iterator[Mask]:
    """The 26-connected parts of a mask, in the order of their first voxels towards R, A, S.

    Shapes:
        mask: (X, Y, Z).
        affine: (4, 4), voxel -> RAS+ mm.
        yields: (X, Y, Z).
    """
    labels, _ = ndimage.label(mask, structure=TOUCHING)
    oriented = _towards_ras(labels, nearest_ras(affine))
    numbers, first = np.unique(oriented[oriented > 0], return_index=True)
    for number in numbers[np.argsort(first)]:
        yield labels == number


def largest_centre(errors: Errors) -> Click | None:
    """The deepest voxel of the largest connected error; on an empty mask, of the largest part.

    Missed and extra voxels form separate components. Depth is the distance in mm to the nearest
    voxel outside the component; beyond the volume counts as outside. Of equally large components,
    missed ones come first, then the one with the first voxel; of equally deep voxels, the first. A
    voxel that was clicked before with the same label is skipped for the next best.

    Source: protocol clickbench/1, see `clickbench.protocol`.
    """
    components = [*_components(errors.missed, True), *_components(errors.extra, False)]
    components.sort(key=lambda component: -component.voxels)  # stable
    is_repeat = False
    for component in components:
        depths = depth_mm(component.mask, errors.spacing_mm)
        while depths.any():
            deepest = np.argmax(depths >= depths.max() * (1 - TIE))
            index = np.unravel_index(deepest, depths.shape)
            place = np.add(index, component.start)
            click = errors.click_at(place, component.is_missed, is_repeat=is_repeat)
            if not errors.was_clicked(click):
                return click
            is_repeat = True
            depths[index] = 0
    return None


def uniform(errors: Errors) -> Click | None:
    """Any wrong voxel, each as likely; on an empty mask, any voxel of the object.

    Source: ``get_next_click3D_torch_2`` and ``random_sample_next_click`` of SAM-Med3D at 84079e6
    and f3de1fa, with which the released weights were trained.
    """
    return _drawn_from(errors.missed | errors.extra, errors)


def deep(errors: Errors) -> Click | None:
    """Any voxel deeper than half the greatest depth, missed or extra, whichever goes deeper.

    Source: ``get_next_click3D_torch_ritm`` of SAM-Med3D at 84079e6, after RITM.
    """
    depths_mm = [depth_mm(part, errors.spacing_mm) for part in (errors.missed, errors.extra)]
    missed_mm, extra_mm = (float(depths.max()) for depths in depths_mm)
    chosen = depths_mm[0] if missed_mm > extra_mm else depths_mm[1]
    return _drawn_from(chosen > max(missed_mm, extra_mm) / 2, errors)


def deepest(errors: Errors) -> Click | None:
    """One of the deepest voxels, missed or extra, whichever goes deeper; missed ones at a tie.

    Depth is counted in steps to any of the 26 neighbours; outside the volume there is no error.
    """
    depths = [
        ndimage.distance_transform_cdt(np.pad(part, 1), metric="chessboard")[(slice(1, -1),) * 3]
        for part in (errors.missed, errors.extra)
    ]
    missed, extra = (int(depth.max()) for depth in depths)
    depth = depths[0] if missed >= extra else depths[1]
    return _drawn_from((depth == max(missed, extra)) & (depth > 0), errors)


def joint_centre(errors: Errors) -> Click | None:
    """The deepest voxel of the largest error, missed and extra voxels taken together.

    Depth is counted in voxels; ties are broken by a generator that is seeded again for every click,
    so an unchanged mask gets the same click again.

    Source: ``CVPR25_iter_eval.py`` of CVPR-MedSegFMCompetition at 748e862, whose arrays have their
    axes towards S, A, R. Its halving of errors above 6e7 voxels is left out.
    """
    components = list(_components((errors.missed | errors.extra).T, True))  # axes towards S, A, R
    if not components:
        return None
    component = max(components, key=lambda component: component.voxels)  # the first of equals
    depth_vox = depth_mm(component.mask, np.ones(3))
    deepest = np.argwhere(depth_vox == depth_vox.max())
    published = np.random.RandomState(42)  # the evaluator's own stream
    index = (deepest[published.choice(len(deepest))] + component.start)[::-1]
    return errors.click_at(index, bool(errors.missed[tuple(index)]))


def _towards_ras(array: NDArray[Entries], orientation: Orientation) -> NDArray[Entries]:
    """A view of the array whose axes run towards R, A, S."""
    axes, flips = orientation
    return array.transpose(axes)[tuple(slice(None, None, -1 if f else 1) for f in flips)]


def _drawn_from(region: Mask, errors: Errors) -> Click | None:
    """A click on any voxel of a region of the oriented arrays."""
    voxels = np.flatnonzero(region)
    if len(voxels) == 0:
        return None
    index = np.unravel_index(voxels[errors.draws.below(len(voxels))], region.shape)
    return errors.click_at(index, bool(errors.missed[index]))


@dataclass(frozen=True, eq=False)
class _Component:
    """One connected part of the missed or of the extra voxels."""

    labels: NDArray[np.int32]  # numbers of all components
    number: int
    box: tuple[slice, ...]  # bounding box of this component in `labels`
    corner: NDArray[np.int64]  # first voxel of `labels` in the whole array
    voxels: int
    is_missed: bool

    @property
    def mask(self) -> Mask:
        """The component in its bounding box."""
        mask: Mask = self.labels[self.box] == self.number
        return mask

    @property
    def start(self) -> NDArray[np.int64]:
        """First voxel of the bounding box in the whole array."""
        start: NDArray[np.int64] = self.corner + np.array([side.start for side in self.box])
        return start


def _components(region: Mask, is_missed: bool) -> Iterator[_Component]:
    """The connected parts of a region, in the order of their first voxels."""
    box = bounding_box(region)
    if box is None:
        return
    labels, count = ndimage.label(region[box], structure=TOUCHING)
    corner = np.array([side.start for side in box])
    boxes = ndimage.find_objects(labels)
    flat = labels.ravel()
    voxels = np.bincount(flat)
    places = np.flatnonzero(flat)[::-1]
    first = np.zeros(count + 1, dtype=np.int64)
    first[flat[places]] = places  # the last one written is the first voxel
    for number in 1 + np.argsort(first[1:]):
        yield _Component(labels, number, boxes[number - 1], corner, int(voxels[number]), is_missed)
