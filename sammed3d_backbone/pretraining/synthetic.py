"""Synthetic labelled volumes, so that pretraining does not depend on a few scans.

A body holds ellipsoids, tubes and lumps that overlap, touch, nest, wrap and split each other; all
are bent by one smooth field. Every structure has a brightness and a grain of its own, and the
volume gets what scanners add: shading, blur, thick slices, noise. There is no
anatomy: the aim is to segment whatever differs in appearance, whatever the modality.

Sources of the idea: Billot et al., SynthSeg, Medical Image Analysis 86:102789, 2023 (random
contrast, artefacts and resolution of label maps); Dey et al., anatomix, ICLR 2025 (random shapes
are enough to pretrain on). Code, shapes and numbers are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

AIR, BODY = 0, 1  # in a map of tissues; structures follow
SMALLEST_SIDE_VOX = 8

Field = NDArray[np.float32]
Tissues = NDArray[np.uint8]
Inside = NDArray[np.bool_]
Region = tuple[slice, ...]


class Synthetic(NamedTuple):
    """A synthetic volume.

    Shapes:
        image: (1, S, S, S) float32; mean 0 and deviation 1 over the body, as a scan has them over
            its voxels above 0 after ``intensity: zscore_positive``. Air around it lies lower.
        labels: (1, S, S, S) int64; structures are 1, 2, ... without gaps, all else is 0.
    """

    image: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Synthesis:
    """Difficulty of the volumes."""

    structures: tuple[int, int] = (3, 12)  # fewest and most structures in a volume
    smallest_vox: int = 100  # smaller structures are merged into their surroundings
    contrast: tuple[float, float] = (0.4, 2.0)  # range of brightness against the surroundings
    grain: float = 0.4  # largest standard deviation of the texture, in units of contrast
    noise: float = 0.4  # largest standard deviation of the noise, in units of contrast

    def __post_init__(self) -> None:
        fewest, most = self.structures
        if not 1 <= fewest <= most <= 250:
            raise ValueError(
                f"structures={self.structures}; give the fewest and the most, both from 1 to 250"
            )
        if self.smallest_vox < 1:
            raise ValueError(f"smallest_vox={self.smallest_vox}; give 1 or more")
        if not 0 <= self.contrast[0] <= self.contrast[1]:
            raise ValueError(
                f"contrast={self.contrast}; give the smallest and the largest, 0 or more"
            )
        if min(self.grain, self.noise) < 0:
            raise ValueError(f"grain={self.grain}, noise={self.noise}; give 0 or more")


def synthetic_sample(seed: int, side_vox: int, how: Synthesis | None = None) -> Synthetic:
    """Generates the volume of a seed; the number of threads does not change it.

    Structures for which no place is left are omitted, so there may be fewer than `how` states.

    Args:
        seed: A whole number, 0 or more.
        side_vox: Side S of the cube.
        how: Difficulty; None for the defaults.

    Raises:
        ValueError: If the cube is too small for the smallest structure.
    """
    how = how or Synthesis()
    if side_vox < SMALLEST_SIDE_VOX or 20 * how.smallest_vox > side_vox**3:
        raise ValueError(
            f"side_vox={side_vox} with smallest_vox={how.smallest_vox}; give a side of at least "
            f"{SMALLEST_SIDE_VOX}, and structures of at most a twentieth of the cube"
        )
    rng = np.random.default_rng(seed)
    drawn, around = _draw_tissues(rng, side_vox, how)
    tissues, around = _without_small(_bend(rng, drawn), around, how.smallest_vox)
    image = _scan(rng, tissues, around, how)
    body = image[tissues != AIR]
    image = (image - body.mean()) / max(float(body.std()), 1e-6)
    labels = np.maximum(tissues, BODY).astype(np.int64) - BODY
    return Synthetic(torch.from_numpy(image)[None], torch.from_numpy(labels)[None])


def render_labels(
    rng: Generator, image: Tensor, labels: Tensor, how: Synthesis | None = None
) -> Tensor:
    """A labelled scan in a random contrast, as another scanner could show the same anatomy.

    Every label, and every one of a few ranges of intensity where nothing is labelled, is a tissue;
    each gets a random brightness and grain, and the volume what scanners add. The darkest range
    stays the darkest. Mean and deviation stay those of the scan.

    Args:
        rng: Source of all random numbers.
        image: Tells the tissues apart where nothing is labelled.
        labels: Small integers, 0 for unlabelled.
        how: Ranges of contrast, grain and noise; None for the defaults.

    Shapes:
        image: (1, S, S, S) float32.
        labels: (1, S, S, S).
        returns: (1, S, S, S) float32.
    """
    how = how or Synthesis()
    values = image[0].numpy()
    bins = np.quantile(values, np.sort(rng.uniform(0.05, 0.95, int(rng.integers(3, 8)))))
    ranges = np.digitize(values, bins)
    marked = labels[0].numpy().astype(np.int64)
    numbers = np.where(marked > 0, marked + len(bins), ranges)
    found, tissues = np.unique(numbers, return_inverse=True)
    tissues = tissues.reshape(values.shape)
    levels = rng.normal(0, how.contrast[1] / 2, len(found)).astype(np.float32)
    if found[0] == 0:
        levels[AIR] = levels.min() - rng.uniform(0, how.contrast[1])
    changed = _seen(rng, tissues, levels, how, is_ct=bool(rng.random() < 0.5))
    scale = float(values.std()) / max(float(changed.std()), 1e-3)
    changed = (changed - changed.mean()) * np.float32(scale) + values.mean()
    return torch.from_numpy(changed.astype(np.float32))[None]


def _draw_tissues(rng: Generator, side_vox: int, how: Synthesis) -> tuple[Tissues, list[int]]:
    """Structures in a body, later over earlier ones, and the surrounding tissue of each."""
    tissues: Tissues = np.full([side_vox] * 3, BODY, np.uint8)
    if rng.random() < 0.7:  # otherwise a cube from the inside of a body
        middle, radii = rng.uniform(0.4, 0.6, 3) * side_vox, rng.uniform(0.38, 0.75, 3) * side_vox
        tissues[:] = AIR
        box = _box(middle, radii.max(), side_vox)
        tissues[box][_ellipsoid(rng, box, middle, radii)] = BODY
    around = [AIR, AIR]  # what surrounds air (unused) and the body
    wanted = len(around) + int(rng.integers(how.structures[0], how.structures[1] + 1))
    for _ in range(3 * wanted):
        if len(around) == wanted:
            break
        box, inside = _draw_structure(rng, tissues, len(around), how.smallest_vox)
        covered = np.bincount(tissues[box][inside], minlength=BODY + 1)
        covered[AIR] = 0
        if covered.sum() >= how.smallest_vox:
            tissues[box][inside & (tissues[box] != AIR)] = len(around)
            around.append(int(covered.argmax()))
    return tissues, around


def _draw_structure(
    rng: Generator, tissues: Tissues, number: int, smallest_vox: int
) -> tuple[Region, Inside]:
    """A box, and which of its voxels belong to one new structure."""
    side_vox = len(tissues)
    relation = rng.choice(["over", "beside", "part", "core"], p=[0.5, 0.2, 0.2, 0.1])
    if number > BODY + 1 and relation in ("part", "core"):
        other = int(rng.integers(BODY + 1, number))
        boxes = ndimage.find_objects((tissues == other).view(np.uint8))
        if boxes:
            (box,) = boxes
            inside = tissues[box] == other
            cut = _half if relation == "part" else _core
            return box, cut(rng, inside)
    smallest = (3 * smallest_vox / (4 * np.pi)) ** (1 / 3)  # radius of a ball
    largest = max(0.3 * side_vox, 1.5 * smallest)
    radius = float(np.exp(rng.uniform(np.log(1.15 * smallest), np.log(largest))))
    middle = rng.uniform(0.1, 0.9, 3) * side_vox
    shape = rng.choice(["ellipsoid", "lump", "tube"], p=[0.4, 0.35, 0.25])
    if shape == "tube":
        box, inside = _tube(rng, middle, min(radius, 0.12 * side_vox), side_vox)
    else:
        radii = radius * np.exp(rng.normal(0, 0.3, 3))
        box = _box(middle, 1.4 * radii.max() if shape == "lump" else radii.max(), side_vox)
        inside = (_lump if shape == "lump" else _ellipsoid)(rng, box, middle, radii)
    if relation == "beside":
        inside &= tissues[box] == BODY
    return box, inside


def _box(middle: NDArray[np.float64], radius: float, side_vox: int) -> Region:
    """The part of the cube that a ball reaches."""
    low = np.clip(np.floor(middle - radius), 0, side_vox - 1).astype(int)
    high = np.clip(np.ceil(middle + radius) + 1, 1, side_vox).astype(int)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def _distance(
    rng: Generator, box: Region, middle: NDArray[np.float64], radii: NDArray[np.float64]
) -> Field:
    """Distance of a box's voxels from a centre, along rotated axes in units of the radii."""
    axes = np.linalg.qr(rng.normal(size=(3, 3)))[0] / radii  # columns
    x, y, z = (
        np.arange(part.start, part.stop, dtype=np.float32) - np.float32(centre)
        for part, centre in zip(box, middle, strict=True)
    )
    squares: Field = np.zeros((), np.float32)
    for a, b, c in axes.T.astype(np.float32):
        squares = squares + ((a * x)[:, None, None] + (b * y)[:, None] + c * z) ** 2
    return np.asarray(np.sqrt(squares), dtype=np.float32)


