"""Click strategies in batched form, on the decoder's grid.

Input: objects on the image's voxels and masks on the decoder's cells. Output: a voxel and a label
for each object. Equal to `strategies.uniform` and `strategies.deepest` on masks that are
enlarged to the image's grid without interpolation, at a hundredth of their cost. Letters: Q
objects, S voxels a side, s cells a side, f = S / s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sammed3d_backbone.models.attention import Grid


def shares_of_cells(truth: Tensor, grid: Grid) -> Tensor:
    """The share of each cell that an object fills.

    Shapes:
        truth: (Q, S, S, S) bool.
        returns: (Q, s, s, s) float32.
    """
    x, y, z = grid
    parts = truth.view(torch.uint8).unflatten(3, (z, -1)).sum(4, dtype=torch.uint8)
    parts = parts.unflatten(2, (y, -1)).sum(3, dtype=torch.uint8)
    counts: Tensor = parts.unflatten(1, (x, -1)).sum(2, dtype=torch.float32)
    return counts * (x * y * z / truth[0].numel())


def next_points(
    truth: Tensor, share: Tensor, mask: Tensor, draws: Tensor, deep_share: float
) -> tuple[Tensor, Tensor]:
    """A click on each object, on a wrong voxel; where none is wrong, on any voxel of the object.

    A deep click falls into one of the deepest cells of an error (see `deepest_cells`), missed or
    extra, whichever is deeper; other clicks fall on any wrong voxel, each with the same
    probability. If no cell is mostly wrong, a deep click falls on any wrong voxel, too.

    Args:
        truth: The objects.
        share: Result of `shares_of_cells`.
        mask: Predicted masks.
        draws: Random numbers from 0 to 1 that choose the kind of click, the cell, and the voxel.
        deep_share: Share of the clicks that are deep.

    Shapes:
        truth: (Q, S, S, S) bool.
        share: (Q, s, s, s).
        mask: (Q, s, s, s) bool.
        draws: (Q, 3).
        returns: voxel indices (Q, 1, 3) and labels (Q, 1).
    """
    grid = share.shape[1:]
    f = truth.shape[1] // grid[0]
    wrong = torch.where(mask, 1 - share, share)
    counts = (wrong * f**3).round_().to(torch.int32)  # wrong voxels of each cell
    is_deep = draws[:, 0] < deep_share
    if is_deep.any():
        counts[is_deep] *= _deepest_errors(share[is_deep], mask[is_deep], counts[is_deep])
    if not (has_errors := counts.flatten(1).any(1)).all():
        inside = (share[~has_errors] * f**3).round_().to(torch.int32)
        counts[~has_errors] = inside
    place = _drawn(counts.flatten(1), draws[:, 1])  # (Q,)
    cell = torch.stack(torch.unravel_index(place, grid), dim=-1)  # (Q, 3)
    offsets = torch.arange(f, device=truth.device)
    x, y, z = (cell[:, axis, None] * f + offsets for axis in range(3))  # (Q, f) each
    number = torch.arange(len(truth), device=truth.device).view(-1, 1, 1, 1)
    inside = truth[number, x[:, :, None, None], y[:, None, :, None], z[:, None, None, :]].flatten(1)
    of_cell = mask.flatten(1).gather(1, place.unsqueeze(1)) & has_errors.unsqueeze(1)
    part = _drawn((inside ^ of_cell).to(torch.int32), draws[:, 2])
    voxel = cell * f + torch.stack(torch.unravel_index(part, (f, f, f)), dim=-1)
    labels = inside.gather(1, part.unsqueeze(1)).long()
    return voxel.unsqueeze(1), labels


def deepest_cells(region: Tensor) -> tuple[Tensor, Tensor]:
    """The deepest cells of a region, by the number of steps to the nearest cell outside it.

    Cells beyond the grid count as outside; a step goes to any of the 26 neighbours.

    Shapes:
        region: (Q, s, s, s) bool.
        returns: (Q, s, s, s) bool and their depth (Q,), 0 where the region is empty.
    """
    deepest, depth = region, region.flatten(1).any(1).int()
    while True:
        smaller = _eroded(deepest)
        is_left = smaller.flatten(1).any(1)
        if not is_left.any():
            return deepest, depth
        deepest = torch.where(is_left.view(-1, 1, 1, 1), smaller, deepest)
        depth = depth + is_left


def _deepest_errors(share: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
    """The cells that a deep click may fall into; all wrong ones if no cell is mostly wrong.

    Shapes:
        share, mask, counts: (Q, s, s, s).
        returns: (Q, s, s, s) bool.
    """
    missed, extra = (share > 0.5) & ~mask, (share < 0.5) & mask
    cells, depths = deepest_cells(torch.cat([missed, extra]))
    of_missed, of_extra = depths.chunk(2)
    is_missed = (of_missed >= of_extra).view(-1, 1, 1, 1)
    deep_missed, deep_extra = cells.chunk(2)
    nowhere = (of_missed + of_extra == 0).view(-1, 1, 1, 1)
    return torch.where(is_missed, deep_missed, deep_extra) | (nowhere & (counts > 0))


def _eroded(region: Tensor) -> Tensor:
    """Binary erosion with the 26 neighbours; (Q, s, s, s) bool."""
    for axis in (1, 2, 3):
        n = region.shape[axis]
        inner = region.narrow(axis, 1, n - 2) if n > 2 else region.narrow(axis, 0, 0)
        smaller = torch.zeros_like(region)
        if n > 2:
            kept = inner & region.narrow(axis, 0, n - 2) & region.narrow(axis, 2, n - 2)
            smaller.narrow(axis, 1, n - 2).copy_(kept)
        region = smaller
    return region


def _drawn(counts: Tensor, share: Tensor) -> Tensor:
    """Draws an entry of each row with probability proportional to its count.

    Shapes:
        counts: (Q, M) int32.
        share: (Q,), random numbers from 0 to 1.
        returns: (Q,).
    """
    # Counts up to each entry; the default, int64, takes five times as long.
    upto = counts.cumsum(1, dtype=torch.int32)
    last = upto[:, -1]
    number = torch.minimum((share * last).to(torch.int32), last - 1)
    place = torch.searchsorted(upto, number.unsqueeze(1), right=True).squeeze(1)
    return place.clamp(max=counts.shape[1] - 1)
