"""Intensities -> zero mean and unit deviation, per volume or crop and per channel.

Every mode uses one image only: scales of MR scans differ by orders of magnitude, and statistics
pooled over images would destroy them. Where there is no spread to divide by, the result is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

CT_WINDOW_HU = (-1000.0, 1000.0)
MR_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Normalised:
    """A normalised image, and what a raw zero (the reference's padding) becomes in it.

    Shapes:
        image: (C, X, Y, Z) float32.
        zero: (C,) float32, the value to pad each channel with.
    """

    image: Tensor
    zero: Tensor


@dataclass(frozen=True)
class IntensityScale:
    """A clipping function, and the mean and deviation of the clipped intensities.

    Args:
        clip: Applied before the z-score.
        mean: Mean of the voxels that count.
        deviation: Their unbiased deviation; 0 where it is too small to divide by.
    """

    clip: Callable[[Tensor], Tensor]
    mean: float
    deviation: float

    def apply(self, x: Tensor) -> Tensor:
        """The z-score of intensities, float32; zeros where there is no deviation."""
        if self.deviation == 0:
            return torch.zeros_like(x, dtype=torch.float32)
        return ((self.clip(x.float()).double() - self.mean) / self.deviation).float()


def normalise(image: Tensor, mode: str) -> Normalised:
    """The image with each channel normalised by its own statistics.

    Args:
        image: A whole resampled volume, or a crop; see `Preprocessing.statistics`.
        mode: ``"zscore_positive"``: statistics over voxels > 0, applied to all;
            ``"zscore"``: statistics over all voxels; ``"ct"``: clamp to [-1000, 1000] HU, then
            zscore_positive; ``"mr"``: clip to the 0.5 and 99.5 percentiles of voxels > 0, then
            zscore_positive.

    Shapes:
        image: (C, X, Y, Z).

    Raises:
        ValueError: If the mode is unknown.
    """
    scales = [measure_scale(partial(_in_one_slab, channel), mode) for channel in image]
    zero = image.new_zeros((), dtype=torch.float32)
    return Normalised(
        torch.stack([scale.apply(x) for scale, x in zip(scales, image, strict=True)]),
        torch.stack([scale.apply(zero) for scale in scales]),
    )


def measure_scale(slabs: Callable[[], Iterable[Tensor]], mode: str) -> IntensityScale:
    """The intensity scale of an image that is given in slabs, so that it need not be in memory.

    Only the mode "mr" holds all voxels above 0 at once, for their percentiles.

    Args:
        slabs: Returns an iterator over all slabs of one channel; called once or twice.
        mode: See `normalise`.

    Raises:
        ValueError: If the mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"unknown intensity {mode!r}; choose one of {', '.join(MODES)}")
    clip = MODES[mode](slabs)
    parts: list[tuple[int, float, float]] = []
    for slab in slabs():
        x = clip(slab.float())
        sample = x if mode == "zscore" else x[x > 0]
        if count := sample.numel():
            # float64: the mean square of a million voxels at 1e6 does not fit float32
            exact = sample.double()
            spread = float(exact.std()) if count > 1 else 0.0
            parts.append((count, float(exact.mean()), spread))
    total = sum(count for count, _, _ in parts)
    if total < 2:
        return IntensityScale(clip, 0.0, 0.0)
    if len(parts) == 1:
        _, mean, deviation = parts[0]
    else:
        mean = sum(count * m for count, m, _ in parts) / total
        squares = sum((count - 1) * d**2 + count * (m - mean) ** 2 for count, m, d in parts)
        deviation = math.sqrt(squares / (total - 1))
    if not deviation > 1e-6 * max(abs(mean), 1e-12):
        return IntensityScale(clip, 0.0, 0.0)
    return IntensityScale(clip, mean, deviation)


def _in_one_slab(channel: Tensor) -> list[Tensor]:
    return [channel]


def _unclipped(slabs: Callable[[], Iterable[Tensor]]) -> Callable[[Tensor], Tensor]:  # noqa: ARG001
    return lambda x: x


def _ct_window(slabs: Callable[[], Iterable[Tensor]]) -> Callable[[Tensor], Tensor]:  # noqa: ARG001
    return lambda x: x.clamp(*CT_WINDOW_HU)


def _mr_percentiles(slabs: Callable[[], Iterable[Tensor]]) -> Callable[[Tensor], Tensor]:
    positive = torch.cat([slab[slab > 0].float() for slab in slabs()])
    if positive.numel() < 2:
        return lambda x: torch.zeros_like(x)
    ordered = positive.sort().values
    low, high = (
        float(ordered[round(percent / 100 * (len(ordered) - 1))]) for percent in MR_PERCENTILES
    )
    # A raw zero stays the background, below the clip, so only the upper end is cut there.
    return lambda x: torch.where(x > 0, x.clamp(low, high), x.clamp_max(high))


MODES: dict[str, Callable[[Callable[[], Iterable[Tensor]]], Callable[[Tensor], Tensor]]] = {
    "zscore_positive": _unclipped,
    "zscore": _unclipped,
    "ct": _ct_window,
    "mr": _mr_percentiles,
}