def _ellipsoid(
    rng: Generator, box: Region, middle: NDArray[np.float64], radii: NDArray[np.float64]
) -> Inside:
    return np.asarray(_distance(rng, box, middle, radii) < 1)


def _lump(
    rng: Generator, box: Region, middle: NDArray[np.float64], radii: NDArray[np.float64]
) -> Inside:
    """An ellipsoid whose surface smooth noise pulls in and out."""
    shape = tuple(part.stop - part.start for part in box)
    waves = _smooth(rng, shape, int(rng.integers(3, 7)))
    return np.asarray(_distance(rng, box, middle, radii) + rng.uniform(0.1, 0.35) * waves < 1)


def _tube(
    rng: Generator, middle: NDArray[np.float64], radius: float, side_vox: int
) -> tuple[Region, Inside]:
    """Balls along a quadratic curve, whose radius changes a little on the way."""
    inside: Inside = np.zeros([side_vox] * 3, bool)
    ends = middle + rng.normal(0, 0.35 * side_vox, (2, 3))
    knots = 2 * max(1, round(float(np.abs(ends[1] - ends[0]).sum()) / radius))
    taper = rng.uniform(0.6, 1.0)
    for t in np.linspace(0, 1, knots + 1):
        place = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * middle + t**2 * ends[1]
        if np.all((place > -radius) & (place < side_vox + radius)):
            wide = np.full(3, radius * taper**t)
            box = _box(place, radius, side_vox)
            inside[box] |= _ball(box, place, wide[0])
    return (slice(None),) * 3, inside


