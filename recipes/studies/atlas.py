"""What an atlas gives: the mean position and shape of every organ, without any learning.

    python recipes/studies/atlas.py headneck_ct --fold 0

The baseline that a network has to beat. Training cases are aligned on one grid, and where enough of
them have an organ, a new case has it too. Nothing of a new case is used but its image. There are
three alignments: by the centre of the body, by its size as well, or by the shift with which the
image fits the mean of the training images best, around the organs. Alignment and thresholds are
chosen on the training cases alone, each predicted by the atlas of the others. For CT, whose
intensities have a unit.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import fft, ndimage
from torch import Tensor
from tqdm import tqdm

from sammed3d_backbone.data.datasets import Case, Dataset, read_fold
from sammed3d_backbone.data.folders import find_dataset, read_dataset
from sammed3d_backbone.data.geometry import Geometry
from sammed3d_backbone.data.preparation import annotated_classes, load_image, load_label
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.metrics import mean_of_known
from sammed3d_backbone.evaluation.report import About, write_results
from sammed3d_backbone.evaluation.scores import score_cases
from sammed3d_backbone.provenance import provenance

HERE = Path(__file__).parent
SPACING_MM = (4.0, 4.0, 4.0)
CANVAS_VOX = (96, 80, 112)  # around the middle of the body; organs lie well inside
BODY_HU = -300.0
WINDOW_HU = (-400.0, 800.0)  # of the images that are compared: skin, soft tissue, bone
REACH_VOX = 20  # largest shift that is tried
MATCH_PASSES = 2
AROUND_VOX = 6  # what is compared: the organs and this much around them
THRESHOLDS = np.arange(0.05, 0.65, 0.05)  # share of the training cases that have the organ there


@dataclass(frozen=True, eq=False)
class Placed:
    """A training case on the atlas's grid.

    Shapes:
        image: (X, Y, Z) HU, windowed; the lowest value outside the volume.
        inside: (X, Y, Z) bool, where the volume is.
        label: (X, Y, Z) integers.
        annotated: (K - 1,) bool, the organs that were looked for.
    """

    image: Tensor
    inside: Tensor
    label: Tensor
    annotated: Tensor

    @property
    def masks(self) -> Tensor:
        """The organs, (K - 1, X, Y, Z) bool."""
        values = torch.arange(1, len(self.annotated) + 1).reshape(-1, 1, 1, 1)
        return (self.label == values) & self.known

    @property
    def known(self) -> Tensor:
        """Where it is known whether an organ is there, (K - 1, X, Y, Z) bool."""
        return self.inside & self.annotated[:, None, None, None]


@dataclass(frozen=True, eq=False)
class Counts:
    """Sums over training cases; the sums without one of them are the atlas of the others."""

    image: Tensor
    inside: Tensor
    masks: Tensor
    known: Tensor

    @classmethod
    def of(cls, cases: Sequence[Placed]) -> Counts:
        """Of all cases."""
        one = cases[0]
        sums = [torch.zeros(x.shape) for x in (one.image, one.inside, one.masks, one.known)]
        for case in cases:
            for total, value in zip(sums, _summands(case), strict=True):
                total += value
        return cls(*sums)

    def without(self, case: Placed) -> Counts:
        """Of all cases but one."""
        sums = (self.image, self.inside, self.masks, self.known)
        return Counts(
            *(total - value.float() for total, value in zip(sums, _summands(case), strict=True))
        )

    @property
    def mean_image(self) -> Tensor:
        """Over the cases that reach there."""
        return self.image / self.inside.clamp(min=1)

    @property
    def probs(self) -> Tensor:
        """Share of the cases with an organ among those where it is known, (K - 1, X, Y, Z)."""
        return self.masks / self.known.clamp(min=1)

    @property
    def around(self) -> NDArray[np.bool_]:
        """The organs and what lies near them."""
        found = (self.probs > THRESHOLDS[0]).any(0).numpy()
        return ndimage.binary_dilation(found, iterations=AROUND_VOX)


@dataclass(frozen=True, eq=False)
class Atlas:
    """The training cases on one grid, and how to lay a new case on it."""

    alignment: str
    place: Callable[[Volume], Geometry]
    counts: Counts
    thresholds: list[float]  # per organ: share of the training cases from which on it is there
    dice: list[float]  # per organ: mean over the training cases, each by the atlas of the others

    @classmethod
    def of(
        cls, alignment: str, cases: Sequence[Placed], place: Callable[[Volume], Geometry]
    ) -> Atlas:
        """The atlas of aligned cases."""
        counts = Counts.of(cases)
        return cls(alignment, place, counts, *best_thresholds(cases, counts))

    def predict(self, volume: Volume) -> Volume:
        """The organs on the volume's own grid."""
        ratio = self.counts.probs / torch.tensor(self.thresholds)[:, None, None, None]
        scores = torch.cat([torch.ones_like(ratio[:1]), ratio])  # below all thresholds: background
        labels = self.place(volume).invert_labels(scores)
        return Volume(labels.numpy(), volume.affine, volume.header)


