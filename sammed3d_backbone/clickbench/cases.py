"""The objects of a data set that are segmented: folder -> cases -> targets.

Besides the layouts of `read_dataset`, a folder may hold a ``labels.json`` (a list of single volumes
with the names of their labels) or the ``.npz`` files of the CVPR 2025 challenge.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.checks import label_problems, pair_problems
from sammed3d_backbone.data.datasets import (
    Case,
    DatasetError,
    LabelledCase,
    require_whole_masks,
)
from sammed3d_backbone.data.folders import folder_of, open_dataset
from sammed3d_backbone.data.limits import require_bytes, value_range
from sammed3d_backbone.data.preparation import load_image, load_label
from sammed3d_backbone.data.preprocessing import Modality, modality_of
from sammed3d_backbone.data.regions import Mask, values_of
from sammed3d_backbone.data.singles import DESCRIPTION, read_singles
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import require_file
from sammed3d_backbone.strategies import connected_parts

MODEL_MASKS = "The masks are another model's output: scores are agreement with it, not accuracy."


@dataclass(frozen=True, eq=False)
class ClickTarget:
    """One object to be segmented by clicks.

    Shapes:
        truth: (X, Y, Z) bool, on the grid of the image.
    """

    dataset: str
    case: str
    subject: str  # scans of one subject are not independent
    name: str  # name of the class, with a number if parts are targets
    image: Volume
    truth: Mask
    modality: Modality | None  # None if unknown


@dataclass(frozen=True)
class ClickSet:
    """The cases of one folder."""

    name: str
    cases: tuple[LabelledCase, ...]
    note: str = ""  # shown in the report
    instances: bool = False  # every connected part of a class is a target of its own
    spacing_is_xyz: bool = False  # how the spacing of npz files is read, see `read_npz`

    def targets(self, case: LabelledCase) -> Iterator[ClickTarget]:
        """The objects of a case, in the order of their label values; opens its files.

        Raises:
            DatasetError: If the files cannot be used; all reasons at once.
        """
        files = case.case
        if files.label.suffix == ".npz":
            image, labels = read_npz(files.label, spacing_is_xyz=self.spacing_is_xyz)
        else:
            image, labels = _read_pair(case)
        try:
            value_range(image.array)
        except ValueError as error:  # not a failure of the model
            raise DatasetError(f"{files.images[0]} cannot be used:", [str(error)]) from None
        names = case.labels
        if names is None:
            names = {int(value): str(value) for value in np.unique(labels) if value}
        for value, name in sorted(names.items()):
            truth = labels == value
            parts = {name: truth} if truth.any() else {}
            if self.instances:
                numbered = enumerate(connected_parts(truth, image.affine), start=1)
                parts = {f"{name} {number}": part for number, part in numbered}
            for called, part in parts.items():
                modality = modality_of(case.modality)
                yield ClickTarget(self.name, files.id, files.subject, called, image, part, modality)

    def target(self, case: str, name: str) -> ClickTarget:
        """The target of a case's id and a class; opens the files of the case."""
        return next(
            target
            for listed in self.cases
            if listed.case.id == case
            for target in self.targets(listed)
            if target.name == name
        )

    def selected(self, cases: int | None = None, classes: Iterable[str] = ()) -> ClickSet:
        """The first cases, and of their classes those named.

        Raises:
            ValueError: If a named class is nowhere in the set, or `cases` is less than 1.
        """
        if cases is not None and cases < 1:
            raise ValueError(f"cases is {cases}; give 1 or more")
        wanted = set(classes)
        known = {name for case in self.cases for name in _named(case, wanted).values()}
        if wanted - known:
            raise ValueError(
                f"{sorted(wanted - known)} are not classes of {self.name}; choose among "
                f"{', '.join(sorted(known)) or 'the numbers of its labels'}"
            )
        kept = self.cases[:cases]
        if wanted:
            kept = tuple(
                replace(c, labels={v: n for v, n in _named(c, wanted).items() if n in wanted})
                for c in kept
            )
        return replace(self, cases=kept)

    def content_sha256(self) -> str:
        """Hash of the files of all cases, independent of their folder."""
        digest = hashlib.sha256()
        for case in self.cases:
            for path in dict.fromkeys((*case.case.images, *case.case.label_files)):
                require_file(path)
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{case.case.id} {path.name} {content}\n".encode())
        return digest.hexdigest()


