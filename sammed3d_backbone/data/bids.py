"""BIDS: images in ``sub-*/[ses-*/]anat``, labels in ``derivatives/PIPELINE`` as ``*_dseg.nii.gz``.

The images of a case are those whose name is the label's up to entities that describe the label
(``desc``, ``space``, ``label``, ``res``, ``seg``, ``atlas``); their suffixes (``T1w``, ``FLAIR``)
are the channels. A ``*dseg.tsv`` names the classes in its columns ``index`` and ``name``.

Where there are several derivatives, or several labels of one scan, the path of the data set goes
on: ``FOLDER/derivatives/PIPELINE`` or ``FOLDER/derivatives/PIPELINE/*_desc-manual_dseg.nii.gz``.

Source: Brain Imaging Data Structure 1.10, derivatives, imaging data types, segmentations.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sammed3d_backbone.data.datasets import (
    Case,
    Dataset,
    DatasetError,
    class_names,
    read_json,
    read_table,
)
from sammed3d_backbone.data.nifti import SUFFIXES

DESCRIPTION = "dataset_description.json"
LABELS = "*_dseg.nii*"
OF_THE_LABEL = ("atlas", "desc", "label", "res", "seg", "space")  # entities an image does not have


def split_choice(path: Path) -> tuple[Path, str]:
    """The folder of a data set, and the pattern of its labels; "" where the path chooses none."""
    folder, found, choice = path.as_posix().partition("/derivatives/")
    if not found or not (Path(folder) / DESCRIPTION).is_file():
        return path, ""
    pipeline, _, labels = choice.partition("/")
    return Path(folder), f"{pipeline}/sub-*/**/{labels or LABELS}"


def read_bids(folder: Path, problems: list[str], chosen: str = "") -> Dataset:
    """The data set of a BIDS folder with one labelled derivative.

    Args:
        folder: Contains dataset_description.json and derivatives/.
        problems: Gets a line for everything that is wrong.
        chosen: Pattern of the labels in derivatives/, see `split_choice`; "" takes all.

    Raises:
        DatasetError: If dataset_description.json is not a JSON object.
    """
    info = read_json(folder / DESCRIPTION)
    if not isinstance(info, dict):
        raise DatasetError(
            f"{folder / DESCRIPTION} cannot be used:", ["not a JSON object; correct it"]
        )
    labels: dict[Path, list[Path]] = {}  # by derivative
    paths = [
        path
        for path in sorted(folder.glob(f"derivatives/{chosen or f'*/sub-*/**/{LABELS}'}"))
        if not path.name.startswith(".") and path.name.endswith(SUFFIXES)
    ]
    anatomical = [path for path in paths if path.parent.name == "anat"]
    for path in anatomical or paths:
        labels.setdefault(folder / Path(*path.relative_to(folder).parts[:2]), []).append(path)
    if len(labels) != 1:
        problems.append(
            f"{len(labels)} folders in {folder / 'derivatives'} hold sub-*/**/*_dseg.nii.gz "
            f"({', '.join(path.name for path in labels)}); choose one as data="
            f"{folder / 'derivatives'}/NAME, or describe other labels by layout=FILE"
        )
        return Dataset(folder.name, folder, {0: "background"}, (), ())
    ((pipeline, files),) = labels.items()
    if several := [stem for stem, n in Counter(map(_stem, files)).items() if n > 1]:
        of_one = ", ".join(path.name for path in files if _stem(path) == several[0])
        problems.append(
            f"{of_one} are labels of one scan; choose by a part of the name, as in "
            f"data={pipeline}/*_desc-manual_dseg.nii.gz"
        )
        return Dataset(folder.name, folder, {0: "background"}, (), ())
    names = _names(pipeline, problems)
    starts = {path: folder / path.parent.relative_to(pipeline) / _stem(path) for path in files}
    images = {path: _images(start, problems) for path, start in starts.items()}
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


def _images(start: Path, problems: list[str]) -> dict[str, Path]:
    """Suffix -> image, for the files named `start` plus a suffix."""
    found: dict[str, Path] = {}
    for path in sorted(start.parent.glob(f"{start.name}_*.nii*")):
        suffix = path.name.removeprefix(f"{start.name}_").partition(".")[0]
        if suffix.isalnum() and path.name.endswith(SUFFIXES):
            if suffix in found:
                problems.append(f"{found[suffix]} and {path.name} are one image; keep one")
            found[suffix] = path
    return found


def _names(pipeline: Path, problems: list[str]) -> dict[int, str]:
    """Value in the files -> class, from the dseg.tsv of the derivative; all of them must agree."""
    tables = sorted(pipeline.rglob("*dseg.tsv"))
    read = [_table(path, problems) for path in tables]
    if not tables or not read[0]:
        problems.append(
            f"no names for the labels: write {pipeline / 'dseg.tsv'} with the columns index and "
            "name"
        )
        return {}
    problems.extend(
        f"{path} and {tables[0]} name other classes; make them agree"
        for path, names in zip(tables, read, strict=True)
        if names != read[0]
    )
    return read[0]


def _whole(text: str) -> int:
    """A whole number, which a table may hold as 17.0.

    Raises:
        ValueError: If it is none.
    """
    if not (value := float(text)).is_integer():
        raise ValueError(f"{text} is not a whole number")
    return int(value)


def _table(path: Path, problems: list[str]) -> dict[int, str]:
    """The names of one table; without background, empty if it is not of the form."""
    try:
        pairs = [(_whole(row["index"]), row["name"]) for row in read_table(path)]
    except (KeyError, TypeError, ValueError, OverflowError):
        return {}
    found: list[str] = []
    named = class_names(pairs, found)
    problems += [f"{path}: {problem}" for problem in found]
    return {value: named[value] for value in sorted(named) if value}
