"""``dataset.json``: the Medical Segmentation Decathlon, MONAI's lists, nnU-Net's raw folders.

The three differ in who lists the cases (the file, the folder), in the form of "labels", and in
whether channels share a file. They are distinguished by their content, not by a version.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sammed3d_backbone.data.datasets import (
    Case,
    Dataset,
    DatasetError,
    class_names,
    read_json,
    subject_name,
)
from sammed3d_backbone.data.nifti import SUFFIXES
from sammed3d_backbone.files import MAX_NAME_BYTES

DESCRIPTION = "dataset.json"


def read_decathlon(folder: Path, problems: list[str]) -> Dataset:
    """The data set of a folder with a dataset.json.

    Raises:
        DatasetError: If dataset.json is not a JSON object.
    """
    description = folder / DESCRIPTION
    info = read_json(description)
    if not isinstance(info, dict):
        raise DatasetError(f"{description} cannot be used:", ["not a JSON object; correct it"])
    labels, regions, has_ignore = _labels(info, problems)
    channels = _channels(info, problems)
    before = len(problems)
    if isinstance(info.get("dataset"), dict):
        cases = _mapped_cases(folder, info["dataset"], labels, problems)
    elif "training" in info:
        cases = _listed_cases(folder, info, channels, problems)
    else:
        cases = _found_cases(folder, info.get("file_ending", ".nii.gz"), channels, problems)
    declared = info.get("numTraining")
    found = sum(case.split in ("", "train") for case in cases)
    counts = (None, found, len(cases), str(found), str(len(cases)))
    if declared not in counts and len(problems) == before:
        problems.append(
            f'"numTraining" is {declared}, but there are {found} cases; add the missing ones, or '
            "correct it"
        )
    if regions and any(case.annotated is not None for case in cases):
        problems.append('"annotated" cannot be used with regions; leave it out, or label "ignore"')
    about = {key: str(info[key]) for key in ("reference", "licence") if key in info}
    if regions:
        named = (f"{name} = {', '.join(map(str, values))}" for name, values in regions.items())
        about["regions"] = "; ".join(named)
    return Dataset(
        name=str(info.get("name", folder.name)),
        folder=folder,
        labels=labels,
        channels=channels,
        cases=tuple(cases),
        note=str(info.get("note", "")),
        about=about,
        regions=regions,
        has_ignore=has_ignore,
    )


Labels = tuple[dict[int, str], dict[str, tuple[int, ...]], bool]


def _labels(info: Mapping[str, Any], problems: list[str]) -> Labels:
    """Names of the values, regions, and whether the value behind the last one is to be ignored.

    From ``{"0": "background"}`` or nnU-Net 2's ``{"background": 0}``, which may have regions, as
    ``{"tumour": [1, 2], "core": 2}``, and a last value ``"ignore"``.
    """
    given = info.get("labels")
    if not isinstance(given, dict) or not given:
        problems.append('"labels" is missing; name the values, as {"0": "background", "1": ...}')
        return {0: "background"}, {}, False
    before = len(problems)
    words = [word for word in (*given, *given.values()) if isinstance(word, str)]
    if strange := [word for word in words if word.lower() == "ignore" != word]:
        problems.append(
            f'the label {strange[0]!r} may be meant as "ignore"; write it so, or rename'
        )
    regions: dict[str, tuple[int, ...]] = {}
    if any(isinstance(value, list) for value in given.values()):
        regions = _regions(given, problems)
        others = {name: given[name] for name in ("background", "ignore") if name in given}
        given = {**others, **_parts(regions)}
    labels = class_names(map(_value_and_name, given.items()), problems)
    if len(problems) == before and sorted(labels) != list(range(len(labels))):
        problems.append(f"label values {sorted(labels)} have gaps; number them 0, 1, 2, ...")
    has_ignore = "ignore" in labels.values()
    if has_ignore and (labels.pop(max(labels)) != "ignore" or not labels):
        problems.append('the label "ignore" is not the last; give it the highest value')
    return dict(sorted(labels.items())), regions, has_ignore


def _value_and_name(entry: tuple[str, object]) -> tuple[object, object]:
    """Value and name of an entry of either form."""
    key, value = entry
    return (int(key), value) if isinstance(value, str) and key.isdecimal() else (value, key)


def _regions(given: Mapping[str, Any], problems: list[str]) -> dict[str, tuple[int, ...]]:
    """The values of every region."""
    regions = {}
    for name, value in given.items():
        if name.lower() in ("background", "ignore"):
            continue
        values = value if isinstance(value, list) else [value]
        if not values or not all(type(v) is int and v > 0 for v in values):
            problems.append(f"region {name!r}: {value!r} are not values of labels above 0")
        else:
            regions[name] = tuple(dict.fromkeys(values))
    return regions


def _parts(regions: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """A name for each value, after the smallest region that it lies in."""
    parts = {}
    for value in sorted({value for values in regions.values() for value in values}):
        name = min((n for n in regions if value in regions[n]), key=lambda n: len(regions[n]))
        parts[name if len(regions[name]) == 1 else f"{name}, value {value}"] = value
    return parts


def _channels(info: Mapping[str, Any], problems: list[str]) -> tuple[str, ...]:
    """Names in order, from ``{"0": "CT"}`` under "modality" or nnU-Net 2's "channel_names"."""
    named = info.get("channel_names") or info.get("modality") or {"0": "image"}
    if not isinstance(named, dict) or sorted(named) != [str(i) for i in range(len(named))]:
        problems.append('the channels are not numbered; give them as {"0": "T1", "1": "T2"}')
        return ("image",)
    names = tuple(str(named[str(i)]) for i in range(len(named)))
    problems += [
        f"channel {name[:40]!r} has a name of more than {MAX_NAME_BYTES} characters; shorten it"
        for name in names
        if len(name) > MAX_NAME_BYTES
    ]
    return names


