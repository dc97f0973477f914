"""Errors of the way to the network's grid and back, in every orientation.

A case is a random volume: one of the 48 ways to lay three axes into a file, turned by any angles
(exactly 45 degrees among them), sheared now and then, with its own odd size and spacing, brought
to a random spacing and padded to a random box. `errors` compares `Geometry` with the definition of
an affine and with SciPy's interpolation; tests/data/test_geometry.py gives the cases.
"""

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import map_coordinates

from sammed3d_backbone.data.geometry import Geometry
from sammed3d_backbone.data.volume import Volume

HERE = Path(__file__).parent
# (which of the axes R, A, S, which sign) of array axes 0, 1, 2
ORIENTATIONS = tuple(
    tuple(zip(order, signs, strict=True))
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
)
# What may go wrong and by how much; float32 carries the resampled values, hence not always nothing.
BOUNDS = {
    "array, axes only": 0.0,  # largest difference of a value
    "affine, through a file": 0.0,  # mm
    "labels, way in": 5e-6,  # by how much a class with a larger share was passed over
    "labels, nested grid": 0.0,  # voxels that differ
    "input, other orientation": 0.0,  # difference of normal deviates
    "place, other orientation (mm)": 1e-10,
    "place (mm)": 1e-4,
    "probabilities, way back": 2e-5,  # grids of up to 240 voxels a side
    "labels, way back": 0.0,  # voxels that differ, where the winner leads by more than the above
    "labels, nearest": 0.0,  # voxels that differ, ties between two neighbours left out
}


