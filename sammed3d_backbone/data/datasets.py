"""Data sets: cases, the meaning of their labels, subjects and folds.

`folders.read_dataset` reads one from a folder; only the small files that name subjects and folds
are opened here.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sammed3d_backbone.data.limits import GRID_TOLERANCE
from sammed3d_backbone.files import MAX_NAME_BYTES, plain_name, read_text, reading

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


class DatasetError(ValueError):
    """Everything wrong with a data set, one line each."""

    def __init__(self, title: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n  ".join([title, *self.problems]))


@dataclass(frozen=True)
class Case:
    """One labelled volume.

    Raises:
        ValueError: If the id cannot be the name of a file.
    """

    id: str
    images: tuple[Path, ...]  # one file per channel, or one file that holds all channels
    label: Path  # one file, or the folder that holds `masks`
    masks: tuple[Path, ...] = ()  # a file per class instead; where two overlap, the later wins
    values: tuple[int, ...] = ()  # values of classes 1, 2, ... in the file; (): 1, 2, ...
    numbers: tuple[int, ...] = ()  # classes of the masks; (): 1, 2, ...
    annotated: tuple[str, ...] | None = None  # annotated classes; None: all
    truncated: tuple[str, ...] = ()  # classes cut off by the volume's border
    subject: str = ""  # id of the subject; the case's own id if it is unknown
    split: str = ""  # "train", "val" or "test" as published
    fold: int | None = None  # of which it is a validation case, as published

    def __post_init__(self) -> None:
        plain_name(self.id, "case id")  # files and folders are named after it
        if not self.subject:
            object.__setattr__(self, "subject", self.id)

    @property
    def label_files(self) -> tuple[Path, ...]:
        """The masks of all classes, or the one file with all of them."""
        return self.masks or (self.label,)


@dataclass(frozen=True)
class LabelledCase:
    """A case with label names and modality of its own, for data sets whose cases differ."""

    case: Case
    labels: Mapping[int, str] | None  # value -> class without background; None: all, by number
    modality: str = ""  # such as "MR T2w"; "" if unknown
    mask: str = ""  # origin of the mask
    channels: int = 1  # of the image


@dataclass(frozen=True)
class Dataset:
    """The cases of one folder and the meaning of their label values."""

    name: str
    folder: Path
    labels: Mapping[int, str]  # 0 is background; values are 0, 1, ..., K - 1
    channels: tuple[str, ...]  # e.g. ("CT",)
    cases: tuple[Case, ...]
    note: str = ""  # caveat for readers of results, printed on the figure
    about: Mapping[str, str] = field(default_factory=dict)  # reference, licence
    grid_tolerance: float = GRID_TOLERANCE  # between image and label, as a share of a voxel
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # nnU-Net's; see `targets`
    has_ignore: bool = False  # voxels of value K are left out of loss and scores

    @property
    def targets(self) -> dict[str, tuple[int, ...]]:
        """What is trained and scored, and its values: the regions if there are any, or classes."""
        if self.regions:
            return dict(self.regions)
        return {name: (value,) for value, name in self.labels.items() if value}

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


def read_fold(dataset: Dataset, fold: int, *, folds: int = 5, seed: int = 0) -> Fold:
    """The fold with a number, counted from 0.

    Raises:
        DatasetError: As for `read_folds`.
        ValueError: If there is no such fold.
    """
    made = read_folds(dataset, folds=folds, seed=seed)
    if not 0 <= fold < len(made):
        raise ValueError(f"fold={fold}: there are {len(made)}, counted from 0")
    return made[fold]


def read_folds(dataset: Dataset, *, folds: int = 5, seed: int = 0) -> list[Fold]:
    """All folds: from splits.json, else as published, else random by subject.

    Args:
        dataset: The data set.
        folds: Number of random splits if neither is given.
        seed: Seed of the random splits.

    Raises:
        DatasetError: If splits.json does not fit the cases, or there are too few cases to split.
    """
    path = dataset.folder / "splits.json"
    if os.path.lexists(path):  # a link to nothing is an error, too
        with reading(path):
            return _read_splits(dataset, path)
    if any(case.split for case in dataset.cases):
        return [_published_split(dataset)]
    if any(case.fold is not None for case in dataset.cases):
        return _published_folds(dataset)
    return _dealt_splits(dataset, folds, seed)


def with_subjects(dataset: Dataset, path: Path) -> Dataset:
    """The data set with the subjects of a JSON file, ``{"case": "subject", ...}``.

    Raises:
        FileNotFoundError: If there is no such file.
        DatasetError: If it does not name a subject for every case.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; pass subjects= a JSON file, case -> subject")
    subjects = read_json(path)
    if not isinstance(subjects, dict):
        raise DatasetError(f"{path} cannot be used:", ['give {"case": "subject", ...}'])
    problems = [
        f"{case.id} has no subject; add it" for case in dataset.cases if case.id not in subjects
    ]
    named = tuple(
        replace(case, subject=subject_name(case.id, subjects[case.id], problems))
        for case in dataset.cases
        if case.id in subjects
    )
    if problems:
        raise DatasetError(f"{path} cannot be used:", problems)
    return replace(dataset, cases=named)