def _ball(box: Region, middle: NDArray[np.float64], radius: float) -> Inside:
    x, y, z = (
        (np.arange(part.start, part.stop) - centre) ** 2
        for part, centre in zip(box, middle, strict=True)
    )
    return np.asarray(x[:, None, None] + y[:, None] + z < radius**2)


def _half(rng: Generator, inside: Inside) -> Inside:
    """The part of a structure on one side of a random plane, like the front of an organ."""
    voxels = np.argwhere(inside)
    towards = rng.normal(size=3)
    heights = (np.indices(inside.shape).T @ towards).T
    cut = np.quantile(voxels @ towards, rng.uniform(0.3, 0.7))
    return np.asarray(inside & (heights > cut))


def _core(rng: Generator, inside: Inside) -> Inside:
    """An eroded structure, like a ventricle in its wall."""
    return np.asarray(ndimage.binary_erosion(inside, iterations=int(rng.integers(1, 4))))


def _bend(rng: Generator, tissues: Tissues) -> Tissues:
    """The map deformed by a smooth random field."""
    side_vox = len(tissues)
    reach = rng.uniform(0.0, 0.06) * side_vox
    index = np.zeros(tissues.shape, np.int64)
    for axis in range(3):
        here = np.arange(side_vox, dtype=np.float32).reshape(np.roll((-1, 1, 1), axis))
        moved = np.rint(here + reach * _smooth(rng, tissues.shape, int(rng.integers(3, 7))))
        index = index * side_vox + np.clip(moved, 0, side_vox - 1).astype(np.int64)
    return tissues.ravel()[index]


