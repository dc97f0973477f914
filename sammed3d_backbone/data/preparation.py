"""Cases of a data set -> images and labels on the network's grid.

`prepare_cases` opens, checks and prepares many cases, keeps them in memory or in a cache, and
reports the problems of all of them at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import joblib
import numpy as np
import torch
from torch import Tensor

from sammed3d_backbone.console import optional, progress_bar
from sammed3d_backbone.data.cache import cache_path, read_prepared, write_prepared
from sammed3d_backbone.data.checks import label_problems, pair_problems
from sammed3d_backbone.data.datasets import Case, Dataset, DatasetError
from sammed3d_backbone.data.limits import GRID_TOLERANCE
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.data.volume import Volume

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """One case on the network's grid.

    Shapes:
        image: (C, X', Y', Z') float32.
        label: (1, X', Y', Z') integers, 0 where the volume was padded, K where it is to be ignored.
        annotated: (K,) bool; False where a class was not annotated, so that it may be anywhere.
    """

    case: Case
    image: Tensor
    label: Tensor
    annotated: Tensor


def load_image(case: Case, *, tolerance: float = GRID_TOLERANCE) -> Volume:
    """All channels of a case as one volume; see `load_channels`."""
    return load_channels(case.images, tolerance=tolerance)


def load_channels(paths: Sequence[Path], *, tolerance: float = GRID_TOLERANCE) -> Volume:
    """One file per channel, or one file that holds all, as a volume (X, Y, Z) or (C, X, Y, Z).

    Args:
        paths: The files.
        tolerance: See `pair_problems`.

    Raises:
        ValueError: If a file is unreadable or the channels do not lie on one grid.
    """
    volumes = [Volume.load(path) for path in paths]
    first = volumes[0]
    if len(volumes) == 1:
        return first
    for path, volume in zip(paths[1:], volumes[1:], strict=True):
        if problems := pair_problems(path, volume, paths[0], first, tolerance=tolerance):
            raise ValueError(problems[0])
    return replace(first, array=np.stack([volume.array for volume in volumes]))


def load_label(case: Case) -> Volume:
    """The label volume of a case, with the values in its files mapped to class numbers.

    Raises:
        ValueError: If a file is unreadable.
    """
    first = Volume.load(case.label_files[0])
    if not case.masks:
        return numbered(case, first)
    numbers = np.zeros(first.shape, np.int32)
    for number, path in zip(case.numbers or count(1), case.masks, strict=False):
        numbers[Volume.load(path).array > 0] = number
    return replace(first, array=numbers)


def numbered(case: Case, stored: Volume) -> Volume:
    """Class numbers in place of the values in a file of all classes."""
    values = np.empty_like(stored.array, dtype=np.int32)
    np.rint(stored.array, out=values, casting="unsafe")  # without another copy in between
    if not case.values:
        return replace(stored, array=values)
    numbers = np.zeros_like(values)
    for number, value in enumerate(case.values, start=1):
        numbers[values == value] = number
    return replace(stored, array=numbers)


def annotated_classes(case: Case, dataset: Dataset) -> Tensor:
    """The classes that are annotated in a case, (K,) bool; background always is."""
    known = dataset.classes if case.annotated is None else case.annotated
    return torch.tensor([True, *(name in known for name in dataset.classes)])


def prepare_cases(
    dataset: Dataset,
    ids: Sequence[str],
    preprocessing: Preprocessing,
    *,
    cache: Path | None = None,
    jobs: int = 1,
    progress: bool = True,
) -> list[PreparedCase]:
    """The named cases, opened, checked and prepared, in the given order.

    With statistics over crops, images hold unnormalised voxels.

    Args:
        dataset: Data set of the cases.
        ids: Names of the cases.
        preprocessing: Applied to every image.
        cache: Folder that keeps them for the next start; None keeps them in memory only.
        jobs: Number of cases prepared at the same time, by joblib in threads unless
            `joblib.parallel_config` says otherwise.
        progress: Whether to show a progress bar.

    Raises:
        DatasetError: If any of them cannot be used; the message lists all reasons with their paths.
    """
    by_id = {case.id: case for case in dataset.cases}
    tasks = (joblib.delayed(_prepare)(by_id[name], dataset, preprocessing, cache) for name in ids)
    results = joblib.Parallel(n_jobs=jobs, prefer="threads", return_as="generator")(tasks)
    problems: list[str] = []
    prepared: list[PreparedCase] = []
    bar = progress_bar(results, desc="reading", unit="case", total=len(ids), shown=progress)
    for name, (found, tensors) in zip(ids, bar, strict=True):
        problems.extend(found)
        if problems:
            prepared.clear()  # the remaining cases are only checked
        elif tensors is not None:
            image, label = tensors
            annotated = annotated_classes(by_id[name], dataset)
            prepared.append(PreparedCase(by_id[name], image, label, annotated))
    if problems:
        raise DatasetError(f"{len(problems)} problems in {dataset.folder}:", problems)
    empty = [
        entry.case.id
        for entry in prepared
        if not bool(((entry.label > 0) & (entry.label < len(dataset.labels))).any())
    ]
    if empty and len(empty) == len(prepared):
        raise DatasetError(f"{dataset.folder} cannot be used:", ["no case has a labelled voxel"])
    if empty:
        logger.warning(
            "%d of %d cases have background only and are trained on as without any structure, for "
            "example %s; leave out those that are merely not labelled",
            len(empty),
            len(prepared),
            empty[0],
        )
    return prepared


def _prepare(
    case: Case, dataset: Dataset, preprocessing: Preprocessing, cache: Path | None
) -> tuple[list[str], tuple[Tensor, Tensor] | None]:
    """The problems of a case, or its image and label on the network's grid."""
    kept = None if cache is None else cache_path(cache, case, dataset, preprocessing)
    if kept is not None and (tensors := read_prepared(kept)) is not None:
        return [], tensors
    problems, opened = open_case(case, dataset)
    if opened is None:
        return problems, None
    image, label = opened
    try:
        x, geometry = preprocessing.image(image)
    except ValueError as error:
        return [f"{case.images[0]}: {error}"], None
    y = geometry.to_box(geometry.resample_labels(label.array))
    if kept is not None:
        with optional(kept):
            write_prepared(kept, x, y)
        x, y = read_prepared(kept) or (x, y)  # memory-mapped, so that memory is free for the next
    return problems, (x, y)


def open_case(case: Case, dataset: Dataset) -> tuple[list[str], tuple[Volume, Volume] | None]:
    """The problems of a case, or its image and label."""
    problems: list[str] = []
    values = case.values or range(1, len(dataset.labels) + dataset.has_ignore)
    known = (0, 1) if case.masks else (0, *values)
    try:
        image = load_image(case, tolerance=dataset.grid_tolerance)
        for path in case.label_files:  # one in memory at a time: there may be a hundred
            stored = Volume.load(path)
            problems += label_problems(path, stored, known)
            problems += pair_problems(
                path, stored, case.images[0], image, tolerance=dataset.grid_tolerance
            )
    except (ValueError, FileNotFoundError) as error:
        return [*problems, str(error)], None
    if image.channels != len(dataset.channels):
        problems.append(
            f"{case.images[0]}: {image.channels} channels, but {len(dataset.channels)} are named "
            f"({', '.join(dataset.channels)}); correct one of them"
        )
    if problems:
        return problems, None
    return [], (image, load_label(case) if case.masks else numbered(case, stored))