def subject_name(case: str, value: object, problems: list[str]) -> str:
    """A subject as text; a value that names nobody, such as null, is added to the problems."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        problems.append(f"{case} has the subject {value!r}; give a name or a number")
    return str(value)


def class_names(pairs: Iterable[tuple[object, object]], problems: list[str]) -> dict[int, str]:
    """Value -> name of the classes, background among them, as every description declares them.

    Args:
        pairs: Values and names as they were found.
        problems: Gets a line for each value or name that cannot be used, or would win over another.
    """
    names: dict[int, str] = {}
    for value, name in pairs:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            problems.append(f"label {name!r}: {value!r} is not a whole number of 0 or more")
        elif not isinstance(name, str) or not name.strip():
            problems.append(f"label value {value} has the name {name!r}; give it one")
        elif len(name) > MAX_NAME_BYTES or any(0xD800 <= ord(c) < 0xE000 for c in name):
            problems.append(
                f"the name {name[:40]!r} of label value {value} is longer than {MAX_NAME_BYTES} "
                "characters, or has an unpaired surrogate; rename it"
            )
        elif value in names:
            problems.append(f"labels {names[value]!r} and {name!r} both have value {value}")
        else:
            names[value] = name
    if twice := sorted(
        name for name, n in Counter(map(str.strip, names.values())).items() if n > 1
    ):
        problems.append(f"labels {twice} have several values; give one value per class")
    for value, name in names.items():
        if (name.lower() == "background") > (value == 0):
            problems.append(f'the label "background" has value {value}; it must be 0')
    if names.get(0, "background").lower() != "background":
        logger.warning("label value 0 is called %r and is taken as background", names[0])
    return names


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
            f"num_subjects={labels}: the fold has {len(subjects)} subjects to train on; give 1 to "
            f"{len(subjects)}, or null for all"
        )
    chosen = set(subjects[:labels])
    return tuple(name for name in ids if subject_of[name] in chosen)


def require_whole_masks(dataset: Dataset) -> None:
    """Refuses a data set with a label "ignore", of whose structures a part may be missing.

    Raises:
        DatasetError: If it has one.
    """
    if dataset.has_ignore:
        raise DatasetError(
            f"{dataset.folder} cannot be used:",
            [
                'its label "ignore" marks voxels that may belong to any structure, and masks have '
                "to be whole here; finetune_unetr and evaluate.py can use it"
            ],
        )


def read_json(path: Path) -> object:
    """The content of a JSON file."""
    try:
        content: object = json.loads(read_text(path), object_pairs_hook=unique_keys)
        return content
    except RecursionError:
        raise DatasetError(
            f"{path} is not JSON:", ["it is nested too deeply; correct it"]
        ) from None
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON:", [f"{error}; correct it"]) from None


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table whose columns are separated by tabs, semicolons or commas.

    A file that is not text, or not a table, has none.
    """
    try:
        text = read_text(path) if path.is_file() else ""
        head = text.partition("\n")[0]
        delimiter = next((mark for mark in "\t;" if mark in head), ",")
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (ValueError, csv.Error):
        return []


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of its pairs, of which JSON itself would keep the last of one key."""
    if twice := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
        raise ValueError(f"the key {twice[0]!r} occurs twice")
    return dict(pairs)


def _read_splits(dataset: Dataset, path: Path) -> list[Fold]:
    """The folds of a splits.json: a list of train and val ids, or {"rule":, "folds":}."""
    content = read_json(path)
    rule = str(content.get("rule", "")) if isinstance(content, dict) else ""
    entries = content.get("folds") if isinstance(content, dict) else content
    if (
        not isinstance(entries, list)
        or not entries
        or not all(isinstance(entry, dict) and {"train", "val"} <= set(entry) for entry in entries)
    ):
        raise DatasetError(
            f"{path} cannot be used:", ['give a list of {"train": [ids], "val": [ids]}']
        )
    problems, made = [], []
    for number, entry in enumerate(entries):
        fold = Fold(tuple(entry["train"]), tuple(entry["val"]), path.name)
        problems += [f"fold {number} {problem}" for problem in _fold_problems(dataset, fold)]
        made.append(replace(fold, rule=f"{path.name}: {rule}") if rule else fold)
    for name, times in Counter(name for fold in made for name in fold.val).items():
        if times > 1:
            problems.append(f"{name} is in val of {times} folds; keep it in one")
    if problems:
        raise DatasetError(f"{path} cannot be used:", problems)
    return made


def _fold_problems(dataset: Dataset, fold: Fold) -> list[str]:
    """The problems of a split; each follows the split's name in the message."""
    subject_of = {case.id: case.subject for case in dataset.cases}
    train, val = set(fold.train), set(fold.val)
    problems = []
    if unknown := sorted((train | val) - set(subject_of)):
        problems.append(f"names {unknown}, which are not cases; remove them")
    if both := sorted(train & val):
        problems.append(f"has {both} in train and val; keep them in one")
    times = Counter(fold.train) + Counter(fold.val)
    if twice := sorted(name for name, n in times.items() if n > 1 and name not in both):
        problems.append(f"lists {twice} twice; remove one")
    sides = [{subject_of[name] for name in side if name in subject_of} for side in (train, val)]
    if leaks := sorted(set.intersection(*sides) - {subject_of.get(name) for name in both}):
        problems.append(f"has subjects {leaks} in train and val; keep each in one")
    if not train or not val:
        problems.append(f"has {len(train)} train and {len(val)} val cases; split again")
    return problems


