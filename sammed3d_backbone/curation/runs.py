"""All cases of a raw folder: in parallel, resumed after an interruption, collected at the end.

    OUT/run.json                 the rules; a folder of other ones is refused
        decisions.jsonl          one line per mask, or per case that was refused
        SET/dataset.json         reads with `read_dataset`, like SET/splits.json where the raw one
                                 has one; SET is where the data set lies in the raw folder
        SET/cases/CASE/          see `cases`

The result does not depend on the number or order of the workers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from sammed3d_backbone.console import progress_bar
from sammed3d_backbone.curation.cases import Decision, curate_case, read_case
from sammed3d_backbone.curation.rules import CurationRules
from sammed3d_backbone.curation.sources import RawSet, read_raw
from sammed3d_backbone.data.bids import split_choice
from sammed3d_backbone.data.datasets import read_json
from sammed3d_backbone.data.layouts import Layout
from sammed3d_backbone.files import locked, write_json, write_text
from sammed3d_backbone.parallel import workers

FORMAT = 1  # version of the result folder; others are refused


def curate(
    raw: Path,
    out: Path,
    rules: CurationRules,
    *,
    jobs: int = 1,
    backend: str = "loky",
    layout: Layout | None = None,
) -> tuple[list[RawSet], list[Decision]]:
    """Curates all cases that are not done yet; returns the raw data sets and all decisions.

    Args:
        raw: Folder of one data set or of several, as for `read_raw`.
        out: Result folder, new or that of an interrupted run.
        rules: Rules for the masks.
        jobs: Number of workers; -1 for all cores.
        backend: See `parallel.workers`.
        layout: Layout of a single data set that does not describe itself.

    Raises:
        FileNotFoundError: If there is no data set.
        ValueError: If a data set cannot be used, `out` lies among the raw data or holds results of
            other rules, or joblib does not know the backend.
        ConnectionError: If no scheduler answers.
    """
    raw, out = raw.absolute(), out.absolute()  # for workers with another current folder
    with workers(backend, jobs):  # refuses a back end before anything is read
        raw_sets = read_raw(raw, layout)
        root = split_choice(raw)[0]
        if out.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{out} lies among the raw data; choose a folder outside of {root}")
        with locked(out):
            _claim(out, rules)
            pending = [
                (one, folder)
                for raw_set in raw_sets
                for folder in [out / raw_set.place / "cases"]
                for one in raw_set.cases
                if read_case(one, folder) is None
            ]
            bar = progress_bar(pending, desc="curating", unit="case")
            Parallel()(delayed(curate_case)(one, folder, rules) for one, folder in bar)
            decisions = [line for raw_set in raw_sets for line in _collect(raw_set, out)]
            write_text(
                out / "decisions.jsonl", "".join(json.dumps(line) + "\n" for line in decisions)
            )
    return raw_sets, decisions


def _claim(out: Path, rules: CurationRules) -> None:
    """Writes the rules into the result folder, or refuses that of another run."""
    header = json.loads(json.dumps({"format": FORMAT, "rules": dataclasses.asdict(rules)}))
    path = out / "run.json"
    if path.is_file():
        if read_json(path) != header:
            raise ValueError(f"{path} is of other rules; choose another folder for the results")
    elif any(not path.name.startswith(".") for path in out.iterdir()):  # the lock, parts of files
        raise ValueError(f"{out} holds other files; choose a new folder for the results")
    write_json(path, header)


def _collect(raw_set: RawSet, out: Path) -> list[Decision]:
    """The decisions on the cases of a set; writes its dataset.json."""
    folder = out / raw_set.place
    decisions: list[Decision] = []
    entries: dict[str, Any] = {}
    for raw in raw_set.cases:
        record = read_case(raw, folder / "cases")
        if record is None:
            raise ValueError(f"{raw.case.id} changed while it was curated; start again")
        shared = {"dataset": raw_set.name, "place": raw_set.place, "case": raw.case.id}
        decisions += [
            {**shared, "modality": raw.modality, **decision} for decision in record["decisions"]
        ]
        kept = {d["class"]: d for d in record["decisions"] if d["mask"]}
        if not kept:
            continue
        entry: dict[str, Any] = {
            "images": [f"cases/{raw.case.id}/{image}" for image in record["images"]],
            "masks": {name: f"cases/{raw.case.id}/{d['mask']}" for name, d in kept.items()},
            "subject": raw.case.subject,
        }
        if raw.case.annotated is not None or len(kept) < len(record["decisions"]):
            entry["annotated"] = list(kept)  # dropped masks are unknown, not background
        if truncated := [n for n, d in kept.items() if d["raw_class"] in raw.case.truncated]:
            entry["truncated"] = truncated
        if raw.case.split:
            entry["split"] = raw.case.split
        entries[raw.case.id] = entry
    if entries:
        _describe(raw_set, folder, entries)
    return decisions


def _describe(raw_set: RawSet, folder: Path, entries: Mapping[str, Any]) -> None:
    """Writes dataset.json, and splits.json without the cases that have gone."""
    classes = dict.fromkeys(name for entry in entries.values() for name in entry["masks"])
    description = {
        "name": raw_set.name,
        "note": raw_set.note,
        **raw_set.about,
        "channel_names": {str(i): name for i, name in enumerate(raw_set.channels)},
        "labels": {"background": 0, **{name: i for i, name in enumerate(classes, start=1)}},
        "dataset": entries,
    }
    write_json(folder / "dataset.json", description)
    source = raw_set.folder / "splits.json"
    if not source.is_file():
        return
    content: Any = read_json(source)
    folds = content["folds"] if isinstance(content, dict) else content
    for fold in folds:
        for part in ("train", "val"):
            fold[part] = [name for name in fold[part] if name in entries]
    write_json(folder / "splits.json", content)
