"""Intensities -> zero mean, unit deviation, per volume and channel.

Every mode looks at one volume only: scales differ by orders of magnitude between MR scans, and a
statistic pooled over volumes would destroy them. Defined for constant and empty input: where there
is no spread to divide by, the result is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CT_WINDOW_HU = (-1000.0, 1000.0)
MR_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Normalised:
    """A normalised image and what a raw zero (the reference's padding) has become in it.

    Shapes:
        image: (C, X, Y, Z) float32.
        zero: (C,) float32, the value to pad each channel with.
    """

    image: Tensor
    zero: Tensor


def normalise(image: Tensor, mode: str) -> Normalised:
    """The image with each channel normalised by itself.

    Give the whole resampled volume. The released weights were trained with the statistics of each
    crop; here a crop has its volume's, on purpose: windows that slide over one scan then share one
    scale, and a crop of nothing but background is not blown up.

    Args:
        mode: ``"zscore_positive"``: statistics over voxels > 0, applied to all (released weights);
            ``"zscore"``: statistics over all voxels; ``"ct"``: clamp to [-1000, 1000] HU, then as
            released; ``"mr"``: clip to the 0.5 and 99.5 percentiles of voxels > 0, then as
            released.

    Shapes:
        image: (C, X, Y, Z).

    Raises:
        ValueError: If the mode is unknown.
    """
    try:
        one_channel = MODES[mode]
    except KeyError:
        raise ValueError(f"unknown intensity {mode!r}; choose one of {', '.join(MODES)}") from None
    parts = [one_channel(channel.float()) for channel in image]
    return Normalised(
        torch.stack([channel for channel, _ in parts]), torch.stack([zero for _, zero in parts])
    )


def _standardise(x: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The channel and a raw zero, by mean and unbiased deviation of a sample of its voxels."""
    if sample.numel() < 2:
        return torch.zeros_like(x), x.new_zeros(())
    # float64: the mean square of a million voxels at 1e6 does not fit float32
    mean, deviation = sample.double().mean(), sample.double().std()
    if not deviation > 1e-6 * mean.abs().clamp_min(1e-12):
        return torch.zeros_like(x), x.new_zeros(())
    return ((x.double() - mean) / deviation).float(), (-mean / deviation).float()


def _zscore(x: Tensor) -> tuple[Tensor, Tensor]:
    return _standardise(x, x)


def _zscore_positive(x: Tensor) -> tuple[Tensor, Tensor]:
    return _standardise(x, x[x > 0])


def _ct(x: Tensor) -> tuple[Tensor, Tensor]:
    return _zscore_positive(x.clamp(*CT_WINDOW_HU))


def _mr(x: Tensor) -> tuple[Tensor, Tensor]:
    positive = x[x > 0]
    if positive.numel() < 2:
        return torch.zeros_like(x), x.new_zeros(())
    ordered = positive.sort().values
    low, high = (
        float(ordered[round(percent / 100 * (len(ordered) - 1))]) for percent in MR_PERCENTILES
    )
    # a raw zero stays the background, below the clip, so only the upper end is cut there
    return _zscore_positive(torch.where(x > 0, x.clamp(low, high), x.clamp_max(high)))


MODES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "zscore_positive": _zscore_positive,
    "zscore": _zscore,
    "ct": _ct,
    "mr": _mr,
}
