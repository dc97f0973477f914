"""The answers of a frozen promptable network on fixed crops of scans, as targets for a student.

`answer_crop` cuts a crop for both networks, encodes the teacher's, clicks it at random places in
the body and keeps the masks that are worth learning; `write_answer` stores the result, so that the
teacher runs once per crop, whatever the number of epochs and students. `AnswerStream` makes
training samples of the files.

Both networks see cubes around one middle, each with its own side and spacing, so a place in mm from
the middle translates one grid into the other. A crop's random zoom, stretch and flips act on both.

Letters: S voxels a side of the student's crop, (x, y, z) its tokens, s = 4 x its cells a side, K
masks, T channels of the teacher's embedding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from sammed3d_backbone.data.crops import Augmentation
from sammed3d_backbone.data.geometry import Geometry, TripleMm, interpolate_axis
from sammed3d_backbone.data.intensity import IntensityScale, measure_scale, normalise
from sammed3d_backbone.data.preprocessing import Modality, Preprocessing
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import atomic_path
from sammed3d_backbone.models.sam import Encoding, Sam3D
from sammed3d_backbone.pretraining.object_crops import (
    InteractionPlan,
    draw_cube,
    object_voxels,
    random_contrast,
)

Indices = Sequence[NDArray[Any]]  # continuous indices along each axis
CELLS_PER_TOKEN = 4
LARGEST_SHARE = 0.5  # of a crop that a mask may fill
MARGIN = 1.0  # logits between which a stable mask hardly changes
OUTSIDE = -10.0  # logit where the teacher sees nothing
AIR_SHARE = 0.05  # of the range of intensities that counts as air
RANGE_PERCENT = 99.5


@dataclass(frozen=True)
class FieldOfView:
    """The input of a network: a cube, its tokens, and how intensities are normalised."""

    side_vox: int
    tokens: int  # along each axis
    spacing_mm: TripleMm
    preprocessing: Preprocessing

    @classmethod
    def of(cls, network: Sam3D, preprocessing: Preprocessing, spacing_mm: TripleMm) -> FieldOfView:
        """The field of view of a network.

        Raises:
            ValueError: If its input is not a cube.
        """
        if len({*network.img_size}) > 1:
            raise ValueError(f"the input {network.img_size} is not a cube; give img_size= one side")
        return cls(
            network.img_size[0],
            network.image_encoder.grid[0],
            preprocessing.spacing_mm or spacing_mm,
            preprocessing,
        )

    @property
    def cells(self) -> int:
        """Cells of the mask decoder along each axis."""
        return CELLS_PER_TOKEN * self.tokens

    def places_mm(self, number: int) -> Indices:
        """The centres of `number` equal parts along each axis, in mm from the middle."""
        parts = np.arange(number) - (number - 1) / 2
        return [parts * (self.side_vox * mm / number) for mm in self.spacing_mm]

    def indices(self, places_mm: Indices, number: int) -> Indices:
        """Places in mm from the middle as continuous indices of `number` parts along each axis."""
        return [
            place / (self.side_vox * mm / number) + (number - 1) / 2
            for place, mm in zip(places_mm, self.spacing_mm, strict=True)
        ]

    def covers(self, other: FieldOfView, number: int) -> Tensor:
        """Which of `number` parts a side of another field lie in this one, (n, n, n) bool."""
        indices = self.indices(other.places_mm(number), self.side_vox)
        return _within(indices, (self.side_vox,) * 3)


@dataclass(frozen=True, eq=False)
class RawScan:
    """A scan as stored, axes towards R, A, S.

    Shapes:
        image: (X, Y, Z) float32.
        labels: (X, Y, Z) integers, 0 for no object; None for an unlabelled scan.

    A synthetic scan `is_normalised` for all networks.
    """

    image: Tensor
    labels: Tensor | None
    spacing_mm: TripleMm
    modality: Modality | None = None
    is_normalised: bool = False
    _scales: dict[str, IntensityScale] = field(default_factory=dict)

    @classmethod
    def of(
        cls, image: Volume, labels: Volume | None = None, modality: Modality | None = None
    ) -> RawScan:
        """A scan and its labels, which lie on one grid.

        Raises:
            ValueError: If it has several channels.
        """
        if image.channels != 1:
            raise ValueError(f"{image.channels} channels, and a promptable network takes one")
        geometry = Geometry.plan(image.shape, image.affine)
        return cls(
            geometry.resample(image.array)[0],
            None if labels is None else geometry.resample_labels(labels.array)[0],
            geometry.spacing_mm,
            modality,
        )

    def normalise(self, raw: Tensor, preprocessing: Preprocessing) -> Tensor:
        """A crop of the scan, or all of it, with a network's normalisation; float32."""
        if self.is_normalised:
            return raw
        mode = preprocessing.intensity_mode(self.modality)
        if preprocessing.statistics == "crop":
            return normalise(raw[None], mode).image[0]
        if mode not in self._scales:
            self._scales[mode] = measure_scale(partial(_in_one_slab, self.image), mode)
        return self._scales[mode].apply(raw)

    def cut(self, crop: CropPlace, field: FieldOfView) -> tuple[Tensor, Tensor]:
        """A network's voxels, raw, with zeros outside the scan; and which lie inside it."""
        indices = self._indices(crop, field)
        inside = _within(indices, self.image.shape)
        window, indices = _windowed(self.image, indices)
        return _sampled(window, indices) * inside, inside

    def cut_labels(self, crop: CropPlace, field: FieldOfView) -> Tensor:
        """The labels with the largest linear share in a network's voxels, uint8 or int16."""
        indices = self._indices(crop, field)
        if self.labels is None:
            return torch.zeros((field.side_vox,) * 3, dtype=torch.uint8)
        inside = _within(indices, self.labels.shape)
        window, indices = _windowed(self.labels, indices)
        best = torch.zeros(inside.shape)
        found = torch.zeros(inside.shape, dtype=torch.int16)
        for value in torch.unique(window).tolist():  # from 0, the smallest
            share = _sampled((window == value).float(), indices)
            found[share > best] = value
            best = torch.maximum(best, share)
        found = found * inside
        return found if int(found.max()) > 255 else found.to(torch.uint8)

    def _indices(self, crop: CropPlace, field: FieldOfView) -> Indices:
        """A network's voxels in the scan's grid."""
        return [
            middle + place * factor / own
            for middle, place, factor, own in zip(
                crop.middle_vox,
                field.places_mm(field.side_vox),
                crop.factors,
                self.spacing_mm,
                strict=True,
            )
        ]