def _named(case: LabelledCase, numbers: Iterable[str]) -> Mapping[int, str]:
    """The labels of a case; where they have no names, those of the given numbers."""
    if case.labels is not None:
        return case.labels
    return {int(number): number for number in numbers if number.isdigit()}


def read_click_set(
    data: str | Path, *, layout: Path | None = None, subjects: Path | None = None
) -> ClickSet:
    """The cases of a folder: read_dataset's layouts, a labels.json, or the challenge's npz files.

    Args:
        data: The folder.
        layout: YAML file that describes the folder, see `Layout`.
        subjects: JSON file with the subject of each case.

    Raises:
        FileNotFoundError: If the folder holds none of them.
        DatasetError: If what describes them is not usable.
        ValueError: If subjects are given for a labels.json or npz files.
    """
    folder = folder_of(str(data))
    if layout is None:
        archives = sorted(folder.glob("*.npz"))
        plain = _singles(folder) if (folder / DESCRIPTION).is_file() else _archives(archives)
        if plain.cases and subjects is not None:
            raise ValueError(f"{folder} has a case per subject; leave out {subjects}")
        if plain.cases:
            return plain
    dataset = open_dataset(str(data), layout, subjects)
    require_whole_masks(dataset)
    names = {value: name for value, name in dataset.labels.items() if value}
    cases = [LabelledCase(case, names, dataset.channels[0]) for case in dataset.cases]
    return ClickSet(dataset.name, tuple(cases), dataset.note)


def read_npz(path: Path, *, spacing_is_xyz: bool) -> tuple[Volume, NDArray[Any]]:
    """Image and labels of a file of the CVPR 2025 challenge: keys imgs, gts and spacing.

    Arrays lie in the file as (Z, Y, X). Whether ``spacing`` does as well is not written anywhere:
    the challenge's evaluator reads it so, while public files of the same lab hold x, y, z. The
    orientation is not in the file either; axes are taken to run towards R, A, S.

    Shapes:
        returns: a volume (X, Y, Z) and integer labels (X, Y, Z).

    Args:
        path: The npz file.
        spacing_is_xyz: False reads the spacing as the evaluator does.

    Raises:
        DatasetError: If the file is not such an archive.
    """
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            require_bytes(sum(entry.file_size for entry in archive.infolist()))
        with np.load(path, allow_pickle=False) as archive:
            image, labels = archive["imgs"], archive["gts"]
            spacing_mm = np.asarray(archive["spacing"], dtype=float)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(
            f"{path} cannot be used:", [f"{error}; give imgs, gts and spacing of the challenge"]
        ) from None
    if image.shape != labels.shape or image.ndim != 3 or spacing_mm.shape != (3,):
        raise DatasetError(
            f"{path} cannot be used:",
            [f"imgs {image.shape}, gts {labels.shape}, spacing {spacing_mm.shape}; give one grid"],
        )
    is_real = image.dtype.kind in "biuf" and labels.dtype.kind in "biuf"
    if not is_real or (labels != np.round(labels)).any():
        raise DatasetError(
            f"{path} cannot be used:",
            [f"imgs of {image.dtype}, gts of {labels.dtype}; give real numbers and whole ones"],
        )
    affine = np.diag([*(spacing_mm if spacing_is_xyz else spacing_mm[::-1]), 1.0])
    return Volume(image.T.astype(np.float32), affine), labels.T


def _read_pair(case: LabelledCase) -> tuple[Volume, NDArray[Any]]:
    """Image and integer labels of NIfTI files that lie on one grid."""
    files = case.case
    image = load_image(files)
    problems: list[str] = []
    for path in files.label_files:
        label = Volume.load(path)
        problems += label_problems(path, label, values_of(label.array))  # any number is a label
        problems += pair_problems(path, label, files.images[0], image)
    if image.channels != 1:
        problems.append(
            f"{files.images[0]}: {image.channels} channels, and a click model takes one; make a "
            "data set of the channel to be segmented"
        )
    if problems:
        raise DatasetError(f"{files.id} cannot be used:", problems)
    return image, load_label(files).array


def _singles(folder: Path) -> ClickSet:
    """The volumes of a labels.json."""
    found = read_singles(folder)
    is_model = any("model" in one.mask for one in found)
    return ClickSet(folder.name, found, MODEL_MASKS if is_model else "")


def _archives(paths: Iterable[Path]) -> ClickSet:
    """The npz files of one folder."""
    cases = tuple(LabelledCase(Case(path.stem, (path,), path), None) for path in paths)
    return ClickSet(cases[0].case.label.parent.name if cases else "", cases)
