"""Layouts of data sets without a description: where the files lie, in a flat YAML file.

Challenges publish their data in a layout of their own. A `Layout` names it by patterns relative to
the folder: ``{case}`` is the id of a case and may come several times, ``{class}`` a class where
every class has a mask of its own, ``{split}`` one of two folder names, ``*`` anything.
recipes/layouts/ holds those of public challenges.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sammed3d_backbone import config
from sammed3d_backbone.data.datasets import Case, Dataset, class_names, read_table

SPLITS = ("train", "val")  # what {split} stands for
PLACEHOLDERS = ("case", "class", "split")


@dataclass(frozen=True)
class Layout:
    """The folder structure of one data set and the meaning of its label values."""

    name: str  # as in published lists of pretraining sets
    channels: tuple[str, ...]
    classes: tuple[str, ...]  # without background; numbered 1, 2, ... in this order
    images: tuple[str, ...]  # a pattern per channel, or one for a file that holds all of them
    label: str  # a pattern; with {class}, files of 0 and 1, where a later class wins
    values: tuple[int, ...] = ()  # values of the classes in the files; 1, 2, ... if left out
    cases: str = ".+"  # regular expression; ids that do not match are skipped
    subject: str = "(.+)"  # regular expression on the id; its group is the subject
    splits: tuple[str, ...] = ()  # folder names of training and validation for {split}
    split_table: str | None = None  # CSV with columns image_id and split: train, val, test
    group: str = ""  # name shared by sets that a paper reports together
    note: str = ""  # caveat for readers of results
    citation: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        patterns = (*self.images, self.label)
        if missing := [pattern for pattern in patterns if "{case}" not in pattern]:
            raise ValueError(
                f"{missing[0]!r} has no {{case}}; put {{case}} where the id of a case stands"
            )
        named = {name for pattern in patterns for name in re.findall(r"\{(\w*)\}", pattern)}
        if unknown := sorted(named - {*PLACEHOLDERS}):
            raise ValueError(
                f"unknown placeholder {{{unknown[0]}}}; known: {', '.join(PLACEHOLDERS)}"
            )
        if len(self.images) not in (1, len(self.channels)):
            raise ValueError(
                f"{len(self.images)} patterns in images for {len(self.channels)} channels; give "
                "one for each, or one for a file that holds all"
            )
        if self.values and len({0, *self.values}) != 1 + len(self.classes):
            raise ValueError(
                f"values={list(self.values)}; give {len(self.classes)} different ones, none of "
                "them 0"
            )
        if rooted := [pattern for pattern in patterns if Path(pattern).is_absolute()]:
            raise ValueError(f"{rooted[0]!r} is absolute; give it relative to the folder")
        if any("{split}" in pattern for pattern in patterns) != (len(self.splits) == len(SPLITS)):
            raise ValueError(
                f"splits={list(self.splits)}; give what {{split}} stands for in training and in "
                "validation, or neither"
            )
        for expression in (self.cases, self.subject):
            try:
                groups = re.compile(expression).groups
            except re.error as error:
                raise ValueError(f"{expression!r} is not a regular expression ({error})") from None
        if not groups:
            raise ValueError(f"subject={self.subject!r} has no group; put the subject into ( )")


def read_layout(path: Path) -> Layout:
    """The layout in a YAML file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no layout at {path}; pass one of recipes/layouts/*.yaml")
    return config.load(Layout, path)


def read_described(folder: Path, layout: Layout, problems: list[str]) -> Dataset:
    """The data set of a folder as the layout describes it."""
    splits = _split_table(folder, layout, problems)
    cases = []
    for name, split in sorted(_ids(folder, layout)):
        images = [_fill(folder, pattern, name, split, "", problems) for pattern in layout.images]
        masks: tuple[Path, ...] = ()
        if "{class}" in layout.label:
            masks = tuple(
                _fill(folder, layout.label, name, split, one, problems) for one in layout.classes
            )
            label = masks[0].parent
        else:
            label = _fill(folder, layout.label, name, split, "", problems)
        subject = re.fullmatch(layout.subject, name)
        if subject is None:
            problems.append(f"{name} does not match subject {layout.subject!r}; correct the layout")
        if splits and name not in splits:
            problems.append(f"{name} is not in {layout.split_table}; add it or remove the case")
        cases.append(
            Case(
                id=name,
                images=tuple(images),
                label=label,
                masks=masks,
                values=layout.values,
                subject=subject[1] if subject else "",
                split=splits.get(name, SPLITS[layout.splits.index(split)] if split else ""),
            )
        )
    if not cases:
        problems.append(
            f"nothing in {folder} looks like {layout.images[0]} or {layout.label} ({layout.name}); "
            "pass the folder that these start from"
        )
    return Dataset(
        name=layout.name,
        folder=folder,
        labels=class_names(enumerate(("background", *layout.classes)), problems),
        channels=layout.channels,
        cases=tuple(cases),
        note=layout.note,
        about={"reference": layout.citation, "licence": layout.licence},
    )


def _ids(folder: Path, layout: Layout) -> set[tuple[str, str]]:
    """Id and {split} of every case that has its first image or its label."""
    patterns = [layout.images[0]]
    if "{class}" not in layout.label:
        patterns.append(layout.label)
    return {match for pattern in patterns for match in _matches(folder, pattern, layout)}


def _matches(folder: Path, pattern: str, layout: Layout) -> Iterator[tuple[str, str]]:
    """Id and {split} of every file of a pattern."""
    expression, seen = "", set()
    for part in re.split(r"(\{case\}|\{split\}|\*)", pattern):
        group = part.strip("{}")
        if part == "*":
            expression += "[^/]*"
        elif part not in ("{case}", "{split}"):
            expression += re.escape(part)
        elif group in seen:
            expression += f"(?P={group})"
        else:
            seen.add(group)
            expression += f"(?P<{group}>[^/]+)"
    for path in folder.glob(re.sub(r"(\{\w+\}|\*)+", "*", pattern)):
        match = re.fullmatch(expression, path.relative_to(folder).as_posix())
        if match is None or path.name.startswith("."):
            continue
        split = match.groupdict().get("split", "")
        if re.fullmatch(layout.cases, match["case"]) and split in (*layout.splits, ""):
            yield match["case"], split


def _fill(
    folder: Path, pattern: str, case: str, split: str, one_class: str, problems: list[str]
) -> Path:
    """The file of a case; where the pattern has a ``*``, the one that fits."""
    filled = {"case": case, "split": split, "class": one_class}
    name = re.sub(r"\{(\w+)\}", lambda match: filled[match[1]], pattern)
    if "*" not in name:
        return folder / name
    fitting = sorted(folder.glob("*".join(map(glob.escape, name.split("*")))))
    if len(fitting) > 1:
        problems.append(f"{case}: {', '.join(map(str, fitting))} all fit {pattern}; keep one")
    return fitting[0] if fitting else folder / name


def _split_table(folder: Path, layout: Layout, problems: list[str]) -> dict[str, str]:
    """Case -> split, from the layout's table."""
    if layout.split_table is None:
        return {}
    path = folder / layout.split_table
    if not path.is_file():
        problems.append(f"{path} is missing; copy it, or remove split_table from the layout")
        return {}
    rows = read_table(path)
    if not rows or not {"image_id", "split"} <= set(rows[0]):
        problems.append(f"{path} lacks the columns image_id and split; copy it again")
        return {}
    splits: dict[str, str] = {}
    for row in rows:
        if splits.setdefault(row["image_id"], row["split"]) != row["split"]:
            problems.append(f"{path}: {row['image_id']} has two splits; keep one")
    return splits