class CropPlace(NamedTuple):
    """The place of a crop in a scan, in voxels, and factors on the networks' spacings.

    A negative factor mirrors the axis.
    """

    middle_vox: Sequence[float]
    factors: Sequence[float]


@dataclass(frozen=True)
class Variation:
    """How crops differ from the networks' spacings, see `ScanSource`; and flips along R, A, S."""

    zoom: float = 1.0
    stretch: float = 1.0
    flips: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Answer(NamedTuple):
    """What is stored of a crop, on the student's grids.

    Shapes:
        image: (S, S, S) float16, normalised.
        labels: (S, S, S) uint8 or int16, 0 for no object.
        embedding: (T, x, y, z) float16, the teacher's.
        logits: (K, s, s, s) float16, its masks.
        points: (K, 3) int16, the click of each mask, in voxels of the image.
    """

    image: Tensor
    labels: Tensor
    embedding: Tensor
    logits: Tensor
    points: Tensor


@dataclass(frozen=True)
class Teacher:
    """A frozen network, and what of its answers is kept.

    Args:
        network: In evaluation mode.
        field: Its input.
        clicks: Number of clicks on a crop, each for a mask of its own.
        stability: Least overlap of a mask at a logit of `MARGIN` with that at minus `MARGIN`, as in
            SAM's automatic mask generator; less is not confident.
        smallest_vox: Smallest size of a mask in voxels of the student.
        precision: Makes the context in which the encoder runs; by default float32.
    """

    network: Sam3D
    field: FieldOfView
    clicks: int
    stability: float
    smallest_vox: int
    precision: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


