"""A data set's folder -> the list of its cases, what its labels mean, and its folds.

Reads the Medical Segmentation Decathlon's ``dataset.json`` and nnU-Net's raw folders, versions 1
and 2, by what they hold; no case is opened here. `label_problems` and `pair_problems` say what is
wrong with a case once it is open.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sammed3d_backbone.data.volume import SUFFIXES, Volume

DATA_VARIABLE = "SAMMED3D_DATA"
DEFAULT_DATA = "../shared/data"
AFFINE_TOLERANCE_MM = 1e-2  # origins written by different tools differ in the fourth decimal


class DatasetError(ValueError):
    """Everything wrong with a data set, one line each."""

    def __init__(self, title: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n  ".join([title, *self.problems]))


@dataclass(frozen=True)
class Case:
    """One labelled volume."""

    id: str
    images: tuple[Path, ...]  # one file per channel, or one file that holds all channels
    label: Path
    annotated: tuple[str, ...] | None = None  # classes that were looked for; None: all
    truncated: tuple[str, ...] = ()  # classes that go on beyond the volume
    subject: str = ""  # whose scan it is; the case's own id where nothing tells

    def __post_init__(self) -> None:
        if not self.subject:
            object.__setattr__(self, "subject", self.id)


@dataclass(frozen=True)
class Dataset:
    """The cases of one folder and what their numbers mean."""

    name: str
    folder: Path
    labels: Mapping[int, str]  # 0 is background; values are 0, 1, ..., K - 1
    channels: tuple[str, ...]  # e.g. ("CT",)
    cases: tuple[Case, ...]
    note: str = ""  # what a reader of a result must know, printed on the figure
    about: Mapping[str, str] = field(default_factory=dict)  # reference, licence

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes without background, in the order of their values."""
        return tuple(self.labels[value] for value in range(1, len(self.labels)))


@dataclass(frozen=True)
class Fold:
    """Case ids of one split, and the rule that made it."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    rule: str


def find_dataset(data: str) -> Path:
    """The folder of a data set: as given, or of that name below SAMMED3D_DATA.

    Raises:
        FileNotFoundError: If neither has a dataset.json.
    """
    places = [Path(data).expanduser()]
    if not places[0].is_absolute():
        places.append(Path(os.environ.get(DATA_VARIABLE, DEFAULT_DATA)).expanduser() / data)
    for place in places:
        if (place / "dataset.json").is_file():
            return place
    raise FileNotFoundError(
        f"no dataset.json in {' or '.join(map(str, places))}; pass data=FOLDER (Decathlon or "
        f"nnU-Net raw layout), or set {DATA_VARIABLE} to the folder that holds {data}"
    )


def read_dataset(folder: str | Path) -> Dataset:
    """The data set in a Decathlon or nnU-Net raw folder.

    Raises:
        FileNotFoundError: If the folder holds no dataset.json.
        DatasetError: If the description or the files it names are not usable; all reasons at once.
    """
    folder = Path(folder)
    description = folder / "dataset.json"
    if not description.is_file():
        raise FileNotFoundError(f"no dataset.json in {folder}; pass the folder that holds it")
    info = _read_json(description)
    if not isinstance(info, dict):
        raise DatasetError(f"{description} cannot be used:", ["it is no JSON object; mend it"])
    problems: list[str] = []
    labels = _labels(info, problems)
    channels = _channels(info, problems)
    if "training" in info:
        cases = _listed_cases(folder, info["training"], channels, problems)
    else:
        cases = _found_cases(folder, info.get("file_ending", ".nii.gz"), channels, problems)
    if not cases and not problems:
        problems.append(f"no labelled cases: put them into {folder}/imagesTr and labelsTr")
    for case in cases:
        unknown = [
            c for c in (*(case.annotated or ()), *case.truncated) if c not in labels.values()
        ]
        if unknown:
            problems.append(f"{case.id}: {unknown} are no classes of this set; mend dataset.json")
    ids = [case.id for case in cases]
    problems.extend(
        f"{i} is listed twice; remove one" for i in sorted({i for i in ids if ids.count(i) > 1})
    )
    if problems:
        raise DatasetError(f"{description} cannot be used:", problems)
    return Dataset(
        name=str(info.get("name", folder.name)),
        folder=folder,
        labels=labels,
        channels=channels,
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        note=str(info.get("note", "")),
        about={key: str(info[key]) for key in ("reference", "licence") if key in info},
    )


def read_fold(dataset: Dataset, fold: int, *, folds: int = 5, seed: int = 0) -> Fold:
    """Fold number `fold`: from the data set's splits.json, otherwise dealt by case.

    Args:
        dataset: The data set.
        fold: Counted from 0.
        folds: How many to deal where there is no splits.json.
        seed: Of the dealing.

    Raises:
        DatasetError: If splits.json does not fit the cases, or there are too few cases to split.
        ValueError: If there is no such fold.
    """
    path = dataset.folder / "splits.json"
    is_given = path.is_file()
    made = _read_splits(dataset, path) if is_given else _dealt_splits(dataset, folds, seed)
    if not 0 <= fold < len(made):
        raise ValueError(f"fold={fold}: there are {len(made)}, counted from 0")
    return made[fold]


def with_subjects(dataset: Dataset, path: Path) -> Dataset:
    """The data set with the subjects of a JSON file, ``{"case": "subject", ...}``.

    Raises:
        FileNotFoundError: If there is no such file.
        DatasetError: If it does not name a subject for every case.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; pass subjects= a JSON file, case -> subject")
    subjects = _read_json(path)
    if not isinstance(subjects, dict):
        raise DatasetError(f"{path} cannot be used:", ['give {"case": "subject", ...}'])
    problems = [
        f"{case.id} has no subject; add it" for case in dataset.cases if case.id not in subjects
    ]
    if problems:
        raise DatasetError(f"{path} cannot be used:", problems)
    named = tuple(replace(case, subject=str(subjects[case.id])) for case in dataset.cases)
    return replace(dataset, cases=named)


