"""One case: its masks are cleaned, and every decision is recorded.

    CASE/image.nii.gz            a copy of the raw file; image_0000.nii.gz, ... for several channels
         masks/CLASS.nii.gz      0 and 1, on the grid of the image
         decisions.json          the source files, and one entry per mask

The folder appears whole or not at all. A case without any mask left has its record only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from sammed3d_backbone.console import reason
from sammed3d_backbone.curation.rules import ClassMask, CurationRules, without_islands
from sammed3d_backbone.curation.sides import (
    MARGIN_MM,
    centre_mm,
    counterpart,
    is_pair,
    separations_mm,
    split,
)
from sammed3d_backbone.data.checks import label_problems, pair_problems, shift_mm
from sammed3d_backbone.data.datasets import Case, LabelledCase
from sammed3d_backbone.data.limits import value_range
from sammed3d_backbone.data.nifti import SUFFIXES
from sammed3d_backbone.data.preparation import load_image, numbered
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import (
    UNWRITABLE,
    inside,
    read_text,
    reading,
    without_folders,
    write_json,
)

RECORD = "decisions.json"
OWN_FILES = re.compile(r".*\.nii(\.gz)?|.*decisions\.json")  # temporary names among them
Decision = dict[str, Any]


def curate_case(raw: LabelledCase, folder: Path, rules: CurationRules) -> None:
    """Writes the folder of a case."""
    final = inside(folder, raw.case.id)
    staging = final.with_name(f".{final.name}.partial")  # no case has such an id
    for earlier in (staging, final):
        _remove_case(earlier)
    staging.mkdir(parents=True)
    try:
        decisions = _decide(raw, rules, staging)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise  # of the disk, not of the case
        _remove_case(staging / "masks")
        why = without_folders(reason(error), (*raw.case.images, *raw.case.label_files))
        refused = {"verdict": "refused", "why": [why], "steps": {}}
        decisions = [{"class": None, "raw_class": None, "mask": None, **refused}]
    images = []
    if any(decision["mask"] for decision in decisions):
        for number, path in enumerate(raw.case.images):
            numbered = f"_{number:04d}" if len(raw.case.images) > 1 else ""
            ending = next(suffix for suffix in SUFFIXES if path.name.endswith(suffix))
            images.append(f"image{numbered}{ending}")
            shutil.copyfile(path, staging / images[-1])
    record = {"made_of": _made_of(raw), "images": images, "decisions": decisions}
    write_json(staging / RECORD, record)
    staging.rename(final)


def read_case(raw: LabelledCase, folder: Path) -> dict[str, Any] | None:
    """The record of a case; None if it is not done, or was made of files that changed since."""
    path = inside(folder, raw.case.id) / RECORD
    if not path.is_file():
        return None
    with reading(path):
        record: dict[str, Any] = json.loads(read_text(path))
        return record if record["made_of"] == _made_of(raw) else None


def _remove_case(folder: Path) -> None:
    """Removes an earlier folder of a case, if it holds what `curate_case` writes and nothing else.

    Raises:
        FileExistsError: If it is not a folder, or holds anything else; nothing is removed then.
    """
    if not os.path.lexists(folder):
        return
    folders = [path for path in (folder / "masks", folder) if path.is_dir()]
    files = [path for one in folders for path in one.iterdir() if path not in folders]
    strange = [path for path in files if not path.is_file() or not OWN_FILES.fullmatch(path.name)]
    if folder not in folders or any(path.is_symlink() for path in folders) or strange:
        found = strange[0] if strange else folder
        raise FileExistsError(f"{found} was not written by curate; move it out of {folder.parent}")
    for path in files:
        path.unlink()
    for path in folders:
        path.rmdir()


def open_grid(raw: LabelledCase) -> Volume:
    """Grid and header of a case's image, without the memory of its voxels.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If the image cannot be used; says what to do.
    """
    case = raw.case
    image = load_image(case)
    if image.channels != raw.channels:
        raise ValueError(
            f"{case.images[0]}: {image.channels} channels, but {raw.channels} are named; correct "
            "one of them"
        )
    try:
        value_range(image.array)
    except ValueError as error:
        raise ValueError(f"{case.images[0]}: {error}") from None
    return dataclasses.replace(image, array=np.broadcast_to(np.uint8(0), image.shape))


def raw_targets(raw: LabelledCase, grid: Volume) -> Iterator[tuple[ClassMask, float]]:
    """The raw masks of a case, one at a time, and the distance in mm of each from the grid.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a file cannot be used; says what to do.
    """
    case, labels_of = raw.case, raw.labels or {}
    known = (0, 1) if case.masks else (0, *(case.values or labels_of))
    is_empty = True
    for index, path in enumerate(case.label_files):
        stored = Volume.load(path)
        problems = label_problems(path, stored, known)
        problems += pair_problems(path, stored, case.images[0], grid)
        if problems:
            raise ValueError("; ".join(problems))
        apart_mm = shift_mm(stored, grid)
        labels = stored.array.astype(np.int32) if case.masks else numbered(case, stored).array
        del stored  # a large volume takes four bytes per voxel
        for value, box in enumerate(ndimage.find_objects(labels), start=1):
            if box is not None:
                is_empty = False
                number = (case.numbers or (*labels_of,))[index] if case.masks else value
                x, y, z = (int(side.start) for side in box)
                yield ClassMask(labels_of[number], labels[box] == value, (x, y, z)), apart_mm
    if is_empty:
        raise ValueError(f"{case.label}: holds background only; there is no mask to be made of it")


def _decide(raw: LabelledCase, rules: CurationRules, staging: Path) -> list[Decision]:
    """Judges all masks of a case and writes those that stay."""
    grid = open_grid(raw)
    annotated = raw.case.annotated
    decisions: dict[str, Decision] = {}
    x_mm: dict[str, float] = {}
    for found, apart_mm in raw_targets(raw, grid):
        halves = split(found, grid.affine) if is_pair(found.name) else None
        for target in halves or (found,):
            decision, cleaned = _judge(target, grid, rules)
            steps = decision["steps"]
            steps["grid"] = {"did": "changed" if apart_mm else "kept", "shift_mm": apart_mm}
            if is_pair(found.name):
                steps["sides"] = {"did": "changed" if halves else "kept", "is_split": bool(halves)}
            if annotated is not None and found.name not in annotated:
                steps["annotation"] = {"did": "dropped"}
                decision["why"].append("not annotated in this case")
            mask = _mask_name(target.name, decisions, raw.case)
            decisions[target.name] = {
                "class": target.name,
                "raw_class": found.name,
                "mask": mask,
                **decision,
            }
            x_mm[target.name] = float(centre_mm(target, grid.affine)[0])
            if not decision["why"]:
                cleaned.on(grid).save(staging / mask)
    _check_sides(decisions, x_mm)
    for decision in decisions.values():
        did = {step["did"] for step in decision["steps"].values()}
        decision["verdict"] = next((v for v in ("dropped", "changed") if v in did), "kept")
        if decision["verdict"] == "dropped":
            (staging / decision["mask"]).unlink(missing_ok=True)
            decision["mask"] = None
    return list(decisions.values())


def _mask_name(name: str, decisions: Mapping[str, Decision], case: Case) -> str:
    """The file of a class in the folder of its case.

    Raises:
        ValueError: If another class has that file.
    """
    mask = "masks/" + re.sub(r"[^\w.-]", "_", name) + ".nii.gz"
    for other, decision in decisions.items():
        if decision["mask"] == mask:
            raise ValueError(
                f"{case.label}: {other!r} and {name!r} would both be written to {mask}; rename "
                "one class"
            )
    return mask


def _judge(target: ClassMask, grid: Volume, rules: CurationRules) -> tuple[Decision, ClassMask]:
    """The decision on one mask by itself, and the mask without islands."""
    cleaned, islands = without_islands(target, rules, grid.voxel_ml)
    extent = cleaned.extent(grid)
    reasons = {"size": rules.small(extent), "background": rules.sparse(extent)}
    steps: dict[str, dict[str, Any]] = {
        "islands": islands,
        **{name: {"did": "dropped" if why else "kept"} for name, why in reasons.items()},
    }
    decision = {
        "why": [why for why in reasons.values() if why],
        "extent": dataclasses.asdict(extent),
        "steps": steps,
    }
    return decision, cleaned


def _check_sides(decisions: dict[str, Decision], x_mm: dict[str, float]) -> None:
    """Drops pairs of which the left one lies to the right of the right one.

    Either the names or the affine may be wrong, so neither is corrected here.
    """
    separations = separations_mm(x_mm)
    wrong = [name for name, apart_mm in separations.items() if apart_mm < -MARGIN_MM]
    for name, apart_mm in separations.items():
        step = decisions[name]["steps"].setdefault("sides", {"did": "kept"})
        step["right_minus_left_mm"] = apart_mm
        if name in wrong:
            step["did"] = "dropped"
            remedy = "correct its name" if len(wrong) < len(separations) else "correct the affine"
            decisions[name]["why"].append(
                f"lies {-apart_mm:.3g} mm on the wrong side of {counterpart(name)!r}, as do "
                f"{len(wrong)} of {len(separations)} classes with a side here; {remedy}"
            )


def _made_of(raw: LabelledCase) -> list[list[str | int]]:
    """Name, bytes and time of change of the files of a case; a file that has gone has none."""
    files = dict.fromkeys((*raw.case.images, *raw.case.label_files))
    found = [(file.name, file.stat() if file.is_file() else None) for file in files]
    return [[name, it.st_size, it.st_mtime_ns] if it else [name, -1, -1] for name, it in found]
