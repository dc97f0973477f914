"""The preprocessing of a scan for a network, as data that travels with the weights.

A record of weights and the card of a fine-tuned model both hold a `Preprocessing`. Predictor,
feature extraction, fine-tuning, exported models and the self-test read it from there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sammed3d_backbone.data.geometry import Geometry, Triple, TripleMm
from sammed3d_backbone.data.intensity import MODES, normalise
from sammed3d_backbone.data.limits import require_spacing, value_range

if TYPE_CHECKING:
    from sammed3d_backbone.data.volume import Volume  # needs nibabel, which loading does without

Modality = Literal["ct", "mr", "us"]
Statistics = Literal["crop", "volume"]
DEFAULT = "default"
MODALITIES: dict[str, Modality] = {"ct": "ct", "mr": "mr", "mri": "mr", "us": "us"}
MODALITIES["ultrasound"] = "us"


def modality_of(name: str) -> Modality | None:
    """The modality of a channel's name, such as "mr" for "MR T2w"; None if it is unknown."""
    return MODALITIES.get(name.split(" ")[0].lower())


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that a network expects.

    Args:
        spacing_mm: Voxel spacing along R, A, S; None keeps the spacing of each scan.
        intensity: Intensity mode of `data.intensity.normalise` by modality ("ct", "mr", "us");
            the key "default" serves scans whose modality is not given.
        statistics: Voxels over which mean and deviation are taken: those of each crop (in training)
            or window (at inference) by itself, or those of the whole resampled volume.
        crop_vox: Size of the network's input along R, A, S in voxels.
        orientation: Directions of array axes 0, 1, 2; only "RAS" is implemented.

    Raises:
        ValueError: If a field has a value that no network can be trained with.
    """

    spacing_mm: TripleMm | None
    intensity: Mapping[str, str]
    statistics: Statistics
    crop_vox: tuple[int, int, int]
    orientation: str = "RAS"

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic)

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and not all(0 < mm < math.inf for mm in self.spacing_mm):
            raise ValueError(
                f"spacing_mm={self.spacing_mm}: expected three positive numbers, or null to keep "
                "the spacing of each scan"
            )
        if self.spacing_mm is not None:
            require_spacing(self.spacing_mm)
        unknown = sorted({*self.intensity.values()} - {*MODES})
        if unknown or DEFAULT not in self.intensity:
            raise ValueError(
                f"intensity={dict(self.intensity)}: expected modes among {', '.join(MODES)} and "
                f"one under {DEFAULT!r}"
            )
        if self.statistics not in ("crop", "volume"):
            raise ValueError(f"statistics={self.statistics!r}: expected 'crop' or 'volume'")
        if len(self.crop_vox) != 3 or min(self.crop_vox) < 1:
            raise ValueError(f"crop_vox={self.crop_vox}: expected three positive whole numbers")
        if self.orientation != "RAS":
            raise ValueError(f"orientation={self.orientation!r}: only 'RAS' is implemented")

    def intensity_mode(self, modality: Modality | None) -> str:
        """The intensity mode for scans of a modality; None if the modality is not known.

        Raises:
            ValueError: If the network was not trained on that modality.
        """
        name = DEFAULT if modality is None else modality
        if name not in self.intensity:
            known = sorted({*self.intensity} - {DEFAULT})
            raise ValueError(f"modality={modality!r}: these weights know {known or 'none'}")
        return self.intensity[name]

    def image(
        self,
        volume: Volume,
        modality: Modality | None = None,
        *,
        min_shape: Triple | None = None,
        multiple_of: int = 1,
    ) -> tuple[Tensor, Geometry]:
        """A volume on the network's grid, and the way back to its own grid.

        With statistics over the volume the intensities are already normalised; with statistics over
        crops they are raw, and `crops` normalises each crop. Padding on both sides has the value
        that a raw zero gets.

        Args:
            volume: Any number of channels.
            modality: Chooses the intensity mode.
            min_shape: Least number of voxels along each axis; None for `crop_vox`.
            multiple_of: Each side is padded to a multiple of this.

        Shapes:
            returns: (C, X', Y', Z') float32, axes towards R, A, S.

        Raises:
            ValueError: If a voxel is not finite, all are alike, the grid would be too large, or the
                network does not know the modality.
        """
        mode = self.intensity_mode(modality)
        value_range(volume.array)
        plain = Geometry.plan(volume.shape, volume.affine, self.spacing_mm)
        x, y, z = (
            max(side, -(-n // multiple_of) * multiple_of)
            for side, n in zip(min_shape or self.crop_vox, plain.resampled_shape, strict=True)
        )
        geometry = Geometry.plan(volume.shape, volume.affine, self.spacing_mm, min_shape=(x, y, z))
        raw = geometry.resample(volume.array)
        if self.statistics == "crop":
            return geometry.to_box(raw), geometry
        normalised = normalise(raw, mode)
        return geometry.to_box(normalised.image, normalised.zero), geometry

    def crops(self, crops: Tensor, modality: Modality | None = None) -> Tensor:
        """The network's input from crops of what `image` returns.

        Shapes:
            crops: (B, C, X, Y, Z).
            returns: the same.
        """
        if self.statistics == "volume":
            return crops
        mode = self.intensity_mode(modality)
        return torch.stack([normalise(crop, mode).image for crop in crops])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "intensity": dict(self.intensity)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The record that `to_dict` wrote; raises ValueError if a field is not valid."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(values)


# Source: training code of SAM-Med3D: CT clamped to [-1000, 1000] HU, then the z-score of each crop
# over its voxels above 0. Weights of unknown training are taken to expect the same.
SAM_MED3D = Preprocessing(
    spacing_mm=(1.5, 1.5, 1.5),
    intensity={
        "ct": "ct",
        "mr": "zscore_positive",
        "us": "zscore_positive",
        DEFAULT: "zscore_positive",
    },
    statistics="crop",
    crop_vox=(128, 128, 128),
)


def preprocessing_of(
    network: object, given: Preprocessing | None = None
) -> tuple[Preprocessing, tuple[str, ...]]:
    """The preprocessing of a network's input, with notes on what is assumed or overridden.

    Args:
        network: A network that `encoder` or `sam` built, or any other.
        given: Used instead of the record of the weights.
    """
    known = getattr(getattr(network, "pretrained_cfg", None), "preprocessing", None)
    if known is None:
        if given is not None:
            return given, ()
        return SAM_MED3D, (
            "the weights do not state their preprocessing; that of SAM-Med3D is assumed",
        )
    if given is None:
        return known, ()
    changed = [
        f"{field.name}={getattr(given, field.name)} instead of {getattr(known, field.name)}"
        for field in dataclasses.fields(Preprocessing)
        if field.name != "crop_vox" and getattr(given, field.name) != getattr(known, field.name)
    ]
    return given, ((f"preprocessing overridden: {', '.join(changed)}",) if changed else ())