def few_subjects(dataset: Dataset, ids: Sequence[str], labels: int, seed: int) -> tuple[str, ...]:
    """The cases of `labels` subjects among the given cases, in the given order.

    Subsets of one seed are nested: more labels keep the subjects of fewer.

    Raises:
        ValueError: If there are not that many subjects.
    """
    subject_of = {case.id: case.subject for case in dataset.cases}
    subjects = sorted(
        {subject_of[name] for name in ids},
        key=lambda subject: hashlib.sha256(f"{seed}:{subject}".encode()).hexdigest(),
    )
    if not 1 <= labels <= len(subjects):
        raise ValueError(
            f"labels={labels}: the fold has {len(subjects)} subjects to train on; give 1 to "
            f"{len(subjects)}, or null for all"
        )
    chosen = set(subjects[:labels])
    return tuple(name for name in ids if subject_of[name] in chosen)


def label_problems(path: Path, label: Volume, labels: Mapping[int, str]) -> list[str]:
    """What is wrong with an opened label volume, in sentences with its path."""
    values = np.unique(label.array)
    if not np.isfinite(values).all() or (values != np.round(values)).any():
        return [f"{path}: labels are not whole numbers; save them as integers"]
    if label.array.ndim != 3:
        return [f"{path}: labels have {label.channels} channels; save one integer volume"]
    strange = sorted({int(value) for value in values} - set(labels))
    if strange:
        return [f"{path}: values {strange} are not in dataset.json ({sorted(labels)}); add or mend"]
    if not values.any():
        return [f"{path}: holds background only; remove the case or label it"]
    return []


def pair_problems(path: Path, image: Volume, label: Volume) -> list[str]:
    """What keeps an image and its label from lying on one grid, in sentences with the path."""
    if image.shape != label.shape:
        return [f"{path}: shape {image.shape}, but its label has {label.shape}; resample one"]
    shift = float(np.abs(_corners(image) - _corners(label)).max())
    if shift > AFFINE_TOLERANCE_MM:
        return [f"{path}: lies up to {shift:.3g} mm away from its label; mend one affine"]
    if not np.isfinite(image.array).all():
        return [f"{path}: holds NaN or infinity; replace those voxels"]
    return []


def _corners(volume: Volume) -> np.ndarray[Any, np.dtype[np.float64]]:
    """World coordinates of the eight corner voxels, (8, 3)."""
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(volume.shape) - 1
    world: np.ndarray[Any, np.dtype[np.float64]] = (corners @ volume.affine.T)[:, :3]
    return world


def _read_json(path: Path) -> object:
    """The content of a JSON file."""
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
        return content
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not JSON:", [f"{error}; mend it"]) from None


def _labels(info: Mapping[str, Any], problems: list[str]) -> dict[int, str]:
    """Value -> name, from ``{"0": "background"}`` or nnU-Net 2's ``{"background": 0}``."""
    given = info.get("labels")
    if not isinstance(given, dict) or not given:
        problems.append('"labels" is missing; name the values, as {"0": "background", "1": ...}')
        return {0: "background"}
    labels: dict[int, str] = {}
    for key, value in given.items():
        if isinstance(value, int):
            labels[value] = str(key)
        elif isinstance(value, str) and str(key).isdigit():
            labels[int(key)] = value
        else:
            problems.append(
                f"label {key!r}: {value!r} is a region or no number; give one value per class"
            )
    if "ignore" in labels.values():
        problems.append('the label "ignore" is not supported; give those cases as "annotated"')
    if not problems and sorted(labels) != list(range(len(labels))):
        problems.append(f"label values {sorted(labels)} have gaps; number them 0, 1, 2, ...")
    return dict(sorted(labels.items()))


