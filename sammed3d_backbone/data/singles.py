"""``labels.json``: a list of single volumes, each with its own names for its label's values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sammed3d_backbone.data.datasets import Case, DatasetError, LabelledCase, read_json

DESCRIPTION = "labels.json"


def read_singles(folder: Path) -> tuple[LabelledCase, ...]:
    """The volumes of a folder's labels.json: entries of image, label, labels, modality and mask.

    Raises:
        DatasetError: If the file is not of that form.
    """
    path = folder / DESCRIPTION
    entries = read_json(path)
    try:
        times = Counter(entry["image"] for entry in entries)  # type: ignore[attr-defined]
        return tuple(
            LabelledCase(
                case=Case(
                    # An image that is labelled twice does not name its cases.
                    id=Path(entry["image" if times[entry["image"]] == 1 else "label"]).name.split(
                        "."
                    )[0],
                    images=(folder / entry["image"],),
                    label=folder / entry["label"],
                ),
                labels={int(value): str(name) for value, name in entry["labels"].items()},
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