def by_centre(volume: Volume) -> Geometry:
    """The middle of the body in the middle of the canvas."""
    return _on_canvas(Geometry.plan(volume.shape, volume.affine, SPACING_MM), volume)


def by_box(volume: Volume, size_mm: Sequence[float]) -> Geometry:
    """The same, with the body stretched to a size along every axis."""
    stretch = np.divide(body_size_mm(volume), size_mm)
    x, y, z = (float(value) for value in stretch * SPACING_MM)
    return _on_canvas(Geometry.plan(volume.shape, volume.affine, (x, y, z)), volume)


def by_match(volume: Volume, counts: Counts) -> Geometry:
    """The shift with which the image correlates best with the mean image, around the organs."""
    start = by_centre(volume)
    (roi,) = ndimage.find_objects(counts.around.astype(np.uint8))
    template, weight = counts.mean_image[roi].numpy(), counts.around[roi]
    corner = [s + r.start - REACH_VOX for s, r in zip(start.box_start, roi, strict=True)]
    larger = start.boxed(tuple(corner), tuple(n + 2 * REACH_VOX for n in template.shape))
    image = larger.apply(_windowed(volume), fill=WINDOW_HU[0])[0].numpy()
    inside = larger.to_box(torch.ones(1, *larger.resampled_shape))[0].numpy()
    shift = best_shift(image, inside, template, weight)
    moved = [s + d - REACH_VOX for s, d in zip(start.box_start, shift, strict=True)]
    return start.boxed(tuple(moved), CANVAS_VOX)


def best_shift(
    image: NDArray[np.float32],
    inside: NDArray[np.float32],
    template: NDArray[np.float32],
    weight: NDArray[np.bool_],
) -> tuple[int, ...]:
    """Where in an image a template fits best: the largest correlation over what both have.

    Source: Padfield, Masked object registration in the Fourier domain, IEEE TIP 21:2706-2718, 2012.

    Shapes:
        image: (X + 2 R, Y + 2 R, Z + 2 R).
        inside: like the image, 1 where there is something.
        template: (X, Y, Z).
        weight: (X, Y, Z), what of the template counts.
        returns: first voxel of the template in the image, along X, Y, Z.
    """
    f = {n: fft.rfftn(image**n * inside) for n in (0, 1, 2)}
    t = {n: fft.rfftn(template**n * weight, image.shape).conj() for n in (0, 1, 2)}
    free = tuple(slice(i - j + 1) for i, j in zip(image.shape, template.shape, strict=True))

    def summed(a: int, b: int) -> NDArray[np.float32]:
        """Sum of image^a template^b over the overlap, for every shift."""
        return fft.irfftn(f[a] * t[b], image.shape)[free]

    n = summed(0, 0).clip(1)
    covariance = summed(1, 1) - summed(1, 0) * summed(0, 1) / n
    spread = [summed(2, 0) - summed(1, 0) ** 2 / n, summed(0, 2) - summed(0, 1) ** 2 / n]
    correlation = covariance / np.sqrt((spread[0] * spread[1]).clip(1))
    correlation[n < 0.6 * weight.sum()] = -1  # a small overlap fits by chance
    return tuple(int(i) for i in np.unravel_index(correlation.argmax(), correlation.shape))


def place(case: Case, volume: Volume, dataset: Dataset, geometry: Geometry) -> Placed:
    """A training case as its geometry puts it."""
    inside = geometry.to_box(torch.ones(1, *geometry.resampled_shape))[0] > 0
    label = geometry.to_box(geometry.resample_labels(load_label(case).array))[0]
    image = geometry.apply(_windowed(volume), fill=WINDOW_HU[0])[0]
    return Placed(image, inside, label, annotated_classes(case, dataset)[1:])


def best_thresholds(cases: Sequence[Placed], counts: Counts) -> tuple[list[float], list[float]]:
    """Per organ the threshold with the best mean Dice, and that Dice; each case by the others."""
    dice = np.full((len(cases), len(counts.masks), len(THRESHOLDS)), np.nan)
    for i, case in enumerate(cases):
        probs = counts.without(case).probs
        for k, mask in enumerate(case.masks):
            if not mask.any():
                continue
            near = case.inside & (probs[k] > THRESHOLDS[0])
            share, ours = probs[k][near], mask[near]
            for j, threshold in enumerate(THRESHOLDS):
                found = share > threshold
                dice[i, k, j] = 2 * (found & ours).sum() / (found.sum() + mask.sum())
    means = np.nanmean(dice, axis=0)  # (K - 1, thresholds)
    return [float(THRESHOLDS[j]) for j in means.argmax(1)], means.max(1).tolist()


def body_size_mm(volume: Volume) -> list[float]:
    """Extent of the body along R, A, S."""
    plain = Geometry.plan(volume.shape, volume.affine, SPACING_MM)
    box = _body_box(plain, volume)
    return [(s.stop - s.start) * mm for s, mm in zip(box, plain.spacing_mm, strict=True)]


