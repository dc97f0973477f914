"""Scores of one predicted label volume against its reference, class by class."""

from __future__ import annotations

import math

import torch
from monai.metrics import compute_dice
from torch import Tensor


def dice_per_class(prediction: Tensor, label: Tensor, classes: int) -> list[float]:
    """Dice of every class but background.

    A class that neither holds scores NaN (nothing was asked, nothing was said) and is left out of
    means; a class that only one of them holds scores 0.

    Shapes:
        prediction: (X, Y, Z) integers.
        label: (X, Y, Z) integers.

    Args:
        prediction: Predicted labels.
        label: Reference labels.
        classes: Number of classes, background included.
    """
    values = torch.arange(1, classes).reshape(-1, 1, 1, 1)
    ours, theirs = prediction[None] == values, label[None] == values  # (K - 1, X, Y, Z)
    scores = compute_dice(ours[None], theirs[None], include_background=True, ignore_empty=False)[0]
    empty = ~(ours.flatten(1).any(1) | theirs.flatten(1).any(1))
    return [math.nan if e else float(s) for s, e in zip(scores, empty, strict=True)]


def mean_of_known(scores: list[float]) -> float:
    """Mean of the scores that are numbers; NaN if there is none."""
    known = [score for score in scores if not math.isnan(score)]
    return sum(known) / len(known) if known else math.nan
