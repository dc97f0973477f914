"""BIDS: images in ``sub-*/[ses-*/]anat``, labels in ``derivatives/PIPELINE`` as ``*_dseg.nii.gz``.

The images of a case are those whose name is the label's up to entities that describe the label
(``desc``, ``space``, ``label``, ``res``, ``seg``, ``atlas``); their suffixes (``T1w``, ``FLAIR``)
are the channels. A ``*dseg.tsv`` names the classes in its columns ``index`` and ``name``.

Source: Brain Imaging Data Structure 1.10, derivatives, imaging data types, segmentations.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from sammed3d_backbone.data.datasets import Case, Dataset, DatasetError, read_json
from sammed3d_backbone.data.nifti import SUFFIXES

DESCRIPTION = "dataset_description.json"
OF_THE_LABEL = ("atlas", "desc", "label", "res", "seg", "space")  # entities an image does not have


def read_bids(folder: Path, problems: list[str]) -> Dataset:
    """The data set of a BIDS folder with one labelled derivative.

    Raises:
        DatasetError: If dataset_description.json is not a JSON object.
    """
    info = read_json(folder / DESCRIPTION)
    if not isinstance(info, dict):
        raise DatasetError(
            f"{folder / DESCRIPTION} cannot be used:", ["not a JSON object; correct it"]
        )
    labels: dict[Path, list[Path]] = {}  # by derivative
    for path in sorted(folder.glob("derivatives/*/sub-*/**/[!.]*_dseg.nii*")):
        labels.setdefault(folder / Path(*path.relative_to(folder).parts[:2]), []).append(path)
    if len(labels) != 1:
        problems.append(
            f"{len(labels)} folders in {folder / 'derivatives'} hold sub-*/**/*_dseg.nii.gz "
            f"({', '.join(path.name for path in labels)}); leave exactly one there"
        )
        return Dataset(folder.name, folder, {0: "background"}, (), ())
    ((pipeline, files),) = labels.items()
    names = _names(pipeline, problems)
    starts = {path: folder / path.parent.relative_to(pipeline) / _stem(path) for path in files}
    images = {path: _images(start) for path, start in starts.items()}
    channels = sorted({suffix for found in images.values() for suffix in found})
    if not channels:
        problems.append(
            f"no image lies beside {files[0].relative_to(pipeline)} in {folder}; add it"
        )
    return Dataset(
        name=str(info.get("Name", folder.name)),
        folder=folder,
        labels={0: "background", **dict(enumerate(names.values(), start=1))},
        channels=tuple(channels),
        cases=tuple(
            Case(
                id=_stem(path),
                images=tuple(
                    found.get(suffix, Path(f"{starts[path]}_{suffix}.nii.gz"))
                    for suffix in channels
                ),
                label=path,
                values=tuple(names),
                subject=_stem(path).partition("_")[0],
            )
            for path, found in images.items()
        ),
        about={
            key: str(info[theirs])
            for key, theirs in (("reference", "HowToAcknowledge"), ("licence", "License"))
            if theirs in info
        },
    )


def _stem(label: Path) -> str:
    """``sub-1_ses-2_space-orig_dseg.nii.gz`` -> ``sub-1_ses-2``, the case."""
    entities = label.name.split("_")[:-1]
    return "_".join(e for e in entities if e.partition("-")[0] not in OF_THE_LABEL)


def _images(start: Path) -> dict[str, Path]:
    """Suffix -> image, for the files named `start` plus a suffix."""
    found = {}
    for path in sorted(start.parent.glob(f"{start.name}_*.nii*")):
        suffix = path.name.removeprefix(f"{start.name}_").partition(".")[0]
        if suffix.isalnum() and path.name.endswith(SUFFIXES):
            found[suffix] = path
    return found


def _names(pipeline: Path, problems: list[str]) -> dict[int, str]:
    """Value in the files -> class, from the dseg.tsv of the derivative; all of them must agree."""
    tables = sorted(pipeline.rglob("*dseg.tsv"))
    read = [_table(path) for path in tables]
    if not tables or not read[0]:
        problems.append(
            f"no names for the labels: write {pipeline / 'dseg.tsv'} with the columns index and "
            "name, separated by tabs"
        )
        return {}
    problems.extend(
        f"{path} and {tables[0]} name other classes; make them agree"
        for path, names in zip(tables, read, strict=True)
        if names != read[0]
    )
    return read[0]


def _table(path: Path) -> dict[int, str]:
    """The names of one table; without background, empty if it is not of the form."""
    with path.open(encoding="utf-8", newline="") as file:
        rows: Sequence[dict[str, str]] = list(csv.DictReader(file, delimiter="\t"))
    try:
        named = {int(row["index"]): row["name"] for row in rows}
    except (KeyError, TypeError, ValueError):
        return {}
    return {value: named[value] for value in sorted(named) if value}
