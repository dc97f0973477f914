"""The mapping from an input volume to the network's grid, and its inverse.

A `Geometry` is planned once from shape, affine and wanted spacing. It reorients the axes towards
R, A, S (exact: a permutation and flips), resamples, and pads or crops to a box; `invert` undoes all
three. Oblique volumes keep their oblique axes: nothing is straightened, so nothing is lost.

Grids: voxel centres lie at integer indices, and a grid of ``n`` voxels covers ``[-0.5, n - 0.5]``.
Resampling keeps that extent, so the new spacing is ``n * spacing / n'`` for the whole number of
voxels ``n'`` nearest to the wanted one; it is recorded as `spacing_mm` and the way back is exact.

Why not MONAI's `Spacingd` and `Invertd`: labels go to the class with the largest linear share,
for which `Spacingd` needs a one-hot channel per class; `invert_labels` brings back one class and a
few planes at a time, so that memory does not grow with them, where `Invertd` inverts all at once;
and the way back ends on the stored shape of the input, so its affine is kept and not recomputed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsInt

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sammed3d_backbone.data.limits import require_size
from sammed3d_backbone.data.regions import values_of

SLAB_PLANES = 4  # planes of a volume that are computed at a time
Triple = tuple[int, int, int]
TripleMm = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Geometry:
    """The mapping of one volume to the network's grid and back.

    Shapes:
        input: (..., X, Y, Z), the voxel order of the file.
        network: (..., X', Y', Z'), axes towards R, A, S, at `spacing_mm`, `box_shape` voxels.
    """

    input_shape: Triple
    input_affine: NDArray[np.float64]
    axes: Triple  # axis i of the oriented volume is axis axes[i] of the input
    flips: tuple[bool, bool, bool]  # whether axis i of the oriented volume is reversed
    resampled_shape: Triple
    spacing_mm: TripleMm  # as resampled, nearest to the wanted one
    box_start: Triple  # first voxel of the box in the resampled grid; negative where it pads
    box_shape: Triple

    @classmethod
    def plan(
        cls,
        shape: Triple,
        affine: NDArray[np.float64],
        spacing_mm: TripleMm | None = None,
        *,
        min_shape: Triple | None = None,
    ) -> Geometry:
        """The geometry of a volume.

        Args:
            shape: Voxels along X, Y, Z of the input.
            affine: Voxel -> RAS+ mm.
            spacing_mm: Wanted along the R, A, S axes; None keeps the input's.
            min_shape: The box is padded on both sides to at least these voxels.

        Raises:
            ValueError: If the wanted spacing is not positive, the affine flattens space, or the
                grid would be too large.
        """
        axes, flips = nearest_ras(affine)
        oriented_shape = tuple(shape[axis] for axis in axes)
        native_mm = np.linalg.norm(affine[:3, :3], axis=0)[list(axes)]
        wanted_mm = native_mm if spacing_mm is None else np.asarray(spacing_mm, dtype=float)
        if not (np.isfinite(wanted_mm).all() and (wanted_mm > 0).all()):
            raise ValueError(f"spacing_mm={spacing_mm}: expected three positive numbers")
        resampled = tuple(
            max(1, round(n * float(native) / float(wanted)))
            for n, native, wanted in zip(oriented_shape, native_mm, wanted_mm, strict=True)
        )
        effective = tuple(
            float(native) * n / m
            for n, m, native in zip(oriented_shape, resampled, native_mm, strict=True)
        )
        plain = cls(
            input_shape=_triple(shape),
            input_affine=np.array(affine, dtype=np.float64),
            axes=axes,
            flips=flips,
            resampled_shape=_triple(resampled),
            spacing_mm=effective,  # type: ignore[arg-type]
            box_start=(0, 0, 0),
            box_shape=_triple(resampled),
        )
        require_size(plain.resampled_shape, effective)
        if min_shape is None:
            return plain
        box = tuple(max(n, m) for n, m in zip(resampled, min_shape, strict=True))
        require_size(box, effective)
        start = tuple(-((b - n) // 2) for n, b in zip(resampled, box, strict=True))
        return plain.boxed(_triple(start), _triple(box))

    def boxed(self, start: Triple, shape: Triple) -> Geometry:
        """The same geometry, cut and padded to a box of the resampled grid."""
        return replace(self, box_start=start, box_shape=shape)

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel of the network's grid -> RAS+ mm, (4, 4)."""
        to_oriented = np.eye(4)  # voxel of the box -> voxel of the oriented volume
        for i, (axis, n) in enumerate(zip(self.axes, self.resampled_shape, strict=True)):
            step = self.input_shape[axis] / n
            to_oriented[i, i] = step
            to_oriented[i, 3] = (self.box_start[i] + 0.5) * step - 0.5
        to_input = np.zeros((4, 4))
        to_input[3, 3] = 1
        for i, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            to_input[axis, i] = -1 if flip else 1
            to_input[axis, 3] = self.input_shape[axis] - 1 if flip else 0
        affine: NDArray[np.float64] = self.input_affine @ to_input @ to_oriented
        return affine

    def oriented(self, array: NDArray[Any]) -> NDArray[Any]:
        """A view of the array with axes towards R, A, S; writing to it writes to the array.

        Shapes:
            array: (X, Y, Z), on the input grid.
        """
        turned = array.transpose(self.axes)
        return turned[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]

    def oriented_voxel(self, voxel: Triple) -> Triple:
        """The index in the result of `oriented` of a voxel of the input."""
        x, y, z = (
            self.input_shape[axis] - 1 - voxel[axis] if flip else voxel[axis]
            for axis, flip in zip(self.axes, self.flips, strict=True)
        )
        return x, y, z

    def resample(self, array: NDArray[Any] | Tensor) -> Tensor:
        """The array oriented and resampled linearly, before the box.

        Shapes:
            array: (X, Y, Z) or (C, X, Y, Z), on the input grid.
            returns: (C, X', Y', Z') float32, X', Y', Z' being `resampled_shape`.
        """
        x = self._orient(array).float()
        return _interpolate(x, self.resampled_shape)

    def resample_box(self, array: NDArray[Any], start: Triple, shape: Triple) -> Tensor:
        """A box of the resampled grid, interpolated linearly; only that box is computed.

        Args:
            array: (X, Y, Z), on the input grid.
            start: First voxel of the box; negative in padding.
            shape: Voxels of the box.

        Shapes:
            returns: (*shape) float32; zeros outside the volume.
        """
        oriented = self.oriented(array)
        positions, padding, region = [], [], []
        for axis, (first, side) in enumerate(zip(start, shape, strict=True)):
            n, m = oriented.shape[axis], self.resampled_shape[axis]
            low, high = max(first, 0), min(first + side, m)
            own = (np.arange(low, high) + 0.5) * (n / m) - 0.5
            lower, upper = max(int(own[0]), 0), min(int(own[-1]) + 2, n)
            positions.append(own - lower)
            padding.append((low - first, first + side - high))
            region.append(slice(lower, upper))
        x = torch.from_numpy(np.ascontiguousarray(oriented[tuple(region)], dtype=np.float32))
        # The axis that shrinks most comes first, the one that grows most last. Among equal axes the
        # third, along which gathering is slow, comes where there are the fewest values.
        growth = [len(own) / n for own, n in zip(positions, x.shape, strict=True)]
        for axis in sorted(range(3), key=lambda a: (growth[a], a if growth[a] < 1 else -a)):
            x = interpolate_axis(x, axis, positions[axis])
        return F.pad(x, [p for pair in reversed(padding) for p in pair])

    def resample_labels(self, labels: NDArray[Any] | Tensor) -> Tensor:
        """Integer labels on the resampled grid: the class with the largest linear share.

        Only the eight voxels around a new one have a share in it, so the number of classes does not
        matter; and where these are alike, which is nearly everywhere, nothing is compared. A class
        that has the largest share nowhere takes the voxels nearest to its own, unless they are all
        that another class has.

        Shapes:
            labels: (X, Y, Z) integers on the input grid.
            returns: (1, X', Y', Z') uint8 or int16, X', Y', Z' being `resampled_shape`.
        """
        x = _small_integers(self._orient(labels).contiguous())[0]
        if _triple(x.shape) == self.resampled_shape:
            return x[None]
        axes = [_neighbours(n, m) for n, m in zip(x.shape, self.resampled_shape, strict=True)]
        corners = [
            x[a][:, b][:, :, c]
            for a, b, c in itertools.product(*((low, high) for low, high, _ in axes))
        ]  # 8 times (X', Y', Z')
        result = corners[0].clone()
        is_mixed = torch.zeros(self.resampled_shape, dtype=torch.bool)
        for corner in corners[1:]:
            is_mixed |= corner != result
        places = is_mixed.nonzero(as_tuple=True)
        if places[0].numel():
            above = [share[index] for (_, _, share), index in zip(axes, places, strict=True)]
            sides = itertools.product(*((1 - share, share) for share in above))
            result[is_mixed] = _heaviest(
                torch.stack([corner[is_mixed] for corner in corners]),
                torch.stack([a * b * c for a, b, c in sides]),
            )
        present = {*values_of(result.numpy()).tolist()}
        for value in sorted({*values_of(x.numpy()).tolist()} - present):
            tried = result.clone()
            for voxel in (x == value).nonzero().tolist():
                near = itertools.starmap(_nearest, zip(voxel, x.shape, tried.shape, strict=True))
                tried[tuple(near)] = value
            if present < {*values_of(tried.numpy()).tolist()}:  # no other class is lost for it
                result, present = tried, present | {value}
        return result[None]

    def to_box(self, resampled: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """The box; voxels outside the volume are `fill`, one value or one per channel.

        Shapes:
            resampled: (C, X', Y', Z') of `resampled_shape`.
            returns: (C, *box_shape).
        """
        channels = resampled.shape[0]
        value = torch.as_tensor(fill, dtype=resampled.dtype).reshape(-1, 1, 1, 1)
        box = value.expand(channels, *self.box_shape).clone()
        inside_box, inside_volume = self._overlap()
        box[(slice(None), *inside_box)] = resampled[(slice(None), *inside_volume)]
        return box

    def apply(self, array: NDArray[Any] | Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """The array on the network's grid: oriented, resampled, boxed; (C, *box_shape)."""
        return self.to_box(self.resample(array), fill)

    def invert(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values on the network's grid, brought back linearly to the input grid.

        Shapes:
            values: (K, *box_shape), for instance class probabilities.
            returns: (K, X, Y, Z) float32 of `input_shape`; `fill` where the box did not reach.

        Raises:
            ValueError: If the values do not have the shape of the box.
        """
        return self._unorient(_interpolate(self._from_box(values.float(), fill), self._oriented()))

    def invert_labels(self, probs: Tensor | Iterable[Tensor], *, nearest: bool = False) -> Tensor:
        """Class labels on the input grid, from class probabilities on the network's grid.

        The probabilities are resampled and then compared, one class and a few planes at a time;
        with `nearest` they are compared first.

        Args:
            probs: All of them, or parts along the first axis from front to back, each of which may
                be overwritten once the next one is taken.
            nearest: Resample labels instead of probabilities.

        Shapes:
            probs: (K, *box_shape); class 0 is background and fills what the box did not reach.
            returns: (X, Y, Z) uint8 or int16 of `input_shape`.

        Raises:
            ValueError: If the probabilities do not have the shape of the box.
        """
        parts = [probs] if isinstance(probs, Tensor) else probs
        if nearest:
            classes = torch.cat([part.argmax(0, keepdim=True).short() for part in parts], dim=1)
            inside = self._from_box(classes.float(), 0.0)
            oriented = F.interpolate(inside[None], size=self._oriented(), mode="nearest-exact")[0]
            return _small_integers(self._unorient(oriented)[0].round().long())
        n, m = self._oriented()[0], self.resampled_shape[0]
        # In float32, as `_interpolate` computes it.
        place = ((torch.arange(n) + 0.5) * (torch.tensor(float(m)) / n) - 0.5).clamp_min(0)
        lower = place.long()
        share = (place - lower).reshape(-1, 1, 1)
        result = torch.zeros(self._oriented(), dtype=torch.uint8)
        done, row, before = 0, 0, torch.empty(0)
        for rows in self._rows(parts):
            last = row + rows.shape[1]
            if len(rows) > 256:
                result = result.short()
            ready = n if last == m else int((lower + 1 < last).sum())
            for first in range(done, ready, SLAB_PLANES):
                planes = slice(first, min(first + SLAB_PLANES, ready))
                low, high = int(lower[planes][0]), min(int(lower[planes][-1]) + 2, m)
                for value in range(len(rows)):
                    x = rows[value, max(low - row, 0) : high - row]
                    x = torch.cat([before[value], x]) if low < row else x
                    if x.shape[1:] != result.shape[1:]:
                        x = F.interpolate(x[None], size=result.shape[1:], mode="bilinear")[0]
                    index, weight = lower[planes] - low, share[planes]
                    above = (index + 1).clamp_max(len(x) - 1)
                    x = x[index] if n == m else x[index] * (1 - weight) + x[above] * weight
                    if value == 0:
                        best = x
                        continue
                    result[planes][x > best] = value
                    torch.maximum(best, x, out=best)
            done, row, before = ready, last, rows[:, -1:].clone()
        return _small_integers(self._unorient(result[None])[0])

    def _rows(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Parts of the box along the first axis -> parts of the resampled grid.

        Background fills what the box did not reach.

        Shapes:
            parts: (K, x, *box_shape[1:]).
            returns: (K, x', *resampled_shape[1:]).
        """
        (m, *sides), (in_box, *_), (in_volume, *_) = self.resampled_shape, *self._overlap()
        row, filled = 0, 0
        for part in parts:
            self._require_box(part, (*part.shape[1:2], *self.box_shape[1:]))
            if row == 0:
                background = part.new_zeros(len(part), 1, *sides)
                background[0] = 1
                if filled := min(in_volume.start, m):
                    yield background.expand(-1, filled, *sides)
            rows = slice(max(in_box.start - row, 0), max(min(in_box.stop - row, part.shape[1]), 0))
            row += part.shape[1]
            if rows.start < rows.stop:
                filled += rows.stop - rows.start
                yield self._within(part[:, rows].float(), background)
        if row != self.box_shape[0]:
            raise ValueError(f"{row} planes are not the {self.box_shape[0]} of the network's grid")
        if filled < m:
            yield background.expand(-1, m - filled, *sides)

    def _within(self, rows: Tensor, background: Tensor) -> Tensor:
        """The part of rows of the box that lies in the volume, on background where that is less."""
        in_box, in_volume = (inside[1:] for inside in self._overlap())
        found = rows[:, :, in_box[0], in_box[1]]
        if found.shape[2:] == background.shape[2:]:
            return found
        whole = background.repeat(1, rows.shape[1], 1, 1)
        whole[:, :, in_volume[0], in_volume[1]] = found
        return whole

    def _oriented(self) -> Triple:
        """Shape after orientation, before resampling."""
        return _triple([self.input_shape[axis] for axis in self.axes])

    def _orient(self, array: NDArray[Any] | Tensor) -> Tensor:
        """(X, Y, Z) or (C, X, Y, Z) of the file -> (C, X', Y', Z') with axes towards R, A, S."""
        if isinstance(array, np.ndarray) and min(array.strides) < 0:
            array = array.copy()  # torch refuses these; `ascontiguousarray` keeps them on thin axes
        x = torch.as_tensor(array)
        if x.ndim == 3:
            x = x[None]
        if x.ndim != 4 or _triple(x.shape[1:]) != self.input_shape:
            raise ValueError(
                f"array of shape {tuple(x.shape)} is not on this geometry's input grid "
                f"{self.input_shape}; plan a geometry from that array's own shape and affine"
            )
        x = x.permute(0, *(axis + 1 for axis in self.axes))
        return x.flip([i + 1 for i, flip in enumerate(self.flips) if flip])

    def _unorient(self, x: Tensor) -> Tensor:
        """The inverse of `_orient`, (C, X', Y', Z') -> (C, X, Y, Z)."""
        x = x.flip([i + 1 for i, flip in enumerate(self.flips) if flip])
        back = np.argsort(self.axes)
        return x.permute(0, *(int(axis) + 1 for axis in back)).contiguous()

    def _overlap(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part the box and the resampled volume share, in indices of each."""
        in_box, in_volume = [], []
        for start, size, n in zip(
            self.box_start, self.box_shape, self.resampled_shape, strict=True
        ):
            low, high = max(start, 0), max(min(start + size, n), max(start, 0))
            in_volume.append(slice(low, high))
            in_box.append(slice(low - start, high - start))
        return tuple(in_box), tuple(in_volume)

    def _from_box(self, values: Tensor, fill: float) -> Tensor:
        """(C, *box_shape) -> (C, *resampled_shape)."""
        self._require_box(values, self.box_shape)
        volume = values.new_full((values.shape[0], *self.resampled_shape), fill)
        inside_box, inside_volume = self._overlap()
        volume[(slice(None), *inside_volume)] = values[(slice(None), *inside_box)]
        return volume

    def _require_box(self, values: Tensor, shape: tuple[int, ...]) -> None:
        """Refuses values of another shape than (K, *shape)."""
        if values.ndim != 4 or tuple(values.shape[1:]) != shape:
            raise ValueError(
                f"values of shape {tuple(values.shape)} are not on this geometry's network grid; "
                f"give (K, {', '.join(map(str, self.box_shape))})"
            )


def interpolate_axis(
    x: Tensor, axis: int, positions: NDArray[np.float64] | Sequence[float]
) -> Tensor:
    """Values along an axis at continuous indices, linear between them, constant beyond the ends.

    Shapes:
        x: (..., n, ...), n along the axis.
        positions: (m,).
        returns: (..., m, ...).
    """
    at = torch.as_tensor(positions, dtype=torch.float64).clamp(0, x.shape[axis] - 1)
    lower = at.floor().long()
    upper = (lower + 1).clamp_max(x.shape[axis] - 1)
    share = (at - lower).to(x.dtype).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    if not share.any():
        return x.index_select(axis, lower)
    return torch.lerp(x.index_select(axis, lower), x.index_select(axis, upper), share)


def nearest_ras(affine: NDArray[np.float64]) -> tuple[Triple, tuple[bool, bool, bool]]:
    """The input axes that run along R, A and S, and whether they run the other way.

    Among the 48 ways to name the axes, the one with the smallest rotation to R, A, S is chosen. It
    depends on the axes' directions only, not on their order in the file, so one volume stored in
    two orientations becomes the same input. At a tie (axes at 45 degrees) the larger matrix counts,
    compared to six digits, so that rounding in a header decides nothing.
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    u, strength, vt = np.linalg.svd(affine[:3, :3] / np.where(zooms == 0, 1, zooms))
    if strength.min() < 1e-6:
        raise ValueError("singular affine: an axis has no direction of its own; correct the header")
    directions = u @ vt  # (3, 3), column i: the unit vector of input axis i without shear
    named = []
    for order in itertools.permutations(range(3)):
        facing = directions[:, order]
        signs = np.where(np.diagonal(facing) < 0, -1.0, 1.0)
        facing = np.round(facing * signs, 6)
        named.append((round(float(np.trace(facing)), 6), facing.ravel().tolist(), order, signs))
    _, _, order, signs = max(named, key=lambda entry: entry[:2])
    x, y, z = (bool(sign < 0) for sign in signs)
    return _triple(order), (x, y, z)


def _interpolate(x: Tensor, shape: Triple) -> Tensor:
    """(C, X, Y, Z) -> (C, *shape), linear, the same extent; untouched where the shape is equal."""
    if _triple(x.shape[1:]) == shape:
        return x
    return F.interpolate(x[None], size=shape, mode="trilinear", align_corners=False)[0]


def _neighbours(size: int, new_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The voxels below and above each new voxel along an axis, and the weight of the upper one.

    Shapes:
        returns: three times (N,), N being the new size.
    """
    place = (torch.arange(new_size, dtype=torch.float64) + 0.5) * size / new_size - 0.5
    place = place.clamp(0, size - 1)
    low = place.long().clamp(max=max(size - 2, 0))
    return low, (low + 1).clamp(max=size - 1), (place - low).float()


def _nearest(index: int, size: int, new_size: int) -> slice:
    """The new voxels along an axis whose nearest voxel is this one, or else the one around it."""
    first, end = (math.ceil(i * new_size / size - 0.5) for i in (index, index + 1))
    around = int((index + 0.5) * new_size / size)
    return slice(first, end) if first < end else slice(around, around + 1)


def _heaviest(values: Tensor, weights: Tensor) -> Tensor:
    """The value with the largest sum of weights, the smallest of such values.

    Shapes:
        values: (C, N), C of them to choose from.
        weights: (C, N).
        returns: (N,).
    """
    best, chosen = weights.new_full(weights.shape[1:], -1.0), values[0].clone()
    for value in values:
        total = (weights * (values == value)).sum(0)
        is_better = (total > best) | ((total == best) & (value < chosen))
        best, chosen = torch.where(is_better, total, best), torch.where(is_better, value, chosen)
    return chosen


def _small_integers(labels: Tensor) -> Tensor:
    """Labels in the smallest type that holds them."""
    return labels.to(torch.uint8 if int(labels.max()) < 256 else torch.int16)


def _triple(values: Iterable[SupportsInt]) -> Triple:
    x, y, z = (int(v) for v in values)
    return x, y, z
