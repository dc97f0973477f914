"""``labels.json``: a list of single volumes, each with its own names for its label's values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sammed3d_backbone.data.datasets import (
    Case,
    DatasetError,
    LabelledCase,
    class_names,
    read_json,
)

DESCRIPTION = "labels.json"
MAX_VALUE = 2**16 - 1  # of a label; lists are made with an entry for every value up to the largest


def read_singles(folder: Path) -> tuple[LabelledCase, ...]:
    """The volumes of a folder's labels.json: entries of image, label, labels, modality and mask.

    Raises:
        DatasetError: If the file is not of that form.
    """
    path = folder / DESCRIPTION
    entries = read_json(path)
    problems: list[str] = []
    try:
        times = Counter(entry["image"] for entry in entries)  # type: ignore[attr-defined]
        found = tuple(
            LabelledCase(
                case=Case(
                    # An image that is labelled twice does not name its cases.
                    id=Path(entry["image" if times[entry["image"]] == 1 else "label"]).name.split(
                        "."
                    )[0],
                    images=(folder / entry["image"],),
                    label=folder / entry["label"],
                ),
                labels=_labels(entry, problems),
                modality=str(entry.get("modality", "")),
                mask=str(entry.get("mask", "")),
            )
            for entry in entries  # type: ignore[attr-defined]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} cannot be used:",
            [f'{error!r}; give a list of {{"image":, "label":, "labels": {{"1": name}}}}'],
        ) from None
    ids = Counter(one.case.id for one in found)
    problems += [f"{n} volumes would be {name}; rename some" for name, n in ids.items() if n > 1]
    if problems:
        raise DatasetError(f"{path} cannot be used:", problems)
    return found


def _labels(entry: dict[str, Any], problems: list[str]) -> dict[int, str]:
    """Value -> class of one volume, without background."""
    found: list[str] = []
    names = class_names(((int(value), name) for value, name in entry["labels"].items()), found)
    found += [f"label value {value} is above {MAX_VALUE}" for value in names if value > MAX_VALUE]
    problems += [f"{entry['label']}: {problem}" for problem in found]
    return {value: name for value, name in names.items() if value}
