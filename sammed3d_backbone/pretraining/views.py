"""The views of two networks on a scan: one crop, cut for each.

Both networks see cubes around one middle, each with its own side and spacing, so a place in mm from
the middle translates one grid into the other. A crop's random zoom, stretch and flips act on both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sammed3d_backbone.data.geometry import Geometry, TripleMm, interpolate_axis
from sammed3d_backbone.data.intensity import IntensityScale, measure_scale, normalise
from sammed3d_backbone.data.limits import value_range
from sammed3d_backbone.data.preprocessing import Modality, Preprocessing
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.pretraining.object_crops import draw_cube, object_voxels

Indices = Sequence[NDArray[Any]]  # continuous indices along each axis
CELLS_PER_TOKEN = 4
AIR_SHARE = 0.05  # of the range of intensities that counts as air
RANGE_PERCENT = 99.5


@dataclass(frozen=True)
class FieldOfView:
    """The input of a network: a cube, its tokens, and how intensities are normalised."""

    side_vox: int
    tokens: int  # along each axis
    spacing_mm: TripleMm
    preprocessing: Preprocessing

    @classmethod
    def of(cls, network: Sam3D, preprocessing: Preprocessing, spacing_mm: TripleMm) -> FieldOfView:
        """The field of view of a network.

        Raises:
            ValueError: If its input is not a cube.
        """
        if len({*network.img_size}) > 1:
            raise ValueError(f"the input {network.img_size} is not a cube; give img_size= one side")
        return cls(
            network.img_size[0],
            network.image_encoder.grid[0],
            preprocessing.spacing_mm or spacing_mm,
            preprocessing,
        )

    @property
    def cells(self) -> int:
        """Cells of the mask decoder along each axis."""
        return CELLS_PER_TOKEN * self.tokens

    def places_mm(self, number: int) -> Indices:
        """The centres of `number` equal parts along each axis, in mm from the middle."""
        parts = np.arange(number) - (number - 1) / 2
        return [parts * (self.side_vox * mm / number) for mm in self.spacing_mm]

    def indices(self, places_mm: Indices, number: int) -> Indices:
        """Places in mm from the middle as continuous indices of `number` parts along each axis."""
        return [
            place / (self.side_vox * mm / number) + (number - 1) / 2
            for place, mm in zip(places_mm, self.spacing_mm, strict=True)
        ]

    def resample(self, x: Tensor, other: FieldOfView, number: int) -> Tensor:
        """Values at the parts of this field, at `number` parts a side of another, interpolated.

        Shapes:
            x: (C, m, m, m).
            returns: (C, n, n, n).
        """
        return _sampled(x, self.indices(other.places_mm(number), x.shape[-1]))

    def covers(self, other: FieldOfView, number: int) -> Tensor:
        """Which of `number` parts a side of another field lie in this one, (n, n, n) bool."""
        indices = self.indices(other.places_mm(number), self.side_vox)
        return _within(indices, (self.side_vox,) * 3)


@dataclass(frozen=True, eq=False)
class RawScan:
    """A scan as stored, axes towards R, A, S.

    Shapes:
        image: (X, Y, Z) float32.
        labels: (X, Y, Z) integers, 0 for no object; None for an unlabelled scan.

    A synthetic scan `is_normalised` for all networks.
    """

    image: Tensor
    labels: Tensor | None
    spacing_mm: TripleMm
    modality: Modality | None = None
    is_normalised: bool = False
    _scales: dict[str, IntensityScale] = field(default_factory=dict)

    @classmethod
    def of(
        cls, image: Volume, labels: Volume | None = None, modality: Modality | None = None
    ) -> RawScan:
        """A scan and its labels, which lie on one grid.

        Raises:
            ValueError: If it has several channels, a voxel is not finite, or all are alike.
        """
        if image.channels != 1:
            raise ValueError(f"{image.channels} channels, and a promptable network takes one")
        value_range(image.array)
        geometry = Geometry.plan(image.shape, image.affine)
        return cls(
            geometry.resample(image.array)[0],
            None if labels is None else geometry.resample_labels(labels.array)[0],
            geometry.spacing_mm,
            modality,
        )

    def normalise(self, raw: Tensor, preprocessing: Preprocessing) -> Tensor:
        """A crop of the scan, or all of it, with a network's normalisation; float32."""
        if self.is_normalised:
            return raw
        mode = preprocessing.intensity_mode(self.modality)
        if preprocessing.statistics == "crop":
            return normalise(raw[None], mode).image[0]
        if mode not in self._scales:
            self._scales[mode] = measure_scale(partial(_in_one_slab, self.image), mode)
        return self._scales[mode].apply(raw)

    def cut(self, crop: CropPlace, field: FieldOfView) -> tuple[Tensor, Tensor]:
        """A network's voxels, raw, with zeros outside the scan; and which lie inside it."""
        indices = self._indices(crop, field)
        inside = _within(indices, self.image.shape)
        window, indices = _windowed(self.image, indices)
        return _sampled(window, indices) * inside, inside

    def cut_labels(self, crop: CropPlace, field: FieldOfView) -> Tensor:
        """The labels with the largest linear share in a network's voxels, uint8 or int16."""
        indices = self._indices(crop, field)
        if self.labels is None:
            return torch.zeros((field.side_vox,) * 3, dtype=torch.uint8)
        inside = _within(indices, self.labels.shape)
        window, indices = _windowed(self.labels, indices)
        best = torch.zeros(inside.shape)
        found = torch.zeros(inside.shape, dtype=torch.int16)
        for value in torch.unique(window).tolist():  # from 0, the smallest
            share = _sampled((window == value).float(), indices)
            found[share > best] = value
            best = torch.maximum(best, share)
        found = found * inside
        return found if int(found.max()) > 255 else found.to(torch.uint8)

    def _indices(self, crop: CropPlace, field: FieldOfView) -> Indices:
        """A network's voxels in the scan's grid."""
        return [
            middle + place * factor / own
            for middle, place, factor, own in zip(
                crop.middle_vox,
                field.places_mm(field.side_vox),
                crop.factors,
                self.spacing_mm,
                strict=True,
            )
        ]