def draw_places(
    rng: np.random.Generator,
    scan: RawScan,
    student: FieldOfView,
    number: int,
    variation: Variation,
    smallest_vox: int,
) -> list[CropPlace]:
    """Crops around objects, or around places in the body if the scan has no labels."""
    objects = [] if scan.labels is None else object_voxels(scan.labels[None])
    if not objects:
        image = scan.normalise(scan.image, student.preprocessing)
        objects = object_voxels((image > _air_level(image)).to(torch.uint8)[None])
    places = []
    for _ in range(number):
        middle, spacing_mm = draw_cube(
            rng,
            objects or [(0, np.array([scan.image.shape]) // 2)],
            scan.spacing_mm,
            student.side_vox,
            student.spacing_mm[0],
            smallest_vox=smallest_vox,
            zoom=variation.zoom,
            stretch=variation.stretch,
        )
        signs = np.where(rng.random(3) < variation.flips, -1.0, 1.0)
        factors = signs * np.array(spacing_mm) / student.spacing_mm
        places.append(CropPlace(middle, factors.tolist()))
    return places


@torch.no_grad()
def answer_crop(
    rng: np.random.Generator,
    scan: RawScan,
    place: CropPlace,
    student: FieldOfView,
    teacher: Teacher,
) -> Answer:
    """Clicks the teacher at random places of the body, and keeps the masks that can be learned.

    Args:
        rng: Draws the places.
        scan: The scan.
        place: The crop.
        student: Input of the student.
        teacher: The teacher.
    """
    raw, inside = scan.cut(place, student)
    image = scan.normalise(raw, student.preprocessing)
    body = inside & (image > _air_level(image)) & teacher.field.covers(student, student.side_vox)
    found = body.nonzero()
    number = teacher.clicks if len(found) else 0
    chosen = rng.integers(max(1, len(found)), size=number)
    points = found[chosen].reshape(-1, 3)  # (K, 3)
    embedding, logits = _answers(scan, place, student, teacher, points)
    logits = logits.half()
    kept = _worth_learning(logits, points, student, teacher)
    return Answer(
        image.half(),
        scan.cut_labels(place, student),
        embedding.half(),
        logits[kept],
        points[kept].to(torch.int16),
    )


def _answers(
    scan: RawScan,
    place: CropPlace,
    student: FieldOfView,
    teacher: Teacher,
    points: Tensor,
) -> tuple[Tensor, Tensor]:
    """The teacher's embedding and logits on the student's tokens and cells.

    Shapes:
        points: (K, 3), voxels of the student.
        returns: (T, x, y, z) and (K, s, s, s).
    """
    network, field = teacher.network, teacher.field
    device = next(network.parameters()).device
    raw, _ = scan.cut(place, field)
    image = scan.normalise(raw, field.preprocessing)
    with teacher.precision():
        encoding = network.encode(image[None, None].to(device))
    encoding = Encoding(encoding.embedding.float(), tuple(m.float() for m in encoding.maps))
    embedding = _sampled(
        encoding.embedding[0].cpu(),
        field.indices(student.places_mm(student.tokens), field.tokens),
    )
    if not len(points):
        return embedding, torch.zeros(0, *(student.cells,) * 3)
    clicks = (
        translated(points, student, field).unsqueeze(1).to(device),
        torch.ones(len(points), 1, dtype=torch.long, device=device),
    )
    logits = network.decode(encoding, clicks)[:, 0].float().cpu()
    logits = _sampled(logits, field.indices(student.places_mm(student.cells), field.cells))
    return embedding, logits.masked_fill(~field.covers(student, student.cells), OUTSIDE)


def translated(points: Tensor, source: FieldOfView, target: FieldOfView) -> Tensor:
    """Voxels of one field as the nearest voxels of another around the same middle, (K, 3)."""
    steps = torch.tensor(source.spacing_mm) / torch.tensor(target.spacing_mm)
    index = (points - (source.side_vox - 1) / 2) * steps + (target.side_vox - 1) / 2
    return index.round().long().clamp(0, target.side_vox - 1)


def _worth_learning(
    logits: Tensor, points: Tensor, student: FieldOfView, teacher: Teacher
) -> Tensor:
    """Which masks hold their click, are confident, and neither tiny, cut off nor the whole crop.

    Shapes:
        logits: (K, s, s, s).
        points: (K, 3).
        returns: (K,) bool.
    """
    masks = masks_of(logits, student.side_vox)
    size = masks.flatten(1).sum(1)
    x, y, z = points.unbind(1)
    holds = masks[torch.arange(len(points)), x, y, z]
    sure, possible = ((logits > limit).flatten(1).sum(1) for limit in (MARGIN, -MARGIN))
    is_stable = sure >= teacher.stability * possible.clamp(min=1)
    is_whole = size > LARGEST_SHARE * student.side_vox**3
    # Where the teacher's view ends within the student's, a mask at the border is cut off.
    covered = teacher.field.covers(student, student.cells)
    outside = F.max_pool3d((~covered).float()[None, None], 3, 1, 1)[0, 0] > 0
    is_cut = ((logits > 0) & outside).flatten(1).any(1)
    return holds & is_stable & ~is_whole & ~is_cut & (size >= teacher.smallest_vox)


def masks_of(logits: Tensor, side_vox: int) -> Tensor:
    """Masks on the student's voxels, (K, s, s, s) -> (K, S, S, S) bool."""
    if not len(logits):
        return torch.zeros(0, *(side_vox,) * 3, dtype=torch.bool)
    size = (side_vox,) * 3
    whole = F.interpolate(logits.float()[None], size=size, mode="trilinear", align_corners=False)
    return whole[0] > 0


def write_answer(path: Path, answer: Answer, smallest_vox: int) -> None:
    """Writes the file of a crop; it is complete or not there.

    Its metadata say how many objects it holds: masks, and labels of at least `smallest_vox` voxels.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number = len(answer.logits) + len(_large(answer.labels, smallest_vox))
    tensors = {name: tensor.contiguous() for name, tensor in answer._asdict().items()}
    with atomic_path(path) as draft:
        draft.write_bytes(save(tensors, {"objects": str(number)}))


def objects_in(path: Path) -> int | None:
    """The number of objects in the file of a crop; None if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return int((file.metadata() or {})["objects"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


@dataclass(frozen=True)
class Answers:
    """The files of a source, each with an object."""

    name: str
    paths: tuple[Path, ...]


class AnswerStream(Dataset[dict[str, Tensor]]):
    """Training samples made of a teacher's answers, by number.

    Shapes:
        returns: ``image``, ``objects``, ``draws``, ``plan`` and ``source`` as `ObjectStream` has
            them, and ``embedding`` (T, x, y, z) float32. Objects are the teacher's masks, and
            labels.
    """

    def __init__(
        self,
        sources: Sequence[Answers],
        shares: Sequence[float],
        *,
        objects: int,
        steps: int,
        samples: int,
        seed: tuple[int, ...],
        smallest_vox: int,
        label_share: float = 0.0,
        augment: Augmentation | None = None,
        contrast_share: float = 0.0,
        plan: InteractionPlan | None = None,
        per_step: int = 1,
    ) -> None:
        """All samples of a run; arguments that are not listed are those of `ObjectStream`.

        Args:
            sources: Each with at least one file.
            shares: Relative frequency of each source.
            objects: Number of objects of a sample.
            steps: Number of steps of an interaction.
            samples: Number of samples of the whole run.
            seed: Seed of the run.
            smallest_vox: Smallest size of a labelled object.
            label_share: Share of the objects that are labels, where a crop has both.
            augment: Changes the student's image only; must not move it.
            contrast_share: Share of crops whose contrast is randomised for the student.
            plan: Steps that have a loss; None for all.
            per_step: Samples of an optimiser step.
        """
        self.sources = sources
        self.shares = np.array(shares) / sum(shares)
        self.objects = objects
        self.steps = steps
        self.samples = samples
        self.seed = seed
        self.smallest_vox = smallest_vox
        self.label_share = label_share
        self.augment = augment
        self.contrast_share = contrast_share
        self.plan = plan or InteractionPlan()
        self.per_step = per_step

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((*self.seed, number))
        which = int(rng.choice(len(self.sources), p=self.shares))
        paths = self.sources[which].paths
        answer = Answer(**load_file(paths[int(rng.integers(len(paths)))]))
        image, labels = answer.image.float()[None], answer.labels
        objects = self._objects(rng, answer)
        if rng.random() < self.contrast_share:
            image = random_contrast(rng, image, labels[None])
        if self.augment is not None:
            self.augment.set_random_state(seed=int(rng.integers(2**32)))
            changed = self.augment({"image": image, "label": labels[None]})
            image = changed["image"].as_subclass(Tensor)
        return {
            "image": image.float().contiguous(),
            "objects": objects,
            "draws": torch.from_numpy(rng.random((self.steps, self.objects, 3), np.float32)),
            "plan": torch.tensor(
                self.plan.draw(self.steps, (*self.seed, 1 << 40, number // self.per_step)),
                dtype=torch.uint8,
            ),
            "embedding": answer.embedding.float(),
            "source": torch.tensor(which),
        }

    def _objects(self, rng: np.random.Generator, answer: Answer) -> Tensor:
        """Objects of a crop, (P, S, S, S) bool; where there are fewer, they come several times."""
        values = rng.permutation(_large(answer.labels, self.smallest_vox))
        numbers = rng.permutation(len(answer.logits))
        from_labels = round(self.label_share * self.objects)
        from_labels = min(from_labels, len(values)) if len(numbers) else self.objects
        chosen = np.resize(values, from_labels).tolist() if from_labels else []
        labelled = [answer.labels == value for value in chosen]
        rest = self.objects - from_labels
        if not rest:
            return torch.stack(labelled)
        masks = masks_of(answer.logits[np.resize(numbers, rest)], len(answer.image))
        return torch.cat([torch.stack(labelled), masks]) if labelled else masks


def _large(labels: Tensor, smallest_vox: int) -> NDArray[np.int64]:
    """The values of labels with at least so many voxels."""
    counts = np.bincount(labels.numpy().ravel())
    counts[:1] = 0  # no object
    values: NDArray[np.int64] = np.flatnonzero(counts >= max(1, smallest_vox))
    return values


def _air_level(image: Tensor) -> float:
    """The intensity below which a voxel counts as air."""
    values = image.numpy()[::2, ::2, ::2]
    low, high = float(values.min()), float(np.percentile(values, RANGE_PERCENT))
    return low + AIR_SHARE * (high - low)


def _sampled(x: Tensor, indices: Indices) -> Tensor:
    """Values at continuous indices of the last three axes, linear between them."""
    for axis, index in enumerate(indices, start=x.ndim - 3):
        x = interpolate_axis(x, axis, index)
    return x


def _windowed(x: Tensor, indices: Indices) -> tuple[Tensor, Indices]:
    """The part of a volume that lies around some indices, and these in it."""
    low = [
        min(max(0, math.floor(index.min())), n - 1)
        for index, n in zip(indices, x.shape, strict=True)
    ]
    high = [max(first + 1, math.ceil(i.max()) + 1) for first, i in zip(low, indices, strict=True)]
    window = x[tuple(slice(*ends) for ends in zip(low, high, strict=True))]
    return window, [index - first for index, first in zip(indices, low, strict=True)]


def _within(indices: Indices, shape: Sequence[int]) -> Tensor:
    """Which points of a lattice lie in a grid, bool."""
    x, y, z = (
        torch.as_tensor((index >= -0.5) & (index <= n - 0.5))
        for index, n in zip(indices, shape, strict=True)
    )
    inside: Tensor = x[:, None, None] & y[:, None] & z
    return inside


def _in_one_slab(image: Tensor) -> list[Tensor]:
    return [image]
