"""Validation of a scan and of points in it, once, before a network is loaded or run.

What cannot be used is refused; what is unusual but usable becomes a note.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sammed3d_backbone.data.dicom import DicomSeries
from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.data.limits import value_range
from sammed3d_backbone.data.preprocessing import Modality
from sammed3d_backbone.data.regions import corner_voxels
from sammed3d_backbone.data.volume import Volume

MODALITIES: dict[str, Modality] = {"CT": "ct", "MR": "mr", "US": "us"}  # by DICOM's tag


@dataclass(frozen=True, eq=False)
class ValidatedVolume:
    """A validated volume: one channel of finite real numbers with contrast and a usable spacing."""

    volume: Volume
    low: float
    high: float

    def voxel(
        self,
        point_vox: Sequence[float] | None = None,
        point_mm: Sequence[float] | None = None,
    ) -> Triple:
        """The voxel in which a point lies.

        Args:
            point_vox: Voxel i, j, k of the volume's own grid, counted from 0.
            point_mm: x, y, z in RAS+ mm; give one of the two.

        Raises:
            TypeError: If the point is not a sequence of numbers.
            ValueError: If not exactly one point is given, or it lies outside the volume.
        """
        if (point_vox is None) == (point_mm is None):
            raise ValueError("give either point_vox=(i, j, k) or point_mm=(x, y, z)")
        given = point_vox if point_mm is None else point_mm
        name = "point_vox" if point_mm is None else "point_mm"
        try:
            point = np.asarray(_plain(given), dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"{name}={reprlib.repr(given)}: expected three numbers") from None
        if point.shape != (3,) or not np.isfinite(point).all():
            raise ValueError(f"{name}={reprlib.repr(given)}: expected three finite numbers")
        shape = self.volume.shape
        if point_mm is not None:
            point = (np.linalg.inv(self.volume.affine) @ [*point, 1])[:3]
        # Rounding to nine digits first: a point in mm on a voxel's border falls to one side
        # whatever the last digit of the affine's inverse.
        index = np.floor(np.round(np.clip(point, -1, shape), 9) + 0.5)
        if not ((index >= 0) & (index < shape)).all():
            if point_mm is None:
                limits = f"voxels run from (0, 0, 0) to {tuple(n - 1 for n in shape)}"
            else:
                corners = corner_voxels(shape, margin=0.5) @ self.volume.affine.T
                low, high = (np.round(f(corners[:, :3], axis=0), 1) for f in (np.min, np.max))
                limits = f"its box runs from {tuple(low.tolist())} to {tuple(high.tolist())} mm"
            raise ValueError(f"{name}={given!r} lies outside the volume; {limits}")
        i, j, k = (int(n) for n in index)
        return i, j, k

    def notes(self, modality: Modality | None) -> list[str]:
        """Properties of the volume that are unusual but usable."""
        notes = []
        if modality is None and self.low <= -500 and self.high >= 500:
            notes.append("the values look like CT in HU; pass modality='ct' to clamp them")
        if modality == "ct" and self.low >= 0:
            notes.append("no value is below 0, so these are probably not HU; check the modality")
        if self.high <= 0:
            notes.append("no value is above 0, so the network sees an empty image")
        header = self.volume.header
        if isinstance(header, DicomSeries):
            return notes + _modality_notes(header.modality, modality)
        if header is None:
            return notes
        qform, sform = header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]
        if qform is None and sform is None:
            notes.append("the header has neither qform nor sform; left and right may be swapped")
        elif qform is not None and sform is not None:
            corners = corner_voxels(self.volume.shape)
            apart_mm = float(np.linalg.norm(corners @ (qform - sform).T, axis=1).max())
            if apart_mm > min(self.volume.spacing_mm) / 2:
                notes.append(f"qform and sform differ by {apart_mm:.1f} mm; the sform is used")
        return notes


def validate_volume(
    volume: Any,  # noqa: ANN401 (an image of another library)
    affine: ArrayLike | None = None,
    *,
    channel: int | None = None,
    series: str | None = None,
    slice_tolerance_mm: float | None = None,
) -> ValidatedVolume:
    """Opens and validates a volume for segmentation by clicks.

    Args:
        volume: A path for `Volume.load`, a `Volume`, an image of nibabel, MONAI (`MetaTensor`) or
            TorchIO, or an array (X, Y, Z), which is not copied and must not be changed while it is
            in use.
        affine: Voxel -> RAS+ mm, (4, 4); needed for an array.
        channel: Which channel of several, counted from 0.
        series: For a path of DICOM; see `Volume.load`.
        slice_tolerance_mm: For a path of DICOM; see `Volume.load`.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an array comes without its affine, or does not hold real numbers.
        ValueError: If the volume cannot be used; the message says why and what to do.
    """
    source = ""
    if isinstance(volume, str | Path):
        source = f"{volume}: "
        volume = Volume.load(volume, series=series, slice_tolerance_mm=slice_tolerance_mm)
    else:
        own, affine = _plain(getattr(volume, "affine", None)), _plain(affine)
        if own is None and affine is None:
            raise TypeError("an array needs its affine, voxel -> RAS+ mm; give affine=")
        if own is not None and affine is not None and not np.allclose(own, affine):
            raise TypeError("the volume has another affine of its own; leave affine= out")
        if not isinstance(volume, Volume):
            volume = _volume_of(volume, affine if own is None else own)
    volume = _one_channel(volume, channel, source)
    if volume.array.dtype.kind not in "iuf":
        raise TypeError(f"{source}expected a real-valued volume, got dtype {volume.array.dtype}")
    try:
        return ValidatedVolume(volume, *value_range(volume.array))
    except ValueError as error:
        raise ValueError(f"{source}{error}") from None


def _modality_notes(tag: str, modality: Modality | None) -> list[str]:
    """What the tag of a DICOM series says about the modality that was given."""
    known = MODALITIES.get(tag)
    if known is None or known == modality:
        return []
    if modality is None:
        return [f"the series is {tag}; pass modality={known!r}"]
    return [f"the series is {tag}, and modality={modality!r} was given; check the modality"]


def _volume_of(image: Any, affine: Any) -> Volume:  # noqa: ANN401
    """An array, or an image of another library, as a volume."""
    header = getattr(image, "header", None)
    if hasattr(image, "dataobj"):  # nibabel: channels last
        array = np.asanyarray(image.dataobj)
        array = np.moveaxis(array, -1, 0) if array.ndim == 4 else array
    elif type(image).__module__.startswith(("SimpleITK", "itk", "PIL")):
        raise TypeError(
            f"a {type(image).__name__} of another library; give the file's path, or an array "
            "(X, Y, Z) and its affine"
        )
    else:  # MONAI and TorchIO: channels first
        array = image if isinstance(image, np.ndarray) else _plain(getattr(image, "data", image))
    own_header = header if isinstance(header, nib.Nifti1Header) else None
    return Volume(np.asarray(array), np.array(affine, dtype=np.float64), own_header)


def _plain(values: Any) -> Any:  # noqa: ANN401
    """The array of a tensor, also of a subclass as MONAI's; other values as they are."""
    if not isinstance(values, Tensor):
        return values
    try:
        plain = values.detach().cpu().resolve_conj().resolve_neg()
        # NumPy has no bfloat16.
        return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    except (RuntimeError, TypeError) as error:  # on "meta", sparse, quantized, nested
        raise TypeError(
            f"a {values.dtype} tensor, {values.layout} on {values.device}, has no array of values; "
            "give a dense one of real numbers"
        ) from error


def _one_channel(volume: Volume, channel: int | None, source: str) -> Volume:
    """The chosen channel of a volume, or its only one, (X, Y, Z)."""
    if channel is not None and not 0 <= channel < volume.channels:
        raise ValueError(f"{source}channel={channel}: expected 0 to {volume.channels - 1}")
    if channel is None and volume.channels > 1:
        raise ValueError(
            f"{source}the volume has {volume.channels} channels, the network takes one; choose one "
            "by channel="
        )
    if volume.array.ndim == 4:
        return Volume(volume.array[channel or 0], volume.affine, volume.header)
    return volume