def _published_split(dataset: Dataset) -> Fold:
    """The split that came with the data; its test cases stay out."""
    train, val = (
        tuple(case.id for case in dataset.cases if case.split == part) for part in ("train", "val")
    )
    fold = Fold(train, val, "the split that came with the data")
    _require_usable(dataset, fold)
    return fold


def _published_folds(dataset: Dataset) -> list[Fold]:
    """A fold for every number that cases come with, as in MONAI's data lists."""
    made = []
    for number in sorted({-1 if case.fold is None else case.fold for case in dataset.cases}):
        val = tuple(case.id for case in dataset.cases if case.fold == number)
        train = tuple(case.id for case in dataset.cases if case.fold != number)
        made.append(Fold(train, val, f'"fold" {number} of the data\'s own list'))
        _require_usable(dataset, made[-1])
    return made


def _require_usable(dataset: Dataset, fold: Fold) -> None:
    """Refuses a published split with subjects on both sides, or an empty side."""
    if problems := _fold_problems(dataset, fold):
        remedy = f"write {dataset.folder / 'splits.json'} to split in another way"
        raise DatasetError(
            f"the split that came with {dataset.folder} cannot be used:", [*problems, remedy]
        )


def _dealt_splits(dataset: Dataset, folds: int, seed: int) -> list[Fold]:
    """Random folds by subject, in an order that depends on the seed and the names only."""
    from sklearn.model_selection import KFold  # takes a second to import

    subjects = sorted(
        {case.subject for case in dataset.cases},
        key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest(),
    )
    if not 2 <= folds <= len(subjects):
        raise DatasetError(
            f"{dataset.folder} has no splits.json and cannot be split into {folds} folds:",
            [
                f"it has {len(subjects)} subjects; pass folds= between 2 and that, or write "
                "splits.json"
            ],
        )
    rule = (
        f"no splits.json: {folds} random folds by subject in the order of "
        f"sha256('{seed}:<subject>')"
    )
    made = []
    for _, held_out in KFold(folds).split(subjects):
        val = {subjects[i] for i in held_out}
        sides: tuple[list[str], list[str]] = ([], [])
        for case in dataset.cases:
            sides[case.subject in val].append(case.id)
        made.append(Fold(tuple(sorted(sides[0])), tuple(sorted(sides[1])), rule))
    return made