def _without_small(
    tissues: Tissues, around: Sequence[int], smallest_vox: int
) -> tuple[Tissues, list[int]]:
    """Merges structures that are too small into their surroundings; numbers without gaps."""
    sizes = np.bincount(tissues.ravel(), minlength=len(around))
    new = np.arange(len(around), dtype=np.uint8)
    kept = [AIR, AIR]
    for number in range(BODY + 1, len(around)):
        home = int(new[around[number]])
        if sizes[number] >= smallest_vox:
            new[number] = len(kept)
            kept.append(home)
        else:
            new[number] = home
    return new[tissues], kept


def _scan(rng: Generator, tissues: Tissues, around: Sequence[int], how: Synthesis) -> Field:
    """Brightness and grain of every tissue, seen through a scanner."""
    is_ct = rng.random() < 0.5
    levels = np.zeros(len(around), np.float32)
    for number in range(BODY + 1, len(around)):
        step = rng.choice([-1, 1]) * rng.uniform(*how.contrast)
        levels[number] = levels[around[number]] + step
    levels[AIR] = levels.min() - (rng.uniform(2, 5) if is_ct else rng.uniform(0.3, 1.5))
    return _seen(rng, tissues, levels, how, is_ct=is_ct)


def _seen(
    rng: Generator, tissues: NDArray[Any], levels: Field, how: Synthesis, *, is_ct: bool
) -> Field:
    """Tissues of given brightness through a scanner: grain, shading, blur, slices, noise."""
    image: Field = levels[tissues]
    for sigma in (rng.uniform(0.5, 1.0), rng.uniform(1.5, 3.0)):
        grains = rng.uniform(0, how.grain, len(levels)).astype(np.float32)
        grains[AIR] = 0
        image = image + grains[tissues] * _texture(rng, tissues.shape, sigma)
    if not is_ct:
        shading = _smooth(rng, tissues.shape, 3)
        image = (image - levels[AIR]) * np.exp(np.float32(rng.uniform(0, 0.25)) * shading)
    image = ndimage.gaussian_filter(image, rng.uniform(0.3, 0.9), truncate=2.5)
    return _slices(rng, image, how.noise, is_ct)


def _slices(rng: Generator, image: Field, noise: float, is_ct: bool) -> Field:
    """The volume as slices of some thickness, with their noise, brought back to its grid."""
    size = list(image.shape)
    if rng.random() < 0.4:
        axis = int(rng.integers(3))
        size[axis] = max(2, round(size[axis] / rng.uniform(1.5, 4)))
    whole = torch.from_numpy(image)[None, None]
    slices = F.interpolate(whole, size=size, mode="area")[0, 0].numpy()
    # CT's reconstruction filters leave noise that is correlated from voxel to voxel
    sigma = rng.uniform(0.4, 0.8) if is_ct else 0.0
    slices = slices + np.float32(rng.uniform(0, noise)) * _texture(rng, slices.shape, sigma)
    back = F.interpolate(torch.from_numpy(slices)[None, None], size=image.shape, mode="trilinear")
    return np.asarray(back[0, 0].numpy(), dtype=np.float32)


def _texture(rng: Generator, shape: tuple[int, ...], sigma: float) -> Field:
    """Noise of deviation 1, smooth over about `sigma` voxels."""
    noise = rng.standard_normal(shape, np.float32)
    if sigma:
        noise = ndimage.gaussian_filter(noise, sigma, truncate=2.5)
        noise /= noise.std()
    return noise


def _smooth(rng: Generator, shape: tuple[int, ...], knots: int) -> Field:
    """A field that changes over about ``1 / knots`` of the shape: cubic between normal numbers."""
    field: Field = rng.standard_normal([knots] * 3, np.float32)
    for size in shape:  # one axis after the other; each goes to the end, so all are in place again
        field = np.tensordot(field, _cubic(knots, size), axes=(0, 1))
    return field


@lru_cache(maxsize=1024)
def _cubic(knots: int, size: int) -> Field:
    """Weights, (size, knots), that interpolate values at knots with cubic splines."""
    return np.asarray(
        ndimage.zoom(np.eye(knots, dtype=np.float32), (size / knots, 1), order=3, mode="nearest"),
        dtype=np.float32,
    )
