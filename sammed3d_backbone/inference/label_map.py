"""Masks of several objects -> one label map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive.prediction import Prediction

MergePolicy = Literal["refuse", "first", "last", "likeliest"]
MERGE_POLICIES: tuple[MergePolicy, ...] = ("refuse", "first", "last", "likeliest")


def merge_masks(predictions: Mapping[str, Prediction], policy: MergePolicy) -> tuple[Volume, int]:
    """One label map of several objects of a volume, numbered from 1 in their order.

    Args:
        predictions: Predictions by object name.
        policy: Which object gets a voxel that several claim: none ("refuse" raises an error), the
            "first", the "last", or the one with the highest probability ("likeliest").

    Returns:
        The label map, (X, Y, Z) uint8 or uint16, and the number of voxels that several claim.

    Raises:
        ValueError: If the policy is unknown, there are no predictions, or objects overlap although
            the policy is "refuse".
    """
    if policy not in MERGE_POLICIES:
        raise ValueError(f"policy={policy!r}: expected one of {', '.join(MERGE_POLICIES)}")
    if not predictions:
        raise ValueError("no predictions, since no object was clicked; click inside one first")
    found = list(predictions.values())
    claims = np.zeros(found[0].mask.shape, dtype=np.uint16)
    for prediction in found:
        claims += prediction.mask
    disputed = claims > 1
    overlap = int(disputed.sum())
    if overlap and policy == "refuse":
        names = [name for name, p in predictions.items() if (p.mask & disputed).any()]
        raise ValueError(
            f"{', '.join(names)} overlap in {overlap} voxels; correct them, or choose another "
            "policy="
        )
    labels = np.zeros(claims.shape, dtype=np.uint8 if len(found) < 256 else np.uint16)
    for value, prediction in enumerate(found, start=1):
        free = prediction.mask & (labels == 0) if policy == "first" else prediction.mask
        labels[free] = value
    if overlap and policy == "likeliest":
        scores = [np.where(p.mask[disputed], p.probs()[disputed], -1) for p in found]
        labels[disputed] = 1 + np.argmax(scores, axis=0)
    source = found[0].source
    return Volume(labels, source.affine, source.header), overlap
