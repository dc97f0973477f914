"""Logits of an image from overlapping windows, the finished planes first.

MONAI's `sliding_window_inference` holds the logits of all classes of the whole image, several GiB
for a CT of the trunk. Here planes are handed on as soon as no further window reaches them. Windows,
weights and their order are MONAI's, and so is every bit of the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.loading.fitting import require_finite_output

BATCH = 2  # windows; no more than two rows of windows are in one


@torch.inference_mode()
def sliding_planes(
    network: Callable[[Tensor], Tensor], image: Tensor, sides: Triple, overlap: float
) -> Iterator[Tensor]:
    """Mean logits of windows with Gaussian weights, in parts along the first axis.

    Args:
        network: Maps (B, C, *sides) to (B, K, *sides).
        image: The image; no side is smaller than the window's.
        sides: Sides of the window.
        overlap: Share of a side by which neighbouring windows overlap, in [0, 1).

    Shapes:
        image: (C, X, Y, Z).
        returns: (K, x, Y, Z), of which all x together are X; overwritten when the next is taken.
    """
    from monai.data.utils import compute_importance_map, dense_patch_slices

    x, y, z = image.shape[1:]
    steps = [
        side if side == n else max(1, int(side * (1 - overlap)))
        for side, n in zip(sides, (x, y, z), strict=True)
    ]
    places = dense_patch_slices((x, y, z), sides, steps)
    weights = compute_importance_map(
        sides, mode="gaussian", sigma_scale=0.125, device=image.device, dtype=image.dtype
    )
    # A batch spans two rows of windows only where a row has no whole number of batches.
    in_row = sum(place[0].start == 0 for place in places)
    depth = min(x, sides[0] + bool(in_row % BATCH) * steps[0])
    counts = image.new_zeros(depth, y, z)
    total = counts[None, :0]
    first = 0
    for number in range(0, len(places), BATCH):
        chosen = places[number : number + BATCH]
        logits = network(torch.stack([image[(slice(None), *place)] for place in chosen]))
        require_finite_output(logits)
        logits *= weights
        if number == 0:
            total = image.new_zeros(logits.shape[1], depth, y, z)
        if done := int(chosen[0][0].start) - first:
            total[:, :done] /= counts[:done]
            yield total[:, :done]
            for part in (*total, counts):
                part[:-done] = part[done:].clone()
                part[-done:] = 0
            first += done
        for place, found in zip(chosen, logits, strict=True):
            where = (slice(place[0].start - first, place[0].stop - first), *place[1:])
            total[(slice(None), *where)] += found
            counts[where] += weights
    total[:, : x - first] /= counts[: x - first]
    yield total[:, : x - first]


def joined(parts: Iterator[Tensor], shape: Sequence[int]) -> Tensor:
    """Parts along the first axis as one tensor, (K, *shape)."""
    with torch.inference_mode():
        first = next(parts)
        whole = first.new_empty(len(first), *shape)
        done = 0
        for part in itertools.chain([first], parts):
            whole[:, done : done + part.shape[1]] = part
            done += part.shape[1]
    return whole