def _on_canvas(geometry: Geometry, volume: Volume) -> Geometry:
    box = _body_box(geometry, volume)
    start = [(s.start + s.stop - n) // 2 for s, n in zip(box, CANVAS_VOX, strict=True)]
    return geometry.boxed(tuple(start), CANVAS_VOX)


def _body_box(geometry: Geometry, volume: Volume) -> tuple[slice, ...]:
    """Around the largest connected part that is denser than air, in resampled voxels."""
    parts, _ = ndimage.label(geometry.resample(volume.array)[0].numpy() > BODY_HU)
    largest = int(np.bincount(parts.ravel())[1:].argmax()) + 1
    return ndimage.find_objects(parts)[largest - 1]


def _summands(case: Placed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case.image * case.inside, case.inside, case.masks, case.known


def _windowed(volume: Volume) -> NDArray[np.float32]:
    return volume.array.clip(*WINDOW_HU)


def build_atlases(cases: Sequence[Case], dataset: Dataset) -> list[Atlas]:
    """One atlas of the training cases per alignment."""
    volumes = [load_image(case) for case in tqdm(cases, desc="reading", unit="case")]

    def placed(geometry_of: Callable[[int], Geometry], title: str) -> list[Placed]:
        numbers = tqdm(range(len(cases)), desc=title, unit="case")
        return [place(cases[i], volumes[i], dataset, geometry_of(i)) for i in numbers]

    on_centre = placed(lambda i: by_centre(volumes[i]), "aligning by the centre")
    atlases = [Atlas.of("centre", on_centre, by_centre)]
    size_mm = np.mean([body_size_mm(volume) for volume in volumes], axis=0).tolist()
    by_mean_box = partial(by_box, size_mm=size_mm)
    on_box = placed(lambda i: by_mean_box(volumes[i]), "aligning by the size")
    atlases.append(Atlas.of("size", on_box, by_mean_box))
    on_match, counts = on_centre, atlases[0].counts
    for _ in range(MATCH_PASSES):  # the mean image sharpens, and with it the next pass
        on_match = placed(
            lambda i, cs=counts, ps=on_match: by_match(volumes[i], cs.without(ps[i])),
            "aligning by the image",
        )
        counts = Counts.of(on_match)
    atlases.append(Atlas.of("image", on_match, partial(by_match, counts=counts)))
    return atlases


def run(data: str, number: int, out: Path) -> dict[str, Any]:
    """Builds the atlas of a fold's training cases and scores it on the validation cases."""
    started, cpu_started = time.monotonic(), time.process_time()
    dataset = read_dataset(find_dataset(data))
    if dataset.channels != ("CT",):
        raise ValueError(
            f"{dataset.name} has the channels {', '.join(dataset.channels)}, and the atlas finds "
            "the body by Hounsfield units; give a data set with the one channel CT"
        )
    fold = read_fold(dataset, number)
    cases = {case.id: case for case in dataset.cases}
    atlases = build_atlases([cases[name] for name in fold.train], dataset)
    best = max(atlases, key=lambda atlas: mean_of_known(atlas.dice))
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    scores = score_cases(
        lambda case: best.predict(load_image(case)), dataset, fold.val, folder=out / "predictions"
    )
    about = About(
        title=f"Atlas of {dataset.name}, fold {number}",
        command=shlex.join(["python", "recipes/studies/atlas.py", data, "--fold", str(number)]),
        model=f"mean position and shape of every organ, aligned by the {best.alignment}",
        contamination="An atlas learns nothing: no weights, no pretraining.",
        seconds=round(seconds, 1),
        cpu_seconds=round(cpu_seconds, 1),
        dataset={"name": dataset.name, "note": dataset.note, **dataset.about},
        split=f"fold {number} of {fold.rule}; {len(fold.train)} cases in the atlas",
        config={
            "dice of training cases, each by the atlas of the others": {
                atlas.alignment: dict(zip(dataset.classes, rounded(atlas.dice), strict=True))
                for atlas in atlases
            },
            "thresholds": dict(zip(dataset.classes, rounded(best.thresholds), strict=True)),
        },
        provenance=provenance(HERE),
    )
    return write_results(out, scores, dataset, about)


def rounded(values: Sequence[float]) -> list[float]:
    """For a file to be read."""
    return [round(value, 4) for value in values]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder with dataset.json, or its name below SAMMED3D_DATA")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: results/DATA_foldN/atlas here")
    args = parser.parse_args()
    out = args.out or HERE / "results" / f"{Path(args.data).name}_fold{args.fold}" / "atlas"
    try:
        summary = run(args.data, args.fold, out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, dice in summary["dice"].items():
        print(f"Dice {name}: {dice}")
    print(f"mean Dice {summary['mean_dice']} over {summary['cases']} cases; see {out}")


if __name__ == "__main__":
    main()
