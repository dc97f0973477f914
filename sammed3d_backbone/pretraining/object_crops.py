"""Labelled volumes of many kinds -> numbered crops, each with objects that can be clicked.

`ScanSource` cuts crops out of real volumes at a random spacing, `SyntheticSource` generates
volumes; `ObjectStream` mixes such sources and picks the objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sammed3d_backbone.data.checks import pair_problems
from sammed3d_backbone.data.datasets import Case, DatasetError
from sammed3d_backbone.data.geometry import Geometry, TripleMm
from sammed3d_backbone.data.intensity import normalise
from sammed3d_backbone.data.limits import value_range
from sammed3d_backbone.data.preparation import load_image, load_label
from sammed3d_backbone.pretraining.sample_stream import SampleStream, random_contrast
from sammed3d_backbone.pretraining.synthetic import (
    Synthesis,
    render_labels,
    synthetic_sample,
)

Classes = Mapping[int, int]  # value of a label -> number of its class, from 1
PARTS_OF_PATCH = 8
TRIES = 10  # crops of a source, until one holds an object that is large enough
FINEST = 1 / 3  # finest spacing of a crop relative to the scan's


class Crop(NamedTuple):
    """A cube of a volume.

    Shapes:
        image: (1, S, S, S) float32.
        labels: (1, S, S, S) integers, 0 for no object.
    """

    image: Tensor
    labels: Tensor
    classes: Classes
    known: frozenset[int]  # classes that are annotated in the volume


@dataclass(frozen=True)
class Curriculum:
    """Curriculum from large objects in simple volumes: first and last value of each setting.

    Args:
        smallest_vox: Smallest size of an object in voxels.
        structures: Largest number of structures in a synthetic volume.
        samples: Number of samples after which the last values hold.
    """

    smallest_vox: tuple[int, int]
    structures: tuple[int, int]
    samples: int

    def at(self, number: int) -> tuple[int, int]:
        """Smallest size and most structures of a sample, interpolated geometrically."""
        share = 1.0 if self.samples == 0 else min(1.0, number / self.samples)
        smallest, structures = (
            round(first ** (1 - share) * last**share)
            for first, last in (self.smallest_vox, self.structures)
        )
        return smallest, structures


class Source(Protocol):
    """A source of crops."""

    name: str
    is_real: bool  # scans, whose contrast may be randomised

    def draw(
        self, rng: np.random.Generator, side_vox: int, smallest_vox: int, structures: int
    ) -> Crop:
        """A crop, if possible with an object of at least `smallest_vox` voxels."""


@dataclass(frozen=True)
class SyntheticSource:
    """Synthetic volumes, see `synthetic`."""

    name: str = "synthetic"
    is_real: bool = False

    def draw(
        self, rng: np.random.Generator, side_vox: int, smallest_vox: int, structures: int
    ) -> Crop:
        """See `Source`."""
        how = Synthesis(structures=(min(3, structures), structures), smallest_vox=smallest_vox)
        sample = synthetic_sample(int(rng.integers(2**32)), side_vox, how)
        return Crop(*sample, classes={}, known=frozenset())


@dataclass(frozen=True, eq=False)
class LabelledScan:
    """One labelled volume on its own grid, axes towards R, A, S.

    Shapes:
        image: (1, X, Y, Z) float32, normalised.
        labels: (1, X, Y, Z) integers.
        zero: (1,), what a raw zero became; fills what lies outside.
    """

    image: Tensor
    labels: Tensor
    zero: Tensor
    spacing_mm: TripleMm
    classes: Classes = field(default_factory=dict)
    known: frozenset[int] = frozenset()  # classes that are annotated

    def crop(self, centre_vox: Sequence[float], side_vox: int, spacing_mm: TripleMm) -> Crop:
        """A cube around a place."""
        window, shape, start = [slice(None)], [], []
        sides = zip(centre_vox, self.image.shape[1:], self.spacing_mm, spacing_mm, strict=True)
        for centre, n, own, wanted in sides:
            reach = side_vox * wanted / own / 2 + 1  # one more for the interpolation
            low, high = max(0, math.floor(centre - reach)), min(n, math.ceil(centre + reach) + 1)
            window.append(slice(low, high))
            shape.append(high - low)
            start.append((centre - low + 0.5) * own / wanted - side_vox / 2)
        x, y, z = shape
        geometry = Geometry.plan((x, y, z), np.diag([*self.spacing_mm, 1.0]), spacing_mm)
        i, j, k = (round(place) for place in start)
        geometry = geometry.boxed((i, j, k), (side_vox,) * 3)
        place = tuple(window)
        image = geometry.to_box(geometry.resample(self.image[place]), self.zero)
        labels = geometry.to_box(geometry.resample_labels(self.labels[place]))
        return Crop(image, labels, self.classes, self.known)


def read_scan(
    case: Case, intensity: str, classes: Classes | None = None, known: Iterable[int] = ()
) -> LabelledScan:
    """A case, opened and normalised; its labels keep the values of its file.

    Args:
        case: The case.
        intensity: Mode of `data.intensity.normalise`.
        classes: Number of the class of each value that has one.
        known: Classes that are annotated in this case.

    Raises:
        DatasetError: If image and label do not lie on one grid, a voxel is not finite, or all are
            alike.
        ValueError: If a file cannot be read.
    """
    image, label = load_image(case), load_label(case)
    problems = pair_problems(case.label, label, case.images[0], image)
    try:
        value_range(image.array)
    except ValueError as error:
        problems.append(f"{case.images[0]}: {error}")
    if problems:
        raise DatasetError(f"{case.id} cannot be used:", problems)
    geometry = Geometry.plan(image.shape, image.affine)
    normalised = normalise(geometry.resample(image.array), intensity)
    return LabelledScan(
        normalised.image,
        geometry.resample_labels(label.array),
        normalised.zero,
        geometry.spacing_mm,
        classes or {},
        frozenset(known),
    )


class ScanSource:
    """Crops around objects of real volumes; volumes and their objects are drawn uniformly.

    Args:
        name: Name of the source.
        scans: Those without an object, such as healthy controls, are left out.
        spacing_mm: Spacing of the crops, in the middle of its range.
        zoom: Largest factor on it, and one over the smallest; no crop is finer than `FINEST`.
        stretch: The same for each axis separately.

    Raises:
        ValueError: If no scan has an object.
    """

    is_real = True

    def __init__(
        self,
        name: str,
        scans: Sequence[LabelledScan],
        spacing_mm: float,
        *,
        zoom: float = 1.0,
        stretch: float = 1.0,
    ) -> None:
        self.name = name
        self.spacing_mm = spacing_mm
        self.zoom = zoom
        self.stretch = stretch
        found = [(scan, object_voxels(scan.labels)) for scan in scans]
        self._scans = [(scan, objects) for scan, objects in found if objects]
        if not self._scans:
            raise ValueError(f"no label of {len(scans)} cases of {name} has a voxel; add cases")

    def draw(
        self,
        rng: np.random.Generator,
        side_vox: int,
        smallest_vox: int,
        structures: int,  # noqa: ARG002 (a scan has those that it has)
    ) -> Crop:
        """See `Source`."""
        scan, objects = self._scans[int(rng.integers(len(self._scans)))]
        cube = draw_cube(
            rng,
            objects,
            scan.spacing_mm,
            side_vox,
            self.spacing_mm,
            smallest_vox=smallest_vox,
            zoom=self.zoom,
            stretch=self.stretch,
        )
        return scan.crop(cube.middle_vox, side_vox, cube.spacing_mm)


class Cube(NamedTuple):
    """The place of a crop in a scan."""

    middle_vox: Sequence[float]  # in voxels of the scan
    spacing_mm: TripleMm


def draw_cube(
    rng: np.random.Generator,
    objects: Sequence[tuple[int, NDArray[np.int64]]],
    own_mm: TripleMm,
    side_vox: int,
    spacing_mm: float,
    *,
    smallest_vox: int,
    zoom: float,
    stretch: float,
) -> Cube:
    """A crop around an object, off its centre.

    Args:
        rng: Source of all random numbers.
        objects: Result of `object_voxels`; at least one.
        own_mm: Spacing of the scan.
        side_vox: Side of the crop.
        spacing_mm: See `ScanSource`, as are `zoom` and `stretch`.
        smallest_vox: Size that the object should have at the crop's spacing.
        zoom: Largest factor on the spacing.
        stretch: The same for each axis separately.
    """
    factors = zoom ** rng.uniform(-1, 1) * stretch ** rng.uniform(-1, 1, 3)
    x, y, z = (
        max(float(factor) * spacing_mm, own * FINEST)
        for factor, own in zip(factors, own_mm, strict=True)
    )
    voxel_share = math.prod(own_mm) / (x * y * z)
    fitting = [places for n, places in objects if n * voxel_share >= smallest_vox]
    places = (fitting or [places for _, places in objects])[
        int(rng.integers(len(fitting or objects)))
    ]
    centre = places[int(rng.integers(len(places)))]
    # Off the centre, so that the position in the crop does not reveal the object.
    reach = side_vox / 4 * np.array([x, y, z]) / own_mm
    middle: list[float] = (centre + rng.uniform(-reach, reach)).tolist()
    return Cube(middle, (x, y, z))


@dataclass(eq=False, repr=False)
class ObjectStream(SampleStream[Source]):
    """Training samples with labelled objects; `contrast_share` is a share of the real crops.

    Shapes:
        returns: What `SampleStream` has; ``hidden`` (T,) from 0 to 1, for T patches that may be
            hidden; ``labels`` (S, S, S) int16 and ``places`` (8 T,) from 0 to 1, for the
            contrastive loss; ``classes`` (S, S, S) uint8 and ``known`` (K,) bool for K classes.

    Args:
        side_vox: Side of the crops.
        curriculum: Difficulty by sample number.
        patches: Number T of the patches of a crop.
        classes: Number K of the classes.
        rendered_share: Share of real crops that are rendered from their labels.
    """

    side_vox: int
    curriculum: Curriculum
    _: KW_ONLY
    patches: int = 0
    classes: int = 0
    rendered_share: float = 0.0

    def sample(self, rng: np.random.Generator, source: Source, number: int) -> dict[str, Tensor]:
        """See `SampleStream`."""
        crop, values = self._crop_with_objects(rng, source, number)
        image, labels = crop.image, crop.labels
        chosen = np.resize(rng.permutation(values), self.objects)
        draw = rng.random() if source.is_real else 1.0
        if draw < self.contrast_share:
            image = random_contrast(rng, image, labels)
        elif draw < self.contrast_share + self.rendered_share:
            image = render_labels(rng, image, labels)
        image, labels = self.augmented(rng, image, labels)
        numbers = torch.arange(1, 1 + self.classes).tolist()
        return {
            "image": image,
            "objects": torch.stack([labels[0] == value for value in chosen.tolist()]),
            **self.interaction(rng, number),
            "hidden": torch.from_numpy(rng.random(self.patches, np.float32)),
            "labels": labels[0].to(torch.int16),
            "places": torch.from_numpy(rng.random(PARTS_OF_PATCH * self.patches, np.float32)),
            "classes": _classes_of(labels[0], crop.classes),
            "known": torch.tensor([number in crop.known for number in numbers], dtype=torch.bool),
        }

    def _crop_with_objects(
        self, rng: np.random.Generator, source: Source, number: int
    ) -> tuple[Crop, NDArray[np.int64]]:
        """A crop and the values of the objects in it that are large enough.

        If none of several crops has one, it is the largest object of the last crop that has any.
        """
        smallest_vox, structures = self.curriculum.at(number)
        fallback: tuple[Crop, NDArray[np.int64]] | None = None
        for _ in range(TRIES):
            crop = source.draw(rng, self.side_vox, smallest_vox, structures)
            counts = np.bincount(crop.labels.numpy().ravel())  # labels are small whole numbers
            values = np.flatnonzero(counts)
            values = values[values != 0]
            if (counts[values] >= smallest_vox).any():
                return crop, values[counts[values] >= smallest_vox]
            if len(values):
                fallback = crop, values[[counts[values].argmax()]]
        if fallback is None:
            raise ValueError(
                f"{TRIES} crops of {source.name} hold no object; lower smallest_vox=, or leave the "
                "source out"
            )
        return fallback


def _classes_of(labels: Tensor, classes: Classes) -> Tensor:
    """Labels as numbers of classes; (S, S, S) -> (S, S, S) uint8."""
    table = torch.zeros(1 + max((int(labels.max()), *classes)), dtype=torch.uint8)
    for value, number in classes.items():
        table[value] = number
    return table[labels.long()]


def object_voxels(labels: Tensor, most: int = 1024) -> list[tuple[int, NDArray[np.int64]]]:
    """Size of each object, and up to `most` of its voxels, evenly spaced, (N, 3).

    Shapes:
        labels: (1, X, Y, Z) integers, 0 for no object.
    """
    found = []
    for value in torch.unique(labels).tolist():
        if value:
            places = np.argwhere(labels[0].numpy() == value)
            found.append((len(places), places[:: -(-len(places) // most)].copy()))
    return found