def _channels(info: Mapping[str, Any], problems: list[str]) -> tuple[str, ...]:
    """Names in order, from ``{"0": "CT"}`` under "modality" or nnU-Net 2's "channel_names"."""
    named = info.get("channel_names") or info.get("modality") or {"0": "image"}
    if not isinstance(named, dict) or sorted(named) != [str(i) for i in range(len(named))]:
        problems.append('the channels are not numbered; give them as {"0": "T1", "1": "T2"}')
        return ("image",)
    return tuple(str(named[str(i)]) for i in range(len(named)))


def _listed_cases(
    folder: Path, listed: list[Any], channels: tuple[str, ...], problems: list[str]
) -> list[Case]:
    """The cases of a "training" list: the Decathlon's, or nnU-Net 1's with files per channel."""
    cases = []
    for entry in listed:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            problems.append(f'{entry!r} in "training" lacks "image" or "label"; add both paths')
            continue
        image, label = folder / entry["image"], folder / entry["label"]
        stem, ending = _split_name(image.name)
        images: tuple[Path, ...] = (image,)
        if not image.is_file():
            per_channel = _channel_files(image.parent, stem, ending, len(channels))
            if all(path.is_file() for path in per_channel):
                images = per_channel
            else:
                problems.append(f"{image} is missing; copy it or remove the case")
        if not label.is_file():
            problems.append(f"{label} is missing; copy it or remove the case")
        annotated = entry.get("annotated")
        cases.append(
            Case(
                id=stem,
                images=images,
                label=label,
                annotated=None if annotated is None else tuple(annotated),
                truncated=tuple(entry.get("truncated", ())),
                subject=str(entry.get("subject", "")),
            )
        )
    return cases


def _found_cases(
    folder: Path, ending: str, channels: tuple[str, ...], problems: list[str]
) -> list[Case]:
    """The cases of nnU-Net 2's folders: labelsTr/CASE.nii.gz, imagesTr/CASE_0000.nii.gz, ..."""
    if ending not in SUFFIXES:
        problems.append(f"files end in {ending}; convert them to .nii.gz")
        return []
    cases = []
    for label in sorted((folder / "labelsTr").glob(f"[!.]*{ending}")):
        stem, _ = _split_name(label.name)
        images = _channel_files(folder / "imagesTr", stem, ending, len(channels))
        problems.extend(
            f"{path} is missing; copy it or remove the case"
            for path in images
            if not path.is_file()
        )
        cases.append(Case(id=stem, images=images, label=label))
    return cases


def _channel_files(folder: Path, stem: str, ending: str, channels: int) -> tuple[Path, ...]:
    return tuple(folder / f"{stem}_{channel:04d}{ending}" for channel in range(channels))


def _split_name(name: str) -> tuple[str, str]:
    """``case.nii.gz`` -> ``case``, ``.nii.gz``."""
    ending = next((suffix for suffix in sorted(SUFFIXES, key=len) if name.endswith(suffix)), "")
    return name[: len(name) - len(ending)], ending


def _read_splits(dataset: Dataset, path: Path) -> list[Fold]:
    """The folds of a splits.json: a list of train and val ids, or {"rule":, "folds":}."""
    content = _read_json(path)
    rule = str(content.get("rule", "")) if isinstance(content, dict) else ""
    entries = content.get("folds") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and {"train", "val"} <= set(entry) for entry in entries
    ):
        raise DatasetError(
            f"{path} cannot be used:", ['give a list of {"train": [ids], "val": [ids]}']
        )
    known = {case.id for case in dataset.cases}
    problems, made = [], []
    for number, entry in enumerate(entries):
        train, val = tuple(entry["train"]), tuple(entry["val"])
        unknown = sorted({*train, *val} - known)
        both = sorted(set(train) & set(val))
        if unknown:
            problems.append(f"fold {number} names {unknown}, which are no cases; remove them")
        if both:
            problems.append(f"fold {number} has {both} in train and val; keep them in one")
        if not train or not val:
            problems.append(
                f"fold {number} has {len(train)} train and {len(val)} val cases; deal again"
            )
        made.append(Fold(train, val, f"{path.name}: {rule}" if rule else path.name))
    if problems:
        raise DatasetError(f"{path} cannot be used:", problems)
    return made


def _dealt_splits(dataset: Dataset, folds: int, seed: int) -> list[Fold]:
    """Folds dealt by case, in an order that depends on the seed and the ids only."""
    from sklearn.model_selection import KFold  # takes a second to import

    ids = sorted(
        (case.id for case in dataset.cases),
        key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest(),
    )
    if not 2 <= folds <= len(ids):
        raise DatasetError(
            f"{dataset.folder} has no splits.json and cannot be dealt into {folds} folds:",
            [f"it has {len(ids)} cases; pass folds= between 2 and that, or write splits.json"],
        )
    rule = (
        f"no splits.json: dealt by case into {folds} folds in the order of sha256('{seed}:<case>')"
    )
    return [
        Fold(tuple(sorted(ids[i] for i in train)), tuple(sorted(ids[i] for i in val)), rule)
        for train, val in KFold(folds).split(ids)
    ]