class CropPlace(NamedTuple):
    """The place of a crop in a scan, in voxels, and factors on the networks' spacings.

    A negative factor mirrors the axis.
    """

    middle_vox: Sequence[float]
    factors: Sequence[float]


@dataclass(frozen=True)
class Variation:
    """How crops differ from the networks' spacings, see `ScanSource`; and flips along R, A, S."""

    zoom: float = 1.0
    stretch: float = 1.0
    flips: tuple[float, float, float] = (0.0, 0.0, 0.0)


def draw_places(
    rng: np.random.Generator,
    scan: RawScan,
    student: FieldOfView,
    number: int,
    variation: Variation,
    smallest_vox: int,
) -> list[CropPlace]:
    """Crops around objects, or around places in the body if the scan has no labels."""
    objects = [] if scan.labels is None else object_voxels(scan.labels[None])
    if not objects:
        image = scan.normalise(scan.image, student.preprocessing)
        objects = object_voxels(above_air(image).to(torch.uint8)[None])
    places = []
    for _ in range(number):
        middle, spacing_mm = draw_cube(
            rng,
            objects or [(0, np.array([scan.image.shape]) // 2)],
            scan.spacing_mm,
            student.side_vox,
            student.spacing_mm[0],
            smallest_vox=smallest_vox,
            zoom=variation.zoom,
            stretch=variation.stretch,
        )
        signs = np.where(rng.random(3) < variation.flips, -1.0, 1.0)
        factors = signs * np.array(spacing_mm) / student.spacing_mm
        places.append(CropPlace(middle, factors.tolist()))
    return places


def translated(points: Tensor, source: FieldOfView, target: FieldOfView) -> Tensor:
    """Voxels of one field as the nearest voxels of another around the same middle, (K, 3)."""
    steps = torch.tensor(source.spacing_mm) / torch.tensor(target.spacing_mm)
    index = (points - (source.side_vox - 1) / 2) * steps + (target.side_vox - 1) / 2
    return index.round().long().clamp(0, target.side_vox - 1)


def above_air(image: Tensor) -> Tensor:
    """Which voxels are brighter than air, bool."""
    values = image.numpy()[::2, ::2, ::2]
    low, high = float(values.min()), float(np.percentile(values, RANGE_PERCENT))
    return image > low + AIR_SHARE * (high - low)


def _sampled(x: Tensor, indices: Indices) -> Tensor:
    """Values at continuous indices of the last three axes, linear between them."""
    for axis, index in enumerate(indices, start=x.ndim - 3):
        x = interpolate_axis(x, axis, index)
    return x


def _windowed(x: Tensor, indices: Indices) -> tuple[Tensor, Indices]:
    """The part of a volume that lies around some indices, and these in it."""
    low = [
        min(max(0, math.floor(index.min())), n - 1)
        for index, n in zip(indices, x.shape, strict=True)
    ]
    high = [max(first + 1, math.ceil(i.max()) + 1) for first, i in zip(low, indices, strict=True)]
    window = x[tuple(slice(*ends) for ends in zip(low, high, strict=True))]
    return window, [index - first for index, first in zip(indices, low, strict=True)]


def _within(indices: Indices, shape: Sequence[int]) -> Tensor:
    """Which points of a lattice lie in a grid, bool."""
    x, y, z = (
        torch.as_tensor((index >= -0.5) & (index <= n - 0.5))
        for index, n in zip(indices, shape, strict=True)
    )
    inside: Tensor = x[:, None, None] & y[:, None] & z
    return inside


def _in_one_slab(image: Tensor) -> list[Tensor]:
    return [image]
