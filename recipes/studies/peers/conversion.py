"""A data set as the folders that the arms of the peers study read; no voxel is resampled.

`raw` is nnU-Net's own format with the training cases in imagesTr and labelsTr and the test cases in
imagesTs and labelsTs. `all` names the same files, with the test cases as the published validation
split, for our recipe.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sammed3d_backbone.data.datasets import Dataset, Fold
from sammed3d_backbone.data.preparation import load_label
from sammed3d_backbone.files import write_json

RAW = "raw/Dataset001_Peers"
ENDING = ".nii.gz"


def convert(dataset: Dataset, fold: Fold, folder: Path, classes: Sequence[str] = ()) -> None:
    """Writes both folders; images are linked, labels too unless classes are left out.

    Args:
        dataset: The data set.
        fold: Its training cases, and as `val` its test cases.
        folder: Gets `raw` and `all`.
        classes: The classes to keep, numbered in this order; the others become background. Empty
            for all.

    Raises:
        ValueError: If a class is unknown, or not annotated in every case.
    """
    kept = tuple(classes) or dataset.classes
    numbers = {name: value for value, name in dataset.labels.items()}
    if unknown := sorted({*kept} - {*dataset.classes}):
        raise ValueError(f"classes {unknown} are not in {dataset.name}: {list(dataset.classes)}")
    raw, entries = folder / RAW, {}
    cases = {case.id: case for case in dataset.cases}
    for split, suffix, ids in (("train", "Tr", fold.train), ("val", "Ts", fold.val)):
        for name in ids:
            case = cases[name]
            if case.annotated is not None and (lost := {*kept} - {*case.annotated}):
                raise ValueError(f"{name}: {sorted(lost)} not annotated; leave out these classes")
            images = [
                raw / f"images{suffix}" / f"{name}_{channel:04d}{ENDING}"
                for channel in range(len(case.images))
            ]
            for source, target in zip(case.images, images, strict=True):
                _link(source, target)
            label = raw / f"labels{suffix}" / f"{name}{ENDING}"
            if kept == dataset.classes:
                _link(case.label, label)
            else:
                label.parent.mkdir(parents=True, exist_ok=True)
                new = np.zeros(len(dataset.labels), np.uint8)
                new[[numbers[each] for each in kept]] = range(1, len(kept) + 1)
                volume = load_label(case)
                replace(volume, array=new[volume.array]).save(label)
            entries[name] = {
                "images": [os.path.relpath(path, folder / "all") for path in images],
                "label": os.path.relpath(label, folder / "all"),
                "split": split,
                "subject": case.subject,
                "truncated": [each for each in case.truncated if each in kept],
            }
    about = {
        "name": dataset.name,
        "channel_names": {str(n): name for n, name in enumerate(dataset.channels)},
        "labels": {"background": 0, **{name: n for n, name in enumerate(kept, 1)}},
        "file_ending": ENDING,
    }
    (folder / "all").mkdir(parents=True, exist_ok=True)
    write_json(folder / "all/dataset.json", {**about, "dataset": entries})
    write_json(raw / "dataset.json", {**about, "numTraining": len(fold.train)})


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.name.endswith(ENDING):
        raise ValueError(f"{source} does not end in {ENDING}, as nnU-Net's folder needs it")
    target.unlink(missing_ok=True)
    target.symlink_to(source.resolve())
