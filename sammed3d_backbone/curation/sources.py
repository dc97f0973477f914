"""A raw folder -> the data sets below it and their cases; no volume is opened.

A data set is a folder that describes itself (Decathlon, nnU-Net, BIDS, ``labels.json``), one that a
`Layout` describes, or one in SAM-Med3D's own layout. Other folders are searched recursively.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sammed3d_backbone.data import singles
from sammed3d_backbone.data.bids import split_choice
from sammed3d_backbone.data.datasets import (
    Case,
    DatasetError,
    LabelledCase,
    require_whole_masks,
)
from sammed3d_backbone.data.folders import DESCRIPTIONS, read_dataset
from sammed3d_backbone.data.layouts import Layout
from sammed3d_backbone.data.nifti import SUFFIXES


@dataclass(frozen=True)
class RawSet:
    """The cases of one data set."""

    name: str
    folder: Path
    place: str  # subfolder of its results; "." if the raw folder is the data set
    channels: tuple[str, ...]
    cases: tuple[LabelledCase, ...]
    note: str = ""
    about: Mapping[str, str] = field(default_factory=dict)


def read_raw(folder: Path, layout: Layout | None = None) -> list[RawSet]:
    """All data sets in and below a folder.

    Args:
        folder: Folder of one data set or of several; a BIDS set's path may go on to its labels, see
            `data.bids`.
        layout: Layout of a single data set that does not describe itself.

    Raises:
        FileNotFoundError: If there is no such folder, or no data set in it.
        DatasetError: If a description does not fit its files; all reasons at once.
    """
    root, choice = (folder, "") if layout else split_choice(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}; check the path")
    is_one = layout is not None or choice
    found = [_of_dataset(folder, root, layout)] if is_one else list(_search(root, root))
    if not found:
        raise FileNotFoundError(
            f"no data set in or below {folder}; pass the folder of a dataset.json, of a "
            "dataset_description.json, of a labels.json or of CLASS/MODALITY_DATASET/labelsTr, or "
            "describe it with --layout FILE"
        )
    return found


def _search(folder: Path, root: Path) -> Iterator[RawSet]:
    """The data sets of a folder; those that describe themselves are not searched for others."""
    if any((folder / name).is_file() for name in DESCRIPTIONS):
        yield _of_dataset(folder, root, None)
    elif (folder / singles.DESCRIPTION).is_file():
        yield _of_singles(folder, root)
    elif any(folder.glob("*/*_*/labelsTr")):
        yield from _of_reference(folder, root)
    else:
        for inner in sorted(folder.iterdir()):
            # A link to a folder that holds it would be searched without end.
            is_loop = inner.is_symlink() and folder.resolve().is_relative_to(inner.resolve())
            if inner.is_dir() and not inner.name.startswith(".") and not is_loop:
                yield from _search(inner, root)


def _of_dataset(folder: Path, root: Path, layout: Layout | None) -> RawSet:
    """A data set that `read_dataset` reads."""
    dataset = read_dataset(folder, layout)
    require_whole_masks(dataset)
    labels = {value: name for value, name in dataset.labels.items() if value}
    modality = dataset.channels[0]
    return RawSet(
        name=dataset.name,
        folder=dataset.folder,
        place=_place(dataset.folder, root),
        channels=dataset.channels,
        cases=tuple(
            LabelledCase(case, labels, modality, channels=len(dataset.channels))
            for case in dataset.cases
        ),
        note=dataset.note,
        about=dataset.about,
    )


def _of_singles(folder: Path, root: Path) -> RawSet:
    """The volumes of a labels.json."""
    found = sorted(singles.read_singles(folder), key=lambda one: one.case.id)
    modalities = {one.modality for one in found}
    _require_files([one.case for one in found], folder)
    return RawSet(
        name=folder.name,
        folder=folder,
        place=_place(folder, root),
        channels=tuple(modalities) if len(modalities) == 1 else ("image",),
        cases=tuple(found),
        note="; ".join(sorted({f"masks: {one.mask}" for one in found if one.mask})),
    )


def _of_reference(folder: Path, root: Path) -> Iterator[RawSet]:
    """SAM-Med3D's own layout: CLASS/MODALITY_DATASET/{imagesTr,labelsTr}/CASE.nii.gz.

    An image lies there once for every class; its first copy is taken.
    """
    masks: dict[str, dict[str, dict[str, Path]]] = {}  # data set -> file -> class -> mask
    for path in sorted(folder.glob("*/*_*/labelsTr/[!.]*.nii*")):
        if path.name.endswith(SUFFIXES):
            name, dataset, _, file = path.relative_to(folder).parts
            masks.setdefault(dataset, {}).setdefault(file, {})[name] = path
    for dataset, files in sorted(masks.items()):
        modality = dataset.partition("_")[0]
        cases = [
            LabelledCase(
                Case(
                    id=file.split(".nii")[0],
                    images=(_image_of(next(iter(of_classes.values()))),),
                    label=folder,
                    masks=tuple(of_classes.values()),
                ),
                labels=dict(enumerate(of_classes, start=1)),
                modality=modality,
            )
            for file, of_classes in files.items()
        ]
        _require_files([one.case for one in cases], folder)
        place = _place(folder / dataset, root)
        yield RawSet(dataset, folder, place, (modality,), tuple(cases))


def _image_of(mask: Path) -> Path:
    return mask.parents[1] / "imagesTr" / mask.name


def _require_files(cases: list[Case], folder: Path) -> None:
    """Refuses cases whose files are not there."""
    missing = [
        f"{path} is missing; copy it or remove {case.id}"
        for case in cases
        for path in (*case.images, *case.label_files)
        if not path.is_file()
    ]
    if missing:
        raise DatasetError(f"{folder} cannot be used:", missing)


def _place(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix()
