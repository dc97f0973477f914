"""Files and tables of studies: runs.csv, scores.csv, and their intervals as tables.

runs.csv has a row per run: its name, settings, cost, and what produced it. scores.csv has the rows
of all runs, with a column `run`. Tables and figures are made of these two files alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sammed3d_backbone.evaluation.statistics import Interval, bootstrap_interval
from sammed3d_backbone.files import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")
TEXT = dict.fromkeys(("run", "task", "labels", "arm", "config", "commit", "subject"), str)


def load(cls: type[S], path: Path) -> S:
    """A study from the YAML file that states its fields.

    Raises:
        ValueError: If a key is unknown or missing.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {field.name: field for field in fields(cls)}
    required = {
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING
    }
    if wrong := ({*values} - {*known}) | (required - {*values}):
        raise ValueError(f"{path}: unknown or missing keys {sorted(wrong)}; known: {[*known]}")
    return cls(**values)


def digest(values: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that identify a configuration."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def made(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of runs.csv that say when, where and by which code a run was made."""
    keys = ("date", "commit", "processor", "accelerator", "threads", "torch")
    return {key: provenance.get(key) for key in keys}


def read(folder: Path, name: str) -> pd.DataFrame:
    """One of the files of a study; empty when it does not exist yet."""
    path = folder / f"{name}.csv"
    if not path.is_file():
        return pd.DataFrame({"run": pd.Series(dtype=str)})
    return pd.read_csv(path, dtype=TEXT)


def add(folder: Path, run: Mapping[str, Any], **tables: pd.DataFrame) -> None:
    """Adds a run and its tables; runs.csv is written last, so a run listed there is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {**tables, "runs": pd.DataFrame([run])}
    for name, rows in tables.items():
        kept = read(folder, name)
        kept = kept[kept["run"] != run["run"]]
        rows = rows.assign(run=run["run"])
        # Objects, since pandas 2 warns of the type of columns that are empty in one part.
        parts = [part.astype(object) for part in (kept, rows)]
        whole = pd.concat(parts, ignore_index=True).infer_objects()
        first = ["run", *whole.columns.drop("run")]
        write_text(folder / f"{name}.csv", whole[first].to_csv(index=False, lineterminator="\n"))


def is_done(folder: Path, run: str, config: str) -> bool:
    """Whether a run has results.

    Raises:
        ValueError: If they were made with another configuration.
    """
    runs = read(folder, "runs").set_index("run")
    if run not in runs.index:
        return False
    if runs.loc[run, "config"] != config:
        raise ValueError(
            f"{folder / 'runs.csv'}: run {run} was made with another configuration "
            f"({runs.loc[run, 'config']}, now {config}); give the study another out"
        )
    return True


def interval(rows: pd.DataFrame, column: str, *, classes: bool = True) -> Interval:
    """Mean and 95 % interval over subjects, and over draws where there is a column for them.

    Args:
        rows: Scores of one cell of a table.
        column: The score.
        classes: Whether every class has the same weight; otherwise every row has.
    """
    return bootstrap_interval(
        rows[column].to_list(),
        rows["subject"].to_list(),
        classes=rows["class"].to_list() if classes and "class" in rows else None,
        draws=rows["draw"].astype(str).to_list() if "draw" in rows else None,
    )


def shown(found: Interval, digits: int = 1, sign: str = "") -> str:
    """`mean (low to high)` in hundredths; empty where nothing is known."""
    mean, *bounds = ("" if pd.isna(v) else f"{100 * v:{sign}.{digits}f}" for v in found)
    return f"{mean} ({' to '.join(bounds)})" if all(bounds) else mean


def paired(
    rows: pd.DataFrame, baseline: pd.DataFrame, on: Sequence[str], of: Sequence[str]
) -> pd.DataFrame:
    """Rows minus the baseline's rows with the same keys, for some columns."""
    both = rows.merge(baseline[[*on, *of]], on=[*on], suffixes=("", "_baseline"))
    return both.assign(**{column: both[column] - both[f"{column}_baseline"] for column in of})


def markdown(table: pd.DataFrame) -> str:
    """A table of strings for a README, without padding: one changed cell changes one line."""
    text = (
        table.astype(object)
        .where(table.notna(), "")
        .to_markdown(index=False, disable_numparse=True)
    )
    return re.sub(r"-{3,}", "---", re.sub(r" {2,}", " ", text)) + "\n"


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
