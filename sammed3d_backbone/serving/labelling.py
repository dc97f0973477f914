"""Many objects in one scan: all prompts in, one label map out, as the page of `sammed3d view` asks.

The page holds the prompts and sends all of them every time, so undo, redo and a server that was
started anew are nothing special. A session works out what is new, and runs the network for that.

What is shown is in RAS order, as the page's viewer holds voxels; what is saved is in the scan's.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sammed3d_backbone.data.checks import pair_problems
from sammed3d_backbone.data.dicom import DicomSeries
from sammed3d_backbone.data.dicom_seg import write_dicom_seg
from sammed3d_backbone.data.geometry import Geometry, Triple
from sammed3d_backbone.data.preprocessing import Modality
from sammed3d_backbone.data.regions import bounding_box, values_of
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.inference.interactive.click_io import ClickList, volume_sha256
from sammed3d_backbone.inference.validation import ValidatedVolume, validate_volume
from sammed3d_backbone.serving.gate import RefusedError
from sammed3d_backbone.serving.session import news, voxel_inside

MAX_VALUE = 255  # labels are shown and saved as uint8
MAX_SHOWN_VOXELS = 2**27  # the viewer takes 4 bytes and more of graphics memory for each

Region = tuple[slice, ...]


@dataclass(frozen=True)
class ObjectClick:
    """A click on an object, at a voxel of the scan."""

    value: int  # of the object in the label map
    voxel: Triple
    positive: bool


@dataclass(frozen=True)
class StoredMask:
    """An object of the label map that a scan came with, to start from."""

    value: int


@dataclass(frozen=True, eq=False)
class Found:
    """The mask of a clicked object.

    Shapes:
        inside: the voxels of `region`, in RAS order.
    """

    source: tuple[Any, ...]  # what the mask follows from
    region: Region
    inside: NDArray[np.bool_]
    facts: Mapping[str, Any]
    notes: tuple[str, ...]


class OpenScan:
    """A scan that is shown to everybody who opens the page, and the labels that it came with.

    Args:
        scan: The scan.
        name: Name of the scan, in the page and in the names of saved files.
        modality: See `Predictor.set_volume`.
        labels: What the scan was segmented into earlier; None for nothing.

    Shapes:
        labels: (X, Y, Z) uint8, 0 is background.

    Raises:
        ValueError: If the page's viewer would name the scan's axes otherwise.
    """

    def __init__(
        self,
        scan: ValidatedVolume,
        name: str,
        *,
        modality: Modality | None = None,
        labels: NDArray[np.uint8] | None = None,
    ) -> None:
        self.scan = scan
        self.name = name
        self.modality = modality
        self.geometry = Geometry.plan(scan.volume.shape, scan.volume.affine)
        require_plain_axes(self.geometry.affine)
        self.labels = np.zeros(scan.volume.shape, np.uint8) if labels is None else labels
        self.voxels = np.bincount(self.labels.ravel(order="K"), minlength=MAX_VALUE + 1)
        found = ndimage.find_objects(self.geometry.oriented(self.labels))
        # Boxes of the labels in RAS order.
        self.regions: dict[int, Region] = {v: box for v, box in enumerate(found, 1) if box}

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        channel: int | None = None,
        series: str | None = None,
        slice_tolerance_mm: float | None = None,
        modality: Modality | None = None,
        labels: Path | None = None,
    ) -> OpenScan:
        """A scan from a file or a DICOM series, with labels from another file.

        Raises:
            FileNotFoundError: If a file does not exist.
            ValueError: If a file cannot be used, or the labels are not whole numbers from 0 to 255
                on the grid of the scan.
        """
        scan = validate_volume(
            path, channel=channel, series=series, slice_tolerance_mm=slice_tolerance_mm
        )
        name = path.name.removesuffix(".gz").removesuffix(".nii")
        if labels is None:
            return cls(scan, name, modality=modality)
        stored = Volume.load(labels)
        if problems := pair_problems(labels, stored, path, scan.volume):
            raise ValueError(problems[0])
        values = values_of(stored.array)
        if stored.channels > 1 or not np.isin(values, range(MAX_VALUE + 1)).all():
            raise ValueError(
                f"{labels}: labels are not whole numbers from 0 to {MAX_VALUE} in one channel; "
                "renumber them"
            )
        return cls(scan, name, modality=modality, labels=stored.array.astype(np.uint8))

    @cached_property
    def sha256(self) -> str:
        """By which a page recognises the scan when a server was started anew."""
        return volume_sha256(self.scan.volume)

    @property
    def series(self) -> DicomSeries | None:
        """The DICOM series that a DICOM-SEG of the scan can belong to; None without one."""
        header = self.scan.volume.header
        return header if isinstance(header, DicomSeries) and header.frame_of_reference else None

    def voxel(self, point_mm: Sequence[float]) -> Triple:
        """The voxel at a point, which the viewer's rounding may have put just outside.

        Raises:
            RefusedError: If the point lies outside the scan.
        """
        point = np.linalg.inv(self.scan.volume.affine) @ [*point_mm, 1.0]
        voxel = voxel_inside(np.round(point[:3], 9).tolist(), self.scan.volume.shape)
        if voxel is None:
            raise RefusedError(400, f"point_mm {list(point_mm)} lies outside the scan")
        return voxel

    def step(self, max_side: int) -> int:
        """Every how many-th voxel is shown along each axis, so that the viewer can hold them."""
        shape = np.array(self.geometry.resampled_shape)
        step = 1
        while (shown := -(-shape // step)).max() > max_side or shown.prod() > MAX_SHOWN_VOXELS:
            step += 1
        return step

    def image(self, step: int) -> bytes:
        """The shown voxels as an uncompressed NIfTI file in RAS order."""
        shown = self.geometry.oriented(self.scan.volume.array)[::step, ::step, ::step]
        low, high = np.iinfo(np.int16).min, np.iinfo(np.int16).max
        if low <= self.scan.low and self.scan.high <= high:
            whole = shown.astype(np.int16)
            shown = whole if (whole == shown).all() else shown
        if shown.dtype != np.int16:
            shown = shown.astype(np.float32)
        affine = self.geometry.affine @ np.diag([step, step, step, 1.0])
        return bytes(nib.Nifti1Image(shown, affine).to_bytes())


def require_plain_axes(affine: NDArray[np.float64]) -> None:
    """Refuses a scan in RAS order whose axes the page's viewer would put into another order.

    Raises:
        ValueError: If an axis runs at about 45 degrees to its direction.
    """
    right, front, _ = np.abs(affine[:3, :3])
    if right[0] < right.max() or front[1] <= front[2] or np.diagonal(affine).min() < 0:
        raise ValueError(
            "the scan's axes run at about 45 degrees to those of the body, which the page cannot "
            "show; use sammed3d segment, or sammed3d serve with a viewer"
        )


class LabellingSession:
    """One user's prompts on a scan, and the label map that follows from them.

    The label map is a function of the scan, the weights, the settings and the prompts in their
    order. A voxel that several objects claim belongs to the one that was clicked last; to one that
    is locked in any case.

    Args:
        predictor: The session owns its volume and prompts from now on.
        scan: The scan.
    """

    def __init__(self, predictor: Predictor, scan: OpenScan) -> None:
        predictor.set_volume(scan.scan, modality=scan.modality)
        self.scan = scan
        self.step = 1  # as `OpenScan.step`
        self._predictor = predictor
        self._told: list[ObjectClick | StoredMask] = []
        self._found: dict[int, Found] = {}
        self._labels = scan.labels.copy()
        self._oriented = scan.geometry.oriented(self._labels)  # writes through

    @property
    def windows_encoded(self) -> int:
        """Passes of the encoder so far; may be read at any time."""
        return self._predictor.windows_encoded

    def update(
        self, clicks: Sequence[ObjectClick], *, locked: Collection[int] = (), follow: bool = True
    ) -> Region | None:
        """Brings the label map up to date.

        Args:
            clicks: All clicks on all objects, in their order. One on a voxel that has the other
                sign replaces that click.
            locked: Objects that others do not grow into.
            follow: Whether objects larger than one window are followed.

        Returns:
            The box of changed voxels in RAS order; None if none has changed.
        """
        self._predictor.follow = follow
        prompts = self._prompts(clicks)
        for prompt in news(self._predictor, self._told, prompts):
            name = str(prompt.value)
            if isinstance(prompt, StoredMask):
                mask = self.scan.labels == prompt.value
                self._predictor.mask_prompt(mask=mask, object=name)
            else:
                self._predictor.click(prompt.voxel, prompt.positive, object=name)
            self._told.append(prompt)
        before = self._found
        self._found = {value: self._find(value) for value in self._by_last_click()}
        regions = [found.region for found in (*before.values(), *self._found.values())]
        stored = self.scan.regions
        regions += [stored[value] for value in {*before, *self._found} if value in stored]
        return self._paint(regions, locked)

    def encode(self, voxel: Triple) -> None:
        """Encodes the window around a voxel, so that a click there is answered sooner."""
        self._predictor.encode(voxel)

    def change(self, region: Region | None) -> tuple[NDArray[np.uint8], Region] | None:
        """The shown labels of a box of voxels, and the box of shown voxels in which they lie."""
        if region is None:
            return None
        step = self.step
        shown = tuple(slice(-(-side.start // step), -(-side.stop // step)) for side in region)
        return self._oriented[::step, ::step, ::step][shown], shown

    def everything(self) -> Region | None:
        """The box of all labels."""
        return bounding_box(self._oriented != 0)

    def facts(self) -> dict[int, Mapping[str, Any]]:
        """What is known of each object that has voxels or clicks."""
        ml = self.scan.scan.volume.voxel_ml
        stored = {v: {"ml": float(self.scan.voxels[v] * ml)} for v in self.scan.regions}
        return {**stored, **{value: found.facts for value, found in self._found.items()}}

    def notes(self) -> list[str]:
        """What the user has to know before trusting the masks."""
        return list(dict.fromkeys(note for found in self._found.values() for note in found.notes))

    def label_map(self) -> Volume:
        """The label map on the scan's own grid, with exactly its affine."""
        source = self.scan.scan.volume
        return Volume(self._labels, source.affine, source.header)

    def dicom_seg(self, names: Mapping[int, str]) -> bytes:
        """The label map as DICOM-SEG, with a segment for each object that has voxels.

        Raises:
            RefusedError: If the scan did not come from a DICOM series.
            ValueError: If no object has a voxel, or the series lacks what a DICOM-SEG needs.
        """
        if self.scan.series is None:
            raise RefusedError(400, "the scan was not read from DICOM; save the label map")
        file = io.BytesIO()
        write_dicom_seg(file, self._labels, self.scan.scan.volume.affine, self.scan.series, names)
        return file.getvalue()

    def click_list(self, names: Mapping[int, str]) -> ClickList:
        """All clicks, for `Predictor.load_clicks`.

        Raises:
            ValueError: If clicks correct a mask of the file, which a click list cannot hold.
        """
        listed = self._predictor.click_list()
        renamed = (
            {**click, "object": names.get(int(click["object"]), click["object"])}
            for click in listed.clicks
        )
        return replace(listed, clicks=tuple(renamed))

    # --- inside --------------------------------------------------------------------------------

    def _prompts(self, clicks: Sequence[ObjectClick]) -> list[ObjectClick | StoredMask]:
        """Clicks without those that a later one contradicts, and the masks that they start from."""
        prompts: list[ObjectClick | StoredMask] = []
        for click in clicks:
            opposite = replace(click, positive=not click.positive)
            prompts = [prompt for prompt in prompts if prompt != opposite]
            start = StoredMask(click.value)
            if self.scan.voxels[click.value] and start not in prompts:
                prompts.append(start)
            prompts.append(click)
        return prompts

    def _by_last_click(self) -> list[int]:
        """The objects that say where they are, the one that was clicked last at the end."""
        clicked = [prompt.value for prompt in self._told]
        anchored = {p.value for p in self._told if isinstance(p, StoredMask) or p.positive}
        last = dict.fromkeys(reversed(clicked))
        return [value for value in reversed(last) if value in anchored]

    def _find(self, value: int) -> Found:
        """The mask of an object, predicted only if it is not known."""
        # The first prompt of all places the lattice of windows.
        first = next(p for p in self._told if isinstance(p, StoredMask) or p.positive)
        own = tuple(prompt for prompt in self._told if prompt.value == value)
        source = (first, own, self._predictor.follow)
        known = self._found.get(value)
        if known is not None and known.source == source:
            return known
        prediction = self._predictor.predict(str(value))
        mask = self.scan.geometry.oriented(prediction.mask)
        region = bounding_box(mask) or (slice(0, 0),) * 3
        facts = {
            "ml": float(np.count_nonzero(mask[region]) * self.scan.scan.volume.voxel_ml),
            "windows": prediction.windows,
            "clicks_agreed": prediction.clicks_agreed,
            "predicted_dice": prediction.predicted_dice,
        }
        return Found(source, region, mask[region].copy(), facts, prediction.notes)

    def _paint(self, regions: Sequence[Region], locked: Collection[int]) -> Region | None:
        """Writes all masks into the label map, one over the other; the box of what changed."""
        regions = [region for region in regions if region[0].stop]
        if not regions:
            return None
        box = tuple(
            slice(min(side.start for side in sides), max(side.stop for side in sides))
            for sides in zip(*regions, strict=True)
        )
        stored = self.scan.geometry.oriented(self.scan.labels)[box]
        labels = stored.copy()
        labels[np.isin(labels, list(self._found))] = 0
        order = [*self._found, *(value for value in locked if value not in self._found)]
        for value in sorted(order, key=lambda value: value in locked):
            found = self._found.get(value)
            if found is None:
                labels[stored == value] = value
            elif found.region[0].stop:
                place = tuple(
                    slice(side.start - own.start, side.stop - own.start)
                    for side, own in zip(found.region, box, strict=True)
                )
                labels[place][found.inside] = value
        shown = self._oriented[box]
        changed = bounding_box(shown != labels)
        if changed is None:
            return None
        shown[changed] = labels[changed]
        return tuple(
            slice(own.start + side.start, own.start + side.stop)
            for side, own in zip(changed, box, strict=True)
        )
