"""The fingerprint of a data set: a record per case, and the medians that the rules read.

All directions are those of the network's grid: axis 0 runs to the patient's right, 1 to the front,
2 to the head, whatever the order of the axes in a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import joblib
import numpy as np
from nibabel.orientations import aff2axcodes
from numpy.typing import ArrayLike
from scipy import ndimage

from sammed3d_backbone.console import progress_bar
from sammed3d_backbone.data.datasets import Case, Dataset, DatasetError
from sammed3d_backbone.data.geometry import Geometry, Triple, TripleMm
from sammed3d_backbone.data.limits import value_range
from sammed3d_backbone.data.preparation import open_case
from sammed3d_backbone.data.regions import components, depth_mm
from sammed3d_backbone.data.volume import Volume

PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)
DIRECTIONS = ("left-right", "back-front", "feet-head")
SAMPLED = 50_000  # voxels per channel behind the percentiles, evenly picked


@dataclass(frozen=True)
class Structure:
    """One class in one case.

    Args:
        ml: Volume in millilitres.
        sides_mm: Sides of the box around it.
        thickness_mm: Diameter of the largest ball that fits into it.
        at_border: Whether a voxel lies on the first or last slice along an axis.
        main_share: Share of its voxels in its largest 26-connected component.
        centre_mm: Its centre of mass, from the middle of the volume.
    """

    ml: float
    sides_mm: TripleMm
    thickness_mm: float
    at_border: bool
    main_share: float
    centre_mm: TripleMm


@dataclass(frozen=True)
class CasePrint:
    """One case.

    Args:
        case: Its files.
        shape: Voxels along the three directions.
        spacing_mm: Spacing along the three directions.
        orientation: Directions of the axes in the file, such as "LPS".
        content: Hash of shape and voxels; equal for equal scans.
        low: Lowest value of each channel.
        high: Highest value of each channel.
        negative: Share of voxels below 0, of each channel.
        inside: `PERCENTILES` of each channel, over labelled voxels; empty if there are none.
        structures: Annotated classes that have voxels.
    """

    case: Case
    shape: Triple
    spacing_mm: TripleMm
    orientation: str
    content: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    negative: tuple[float, ...]
    inside: tuple[tuple[float, ...], ...]
    structures: Mapping[str, Structure]


@dataclass(frozen=True)
class Fingerprint:
    """A data set and the record of each of its cases."""

    dataset: Dataset
    cases: tuple[CasePrint, ...]

    @cached_property
    def labelled(self) -> tuple[CasePrint, ...]:
        """The cases with a labelled voxel, which healthy controls do not have."""
        return tuple(case for case in self.cases if case.inside)

    @cached_property
    def subjects(self) -> set[str]:
        """The subjects of the cases."""
        return {case.case.subject for case in self.cases}

    @cached_property
    def spacing_mm(self) -> TripleMm:
        """The median spacing along the three directions."""
        return _triple(np.median([case.spacing_mm for case in self.cases], axis=0))

    @cached_property
    def sides_mm(self) -> TripleMm:
        """The median sides of the scans."""
        sides = [np.multiply(case.shape, case.spacing_mm) for case in self.cases]
        return _triple(np.median(sides, axis=0))

    def of_class(self, name: str) -> list[Structure]:
        """A class in all cases that have it."""
        return [case.structures[name] for case in self.cases if name in case.structures]

    def median(self, of: Callable[[Structure], float]) -> dict[str, float]:
        """The median of a measure over the cases, for every class that occurs."""
        found = {name: self.of_class(name) for name in self.dataset.classes}
        return {
            name: float(np.median([of(each) for each in structures]))
            for name, structures in found.items()
            if structures
        }


def fingerprint(dataset: Dataset, *, jobs: int = 1) -> Fingerprint:
    """Opens every case once and measures it.

    Args:
        dataset: The data set.
        jobs: Number of cases measured at the same time, by joblib in threads unless
            `joblib.parallel_config` says otherwise.

    Raises:
        DatasetError: If any case cannot be used; the message lists all reasons with their paths.
    """
    tasks = (joblib.delayed(_measured)(case, dataset) for case in dataset.cases)
    results = joblib.Parallel(n_jobs=jobs, prefer="threads", return_as="generator")(tasks)
    bar = progress_bar(results, desc="reading", unit="case", total=len(dataset.cases))
    problems: list[str] = []
    found: list[CasePrint] = []
    for reasons, case in bar:
        problems += reasons
        found += [] if case is None else [case]
    if problems:
        raise DatasetError(f"{dataset.folder} cannot be planned for:", problems)
    made = Fingerprint(dataset, tuple(found))
    if not made.labelled:
        problem = "no case has a labelled voxel"
        raise DatasetError(f"{dataset.folder} cannot be planned for:", [problem])
    return made


def _measured(case: Case, dataset: Dataset) -> tuple[list[str], CasePrint | None]:
    """The problems of a case, or its record."""
    problems, opened = open_case(case, dataset)
    if opened is None or problems:
        return problems, None
    image, label = opened
    try:
        value_range(image.array)
    except ValueError as error:  # as when the case is prepared for training
        return [f"{case.images[0]}: {error}"], None
    geometry = Geometry.plan(image.shape, image.affine)
    labelled = (label.array > 0) & (label.array < len(dataset.labels))
    channels = image.array.reshape(image.channels, *image.shape)
    inside = [channel[labelled] for channel in channels]
    content = hashlib.sha256(repr(image.array.shape).encode())
    content.update(np.ascontiguousarray(image.array).data)
    known = dataset.classes if case.annotated is None else case.annotated
    return [], CasePrint(
        case=case,
        shape=geometry.resampled_shape,
        spacing_mm=geometry.spacing_mm,
        orientation="".join(map(str, aff2axcodes(image.affine))),
        content=content.hexdigest(),
        low=tuple(float(channel.min()) for channel in channels),
        high=tuple(float(channel.max()) for channel in channels),
        negative=tuple(float((channel < 0).mean()) for channel in channels),
        inside=tuple(
            tuple(
                float(v) for v in np.percentile(values[:: -(-values.size // SAMPLED)], PERCENTILES)
            )
            for values in inside
            if values.size
        ),
        structures={n: s for n, s in _structures(label, geometry, dataset).items() if n in known},
    )


def _structures(label: Volume, geometry: Geometry, dataset: Dataset) -> dict[str, Structure]:
    """Every class that has voxels."""
    oriented = np.ascontiguousarray(geometry.oriented(label.array))
    spacing_mm = np.array(geometry.spacing_mm)
    found = {}
    boxes = ndimage.find_objects(oriented, max_label=len(dataset.classes))
    for value, box in enumerate(boxes, start=1):
        if box is None:
            continue
        mask = oriented[box] == value
        voxels = int(mask.sum())
        start = [side.start for side in box]
        middle = np.argwhere(mask).mean(axis=0) + start - (np.array(oriented.shape) - 1) / 2
        ends = zip(box, oriented.shape, strict=True)
        found[dataset.labels[value]] = Structure(
            ml=voxels * label.voxel_ml,
            sides_mm=_triple(mask.shape * spacing_mm),
            # to the centre of a voxel outside, which is half a voxel beyond the surface
            thickness_mm=float(2 * depth_mm(mask, spacing_mm).max() - spacing_mm.min()),
            at_border=any(side.start == 0 or side.stop == n for side, n in ends),
            main_share=float(components(mask)[1].max() / voxels),
            centre_mm=_triple(middle * spacing_mm),
        )
    return found


def _triple(values: Iterable[float]) -> TripleMm:
    x, y, z = (float(value) for value in values)
    return x, y, z


def by_axis(values: ArrayLike) -> str:
    """``1.5 x 1.5 x 5``: three values with three digits."""
    return " x ".join(f"{value:.3g}" for value in np.asarray(values))