def _listed_cases(
    folder: Path, info: Mapping[str, Any], channels: tuple[str, ...], problems: list[str]
) -> list[Case]:
    """The cases of the lists: the Decathlon's, nnU-Net 1's or MONAI's with files per channel.

    Where "validation" lists labels too, as in AMOS, the two lists are the published split.
    """
    validation = [e for e in info.get("validation") or () if isinstance(e, dict) and "label" in e]
    cases = []
    for split, listed in (("train", info["training"]), ("val", validation)):
        for entry in listed:
            if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
                problems.append(f'{entry!r} in "training" lacks "image" or "label"; add both paths')
                continue
            fold = entry.get("fold")
            if fold is not None and (type(fold) is not int or fold < 0):
                problems.append(f'{entry["label"]}: "fold" is {fold!r}; give 0, 1, 2, ...')
                fold = None
            images, label = entry["image"], folder / entry["label"]
            if isinstance(images, list):  # of MONAI's data lists: a file per channel
                stem, files = _split_name(label.name)[0], tuple(folder / path for path in images)
            else:
                image = folder / images
                stem, ending = _split_name(image.name)
                files = _channel_files(image.parent, stem, ending, len(channels))
                if image.is_file() or not any(path.is_file() for path in files):
                    files = (image,)
            cases.append(
                Case(
                    id=stem,
                    images=files,
                    label=label,
                    split=split if validation else "",
                    fold=fold,
                    **_known_facts(stem, entry, problems),
                )
            )
    return cases


def _mapped_cases(
    folder: Path, mapped: Mapping[str, Any], labels: Mapping[int, str], problems: list[str]
) -> list[Case]:
    """The cases of nnU-Net 2's "dataset": case -> its images and label, wherever they lie.

    A case of ours may have "masks" instead of a label: class -> a file of 0 and 1.
    """
    numbers = {name: value for value, name in labels.items()}
    cases = []
    for name, entry in mapped.items():
        is_whole = isinstance(entry, dict) and ("label" in entry or entry.get("masks"))
        if not is_whole or not entry.get("images") or isinstance(entry["images"], str):
            problems.append(f'{name} in "dataset" lacks "images" or "label"; add a list and a path')
            continue
        images = tuple(folder / path for path in entry["images"])
        masks = {of: folder / path for of, path in entry.get("masks", {}).items()}
        if unknown := sorted(set(masks) - set(numbers)):
            problems.append(f"{name}: {unknown} are not classes of this set; correct dataset.json")
            continue
        cases.append(
            Case(
                id=name,
                images=images,
                label=next(iter(masks.values())).parent if masks else folder / entry["label"],
                masks=tuple(masks.values()),
                numbers=tuple(numbers[of] for of in masks),
                split=str(entry.get("split", "")),
                **_known_facts(name, entry, problems),
            )
        )
    return cases


def _found_cases(
    folder: Path, ending: str, channels: tuple[str, ...], problems: list[str]
) -> list[Case]:
    """The cases of nnU-Net 2's folders: imagesTr/CASE_0000.nii.gz, ..., labelsTr/CASE.nii.gz."""
    if ending not in SUFFIXES:
        problems.append(f"files end in {ending}; convert them to .nii.gz")
        return []
    images, labels = folder / "imagesTr", folder / "labelsTr"
    first = f"_0000{ending}"
    stems = {path.name.removesuffix(first) for path in images.glob(f"[!.]*{first}")}
    stems |= {path.name.removesuffix(ending) for path in labels.glob(f"[!.]*{ending}")}
    others = sorted(path for path in labels.glob("[!.]*") if path.is_file())
    if others and not stems:
        problems.append(f'{others[0]} does not end in {ending}, as "file_ending" says; correct it')
    further = f"_{len(channels):04d}{ending}"
    if undeclared := sorted(path.name for path in images.glob(f"[!.]*{further}")):
        problems.append(
            f"{images / undeclared[0]} is channel {len(channels)}, and {len(channels)} are named "
            f"({', '.join(channels)}); name it in channel_names, or move it away"
        )
    return [
        Case(
            id=stem,
            images=_channel_files(images, stem, ending, len(channels)),
            label=labels / f"{stem}{ending}",
        )
        for stem in sorted(stems)
    ]


def _known_facts(name: str, entry: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Fields of a case that both forms of entries may have."""
    facts: dict[str, Any] = {"truncated": tuple(entry.get("truncated", ()))}
    if entry.get("annotated") is not None:
        facts["annotated"] = tuple(entry["annotated"])
    if "subject" in entry:
        facts["subject"] = subject_name(name, entry["subject"], problems)
    return facts


def _channel_files(folder: Path, stem: str, ending: str, channels: int) -> tuple[Path, ...]:
    return tuple(folder / f"{stem}_{channel:04d}{ending}" for channel in range(channels))


def _split_name(name: str) -> tuple[str, str]:
    """``case.nii.gz`` -> ``case``, ``.nii.gz``."""
    ending = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(ending), ending
