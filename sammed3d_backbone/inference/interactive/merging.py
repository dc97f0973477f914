"""Independent masks -> one label map, by a rule that the user names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive.prediction import Prediction

Policy = Literal["refuse", "first", "last", "likeliest"]
POLICIES: tuple[Policy, ...] = ("refuse", "first", "last", "likeliest")


@dataclass(frozen=True, eq=False)
class Labels:
    """A label map and what its values mean.

    Args:
        volume: (X, Y, Z) uint8 or uint16, 0 is background.
        names: Value -> object.
        overlap: Voxels that more than one object claimed.
    """

    volume: Volume
    names: Mapping[int, str]
    overlap: int


def merge(predictions: Mapping[str, Prediction], policy: Policy) -> Labels:
    """The label map of several objects of one volume, numbered from 1 in their order.

    Args:
        predictions: By name.
        policy: Who gets a voxel that several claim: nobody ("refuse" raises), the "first" object,
            the "last", or the one to which the network gives the highest probability.

    Raises:
        ValueError: If the policy is unknown, there is nothing to merge, or objects overlap that
            must not.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r}; give one of {', '.join(POLICIES)}")
    if not predictions:
        raise ValueError("there is no object to merge; give at least one prediction")
    masks = [prediction.mask for prediction in predictions.values()]
    claims = np.zeros(masks[0].shape, dtype=np.uint16)
    for mask in masks:
        claims += mask
    disputed = claims > 1
    overlap = int(disputed.sum())
    if overlap and policy == "refuse":
        names = [name for name, p in predictions.items() if (p.mask & disputed).any()]
        raise ValueError(
            f"{', '.join(names)} overlap in {overlap} voxels; correct them, or say by policy= "
            "who gets these voxels"
        )
    labels = np.zeros(masks[0].shape, dtype=np.uint8 if len(masks) < 256 else np.uint16)
    for value, mask in enumerate(masks, start=1):
        labels[mask & (labels == 0) if policy == "first" else mask] = value
    if overlap and policy == "likeliest":
        labels[disputed] = 1 + _likeliest(list(predictions.values()), disputed)
    source = next(iter(predictions.values())).source
    volume = Volume(labels, source.affine, source.header)
    return Labels(volume, dict(enumerate(predictions, start=1)), overlap)


def _likeliest(predictions: list[Prediction], disputed: NDArray[np.bool_]) -> NDArray[np.intp]:
    """For each disputed voxel, the claimant with the highest probability."""
    scores = [
        np.where(prediction.mask[disputed], prediction.probs()[disputed], -1)
        for prediction in predictions
    ]
    best: NDArray[np.intp] = np.argmax(scores, axis=0)
    return best