@dataclass(frozen=True)
class Case:
    """One volume and its target grid."""

    orientation: int  # index into ORIENTATIONS
    turns_degrees: tuple[float, float, float]  # about z, y, x
    shear: float  # share of axis 0 in axis 1
    shape: tuple[int, int, int]
    native_mm: tuple[float, float, float]
    wanted_mm: tuple[float, float, float]
    side_vox: int  # the box has at least this side
    seed: int  # seed of the voxels

    @property
    def affine(self) -> np.ndarray:
        """Voxel -> RAS+ mm, (4, 4)."""
        turn = np.eye(3)
        for (a, b), degrees in zip(((0, 1), (0, 2), (1, 2)), self.turns_degrees, strict=True):
            c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
            about = np.eye(3)
            about[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
            turn = turn @ about
        axes = np.zeros((3, 3))
        for column, (row, sign) in enumerate(ORIENTATIONS[self.orientation]):
            axes[row, column] = sign
        axes[:, 1] += self.shear * axes[:, 0]
        affine = np.eye(4)
        affine[:3, :3] = turn @ axes * self.native_mm
        affine[:3, 3] = (11.0, -7.0, 3.0)
        return affine


def errors(case: Case) -> dict[str, float]:
    """The worst error of each kind; the kinds are those of BOUNDS."""
    rng = np.random.default_rng(case.seed)
    array = rng.normal(size=case.shape).astype(np.float32)
    side = (case.side_vox,) * 3
    plain = Geometry.plan(case.shape, case.affine, min_shape=side)
    geometry = Geometry.plan(case.shape, case.affine, case.wanted_mm, min_shape=side)
    return {
        "array, axes only": _largest(plain.invert(plain.apply(array)).numpy() - array),
        "affine, through a file": _through_a_file(case),
        "labels, way in": _way_in(case, geometry, rng),
        "labels, nested grid": _nested_labels(case, rng),
        **_other_orientation(case, geometry, array, rng),
        "place (mm)": max(_place(case, plain), _place(case, geometry)),
        **_way_back(case, geometry, rng),
    }


def _largest(difference: np.ndarray) -> float:
    """The largest absolute value, 0 of nothing."""
    return float(np.abs(difference).max(initial=0.0))


def _through_a_file(case: Case) -> float:
    """Difference between the affine of a file and that of the prediction written for it."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for form in ("sform", "qform"):
            header = nib.Nifti1Header()
            header.set_sform(case.affine, code=int(form == "sform"))
            if form == "qform":
                header.set_qform(case.affine, code=1, strip_shears=True)
            source, target = Path(folder) / f"{form}.nii", Path(folder) / f"{form}_out.nii"
            nib.save(nib.Nifti1Image(np.zeros(case.shape, np.int16), None, header), source)
            volume = Volume.load(source)
            geometry = Geometry.plan(volume.shape, volume.affine, case.wanted_mm)
            labels = geometry.invert_labels(torch.zeros(2, *geometry.box_shape)).numpy()
            Volume(labels, volume.affine, volume.header).save(target)
            worst = max(worst, _largest(Volume.load(target).affine - volume.affine))
            if labels.shape != volume.shape:
                return float("inf")
    return worst


def _way_in(case: Case, geometry: Geometry, rng: np.random.Generator) -> float:
    """How far the shares of the chosen classes lie below the largest ones.

    But for classes that have the largest share nowhere, which take voxels in spite of that.
    """
    labels = rng.integers(0, 4, case.shape)
    shares = geometry.resample((labels == np.arange(4).reshape(-1, 1, 1, 1)).astype(np.float32))
    taken = geometry.resample_labels(labels).long()
    chosen = shares.gather(0, taken)
    has_largest = torch.isin(taken[0], shares.argmax(0).unique())
    return _largest(((shares.max(0).values - chosen[0]) * has_largest).numpy())


def _nested_labels(case: Case, rng: np.random.Generator) -> float:
    """Voxels that change on the way to a grid that holds all old voxel centres, and back."""
    labels = rng.integers(0, 4, case.shape)
    fine = Geometry.plan(case.shape, case.affine).spacing_mm
    spacing = tuple(s / f for s, f in zip(fine, rng.choice([1, 3], size=3), strict=True))
    geometry = Geometry.plan(case.shape, case.affine, spacing, min_shape=(case.side_vox,) * 3)
    seen = geometry.to_box(geometry.resample_labels(labels))
    probs = torch.stack([seen[0] == value for value in range(4)]).float()
    back = geometry.invert_labels(probs, nearest=True).numpy()
    return float((back != labels).sum())


def _other_orientation(
    case: Case, geometry: Geometry, array: np.ndarray, rng: np.random.Generator
) -> dict[str, float]:
    """The change of the network's input when a volume is stored in another orientation."""
    order, flips = rng.permutation(3), rng.random(3) < 0.5
    stored = array.transpose(order)
    to_old = np.zeros((4, 4))  # voxel of the stored array -> voxel of the first one
    to_old[3, 3] = 1
    for axis, flip in enumerate(flips):
        to_old[order[axis], axis] = -1 if flip else 1
        to_old[order[axis], 3] = stored.shape[axis] - 1 if flip else 0
    stored = np.flip(stored, np.flatnonzero(flips))
    other = Geometry.plan(
        stored.shape, case.affine @ to_old, case.wanted_mm, min_shape=(case.side_vox,) * 3
    )
    if other.box_shape != geometry.box_shape:
        return {"input, other orientation": float("inf"), "place, other orientation (mm)": 0.0}
    return {
        "input, other orientation": _largest((other.apply(stored) - geometry.apply(array)).numpy()),
        "place, other orientation (mm)": _largest(other.affine - geometry.affine),
    }


def _centres(shape: tuple[int, ...]) -> np.ndarray:
    """Indices of all voxels, (3, X * Y * Z)."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1)


def _map(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (3, N) under an affine."""
    return affine[:3, :3] @ points + affine[:3, 3:]


def _place(case: Case, geometry: Geometry) -> float:
    """Distance between the position of a voxel and the origin of its value.

    The volume shows world coordinates, so every voxel's value is its own place. Beyond the centres
    of the outermost voxels there is nothing to interpolate, so only what lies between them counts.
    """
    world = _map(case.affine, _centres(case.shape)).reshape(3, *case.shape)
    shown = geometry.apply(world).numpy().reshape(3, -1)
    expected = _map(geometry.affine, _centres(geometry.box_shape))
    index = _map(np.linalg.inv(case.affine), expected)
    last = np.array(case.shape)[:, None] - 1
    inside = ((index >= -1e-9) & (index <= last + 1e-9)).all(axis=0)
    return _largest(np.linalg.norm(shown[:, inside] - expected[:, inside], axis=0))


def _way_back(case: Case, geometry: Geometry, rng: np.random.Generator) -> dict[str, float]:
    """Random class probabilities brought back, against SciPy at the places that affines give."""
    probs = torch.from_numpy(rng.dirichlet(np.ones(3), geometry.box_shape)).movedim(-1, 0).float()
    got = geometry.invert(probs).numpy()
    # Voxels that pad the box are not part of the volume, so they must not leak into its border.
    start = np.array(geometry.box_start)
    own = tuple(slice(-s, n - s) for s, n in zip(start, geometry.resampled_shape, strict=True))
    volume = probs.numpy()[(slice(None), *own)].astype(np.float64)
    to_box = np.linalg.inv(geometry.affine) @ case.affine
    points = _map(to_box, _centres(case.shape)) + start[:, None]
    expected = np.stack([map_coordinates(p, points, order=1, mode="nearest") for p in volume])
    expected = expected.reshape(got.shape)
    ordered = np.sort(expected, axis=0)
    is_clear = ordered[-1] - ordered[-2] > BOUNDS["probabilities, way back"]
    differs = geometry.invert_labels(probs).numpy() != expected.argmax(axis=0)

    is_tie = (np.abs(np.abs(points - np.round(points)) - 0.5) < 1e-6).any(axis=0)
    corner = np.array(geometry.resampled_shape)[:, None] - 1
    nearest = np.clip(np.round(points), 0, corner).astype(int)
    wanted = volume.argmax(axis=0)[tuple(nearest)]
    taken = geometry.invert_labels(probs, nearest=True).numpy().ravel()
    return {
        "probabilities, way back": _largest(got - expected),
        "labels, way back": float((differs & is_clear).sum()),
        "labels, nearest": float(((taken != wanted) & ~is_tie).sum()),
    }
