"""A folder on disk -> the data set in it; no volume is opened.

The format follows from what the folder contains: ``dataset.json`` (Decathlon, nnU-Net),
``dataset_description.json`` (BIDS), or neither, and then a `Layout` says where the files lie.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from sammed3d_backbone.data import bids, decathlon
from sammed3d_backbone.data.datasets import SPLITS, Dataset, DatasetError, with_subjects
from sammed3d_backbone.data.layouts import Layout, read_described, read_layout
from sammed3d_backbone.files import reading

DATA_VARIABLE = "SAMMED3D_DATA"
DEFAULT_DATA = "../shared/data"
DESCRIPTIONS = {
    decathlon.DESCRIPTION: decathlon.read_decathlon,
    bids.DESCRIPTION: bids.read_bids,
}


def find_dataset(data: str, layout: Layout | None = None) -> Path:
    """The folder of a data set: as given if it exists, else of that name below SAMMED3D_DATA.

    Args:
        data: Path or name.
        layout: Layout of a folder without a description.

    Raises:
        FileNotFoundError: If there is no such folder, or it lacks a description.
    """
    places = [Path(data).expanduser()]
    if not places[0].is_absolute() and not places[0].is_dir():
        places.append(_below_data(data))
    for place in places:
        if layout is not None and place.is_dir():
            return place.absolute()  # for workers with another current folder
        if any((bids.split_choice(place)[0] / name).is_file() for name in DESCRIPTIONS):
            return place.absolute()
    sought = "folder" if layout is not None else "dataset.json"
    raise FileNotFoundError(
        f"no {sought} in {' or '.join(map(str, places))}; pass data=FOLDER (Decathlon, nnU-Net raw "
        f"or BIDS; layout=FILE for another), or set {DATA_VARIABLE} to the folder that holds {data}"
    )


def folder_of(source: str) -> Path:
    """The folder of that path, or of that name below SAMMED3D_DATA; it need not exist."""
    given = Path(source).expanduser().absolute()
    below = _below_data(source)
    return below if below.is_dir() and not given.is_dir() else given


def _below_data(name: str) -> Path:
    return Path(os.environ.get(DATA_VARIABLE, DEFAULT_DATA)).expanduser() / name


def open_dataset(
    data: str, layout: str | Path | None = None, subjects: str | Path | None = None
) -> Dataset:
    """The data set of that path or name; see `find_dataset` and `read_dataset`.

    Args:
        data: Path or name.
        layout: YAML file of the layout of a folder without a description.
        subjects: JSON file, case -> subject.
    """
    described = None if layout is None else read_layout(Path(layout))
    dataset = read_dataset(find_dataset(data, described), described)
    return dataset if subjects is None else with_subjects(dataset, Path(subjects))


def read_dataset(folder: str | Path, layout: Layout | None = None) -> Dataset:
    """The data set in a folder.

    Args:
        folder: Contains a description, unless a layout is given. The path of a BIDS data set may
            continue to the labels, see `bids`.
        layout: Where its files lie; takes precedence over the folder's description.

    Raises:
        FileNotFoundError: If the folder holds no description and no layout is given.
        DatasetError: If the description or the files it names are not usable; all reasons at once.
    """
    folder = Path(folder)
    problems: list[str] = []
    if layout is not None:
        with reading(folder):
            dataset = read_described(folder, layout, problems)
    else:
        folder, chosen = bids.split_choice(folder)
        found = next((name for name in DESCRIPTIONS if (folder / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"no {' or '.join(DESCRIPTIONS)} in {folder}; pass the folder that holds it, or "
                "layout=FILE"
            )
        choice = {"chosen": chosen} if chosen else {}
        with reading(folder / found):
            dataset = DESCRIPTIONS[found](folder, problems, **choice)
    if not dataset.cases and not problems:
        problems.append("no labelled cases; put them into imagesTr and labelsTr")
    has_splits = any(case.split for case in dataset.cases)
    for case in dataset.cases:
        if strange := [n for n in (*(case.annotated or ()), *case.truncated) if n != str(n)]:
            problems.append(f"{case.id}: {strange} are not names of classes; correct them")
            continue
        if case.split not in SPLITS and (case.split or has_splits):
            problems.append(f"{case.id} has split {case.split!r}; give {', '.join(SPLITS)}")
        if not case.images:
            problems.append(f"{case.id} has no image; name one")
        problems += [
            f"{path} is missing; copy it or remove {case.id}"
            for path in (*case.images, *case.label_files)
            if not path.is_file()
        ]
        named = (*(case.annotated or ()), *case.truncated)
        if unknown := [name for name in named if name not in dataset.targets]:
            problems.append(
                f"{case.id}: {unknown} are not classes of this set; correct dataset.json"
            )
    times = Counter(case.id for case in dataset.cases)
    problems += [f"{name} is listed {n} times; keep one" for name, n in times.items() if n > 1]
    if problems:
        raise DatasetError(f"{folder} cannot be used:", problems)
    return replace(dataset, cases=tuple(sorted(dataset.cases, key=lambda case: case.id)))
