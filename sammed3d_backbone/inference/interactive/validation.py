"""What may be segmented: volumes and masks, checked at the door before anything is done with them.

Refusals say what was given and what to do. What is odd without being wrong becomes a note.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sammed3d_backbone.data.geometry import TripleMm
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive.windows import Windows

Modality = Literal["ct", "mr", "us"]

SPACING_MM = (1.5, 1.5, 1.5)  # of all published weights
# Training clamped CT and nothing else; statistics are those of a crop's voxels above 0.
INTENSITY: dict[str | None, str] = {
    "ct": "ct",
    "mr": "zscore_positive",
    "us": "zscore_positive",
    None: "zscore_positive",
}


def intensity_of(modality: Modality | None) -> str:
    """The mode of `data.intensity.normalise` that the weights were trained with."""
    if modality not in INTENSITY:
        raise ValueError(f"modality={modality!r}; give 'ct', 'mr', 'us' or None")
    return INTENSITY[modality]


def spacing_of(network: object) -> tuple[TripleMm, tuple[str, ...]]:
    """The spacing along R, A, S that a network was trained with; a note if it is not known."""
    record = getattr(network, "pretrained_cfg", None)
    preprocessing = getattr(record, "preprocessing", None)
    known: TripleMm | None = getattr(preprocessing, "spacing_mm", None)
    if known is not None:
        return known, ()
    return SPACING_MM, (f"the weights do not say their spacing; {SPACING_MM[0]} mm is assumed",)


def opened_volume(volume: str | Path | Volume | NDArray[Any], affine: ArrayLike | None) -> Volume:
    """The volume with one channel of real numbers and a usable spacing."""
    if isinstance(volume, str | Path):
        volume = Volume.load(volume)
    elif not isinstance(volume, Volume):
        if affine is None:
            raise TypeError("an array has no place in the body; give its affine, voxel -> RAS+ mm")
        volume = Volume(np.asarray(volume), np.array(affine, dtype=np.float64))
    if volume.channels > 1:
        raise ValueError(
            f"the volume has {volume.channels} channels, the network takes one; "
            "give Volume(volume.array[n], volume.affine, volume.header)"
        )
    if volume.array.ndim == 4:
        volume = Volume(volume.array[0], volume.affine, volume.header)
    if volume.array.dtype.kind not in "iuf":
        raise TypeError(
            f"voxels of type {volume.array.dtype} are no intensities; give real numbers"
        )
    spacing = volume.spacing_mm
    if min(spacing) < 0.01 or max(spacing) > 100:
        raise ValueError(
            f"a spacing of {tuple(round(s, 6) for s in spacing)} mm is no scan's; the header may "
            "count in metres or micrometres: mend its affine"
        )
    return volume


def checked_range(volume: Volume) -> tuple[float, float]:
    """The lowest and highest value; refuses what has none or no contrast."""
    low, high = float(volume.array.min()), float(volume.array.max())
    if not np.isfinite([low, high]).all():
        endless = volume.array.size - int(np.isfinite(volume.array).sum())
        raise ValueError(
            f"the volume holds NaN or infinity in {endless} voxels; replace those voxels"
        )
    if low == high:
        raise ValueError(f"all voxels are {low:g}: there is nothing to segment; check the file")
    return low, high


def volume_notes(
    volume: Volume, windows: Windows, low: float, high: float, modality: Modality | None
) -> tuple[str, ...]:
    """What is odd about a volume, without being wrong."""
    notes = []
    if modality is None and low <= -500 and high >= 500:
        notes.append("the values look like CT in HU; pass modality='ct' to clamp them as trained")
    if modality == "ct" and low >= 0:
        notes.append("no value is below 0, so these are hardly HU; check the intercept or modality")
    if high <= 0:
        notes.append("no value is above 0, so the network sees an empty image; shift the values")
    notes += _header_notes(volume)
    thin = min(windows.geometry.resampled_shape)
    if thin < windows.side_vox / 8:
        notes.append(
            f"the volume is only {thin} voxels thick at the network's spacing, so it sees mostly "
            "padding; expect less"
        )
    return tuple(notes)


def _header_notes(volume: Volume) -> list[str]:
    """What a file's header leaves open about the place of its voxels."""
    if volume.header is None:
        return []
    qform = volume.header.get_qform(coded=True)[0]
    sform = volume.header.get_sform(coded=True)[0]
    if qform is None and sform is None:
        return ["the file does not say how it lies in the body; left may be right"]
    if qform is None or sform is None:
        return []
    corners = np.array([[*c, 1] for c in itertools.product(*((0, n - 1) for n in volume.shape))])
    apart_mm = float(np.linalg.norm(corners @ (qform - sform).T, axis=1).max())
    if apart_mm > min(volume.spacing_mm) / 2:
        return [f"the file's qform and sform lie {apart_mm:.1f} mm apart; the sform is taken"]
    return []


def checked_mask(
    volume: Volume, logits: NDArray[Any] | None, mask: NDArray[Any] | Volume | None
) -> NDArray[Any]:
    """A mask prompt as float logits or as bool, on the volume's grid."""
    if isinstance(mask, Volume):
        if not np.allclose(mask.affine, volume.affine, atol=1e-3):
            raise ValueError("the mask's affine is not the volume's; resample it to the volume")
        mask = mask.array
    values = np.asarray(mask if logits is None else logits)
    if values.shape != volume.shape:
        raise ValueError(
            f"a mask prompt of {values.shape} voxels is not on the volume's grid {volume.shape}; "
            "resample it"
        )
    if logits is None:
        inside: NDArray[np.bool_] = values != 0
        return inside
    if values.dtype.kind != "f":
        raise TypeError(f"logits of type {values.dtype}; give floating logits, or pass it as mask=")
    if not np.isfinite(values).all():
        raise ValueError("the logits hold NaN or infinity; replace those voxels")
    return values
