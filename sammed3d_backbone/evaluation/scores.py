"""Predictions of a data set's cases -> a score per case and class -> a table and a summary.

A table (``scores.csv``) has one row per case and class; the summary (``scores.json``), comparisons
and reports are computed from it. Predictions may come from a network, an atlas or another tool.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sammed3d_backbone.console import progress_bar, reason
from sammed3d_backbone.data.checks import pair_problems
from sammed3d_backbone.data.datasets import Case, Dataset
from sammed3d_backbone.data.preparation import annotated_classes, load_label
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.metrics import METRICS, mean_of_known
from sammed3d_backbone.evaluation.statistics import Interval, bootstrap_interval
from sammed3d_backbone.files import inside, read_text, reading, write_json, write_text

COLUMNS = ("case", "subject", "class", *METRICS, "annotated", "truncated")
TOLERANCE_MM = 2.0
OVERALL = "mean of classes"


@dataclass(frozen=True)
class Score:
    """All metrics of one class of one case; see `metrics` for the scores of an absent class."""

    case: str
    subject: str  # scans of one subject are not independent
    name: str  # name of the class
    values: Mapping[str, float] = field(default_factory=dict)  # key of METRICS -> score
    annotated: bool = True  # False: not annotated in this case, and all scores are NaN
    truncated: bool = False  # the structure is cut off by the volume

    def __getitem__(self, metric: str) -> float:
        return self.values.get(metric, math.nan)


@dataclass(frozen=True)
class ClassSummary:
    """One class over all cases: means with their intervals."""

    name: str
    cases: int  # cases with a score
    one_sided: int  # only in the prediction or only in the reference: left out of HD95
    values: Mapping[str, Interval]  # key of METRICS -> mean over cases


def score_cases(
    predict: Callable[[Case], Volume],
    dataset: Dataset,
    ids: Iterable[str],
    *,
    folder: Path | None = None,
    failed: dict[str, str] | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    progress: bool = True,
) -> list[Score]:
    """Scores of the named cases, on the grid of their files.

    joblib computes them, here unless `parallel.workers` says otherwise.

    Args:
        predict: Returns the labels of a case, on the grid of its reference.
        dataset: The data set with the cases.
        ids: Cases to score, in this order.
        folder: Every prediction is written here as ``<case>.nii.gz``; None writes none.
        failed: Gets the cases that cannot be scored, with the reason, so that the others are;
            None raises the first reason.
        tolerance_mm: Tolerance of the surface Dice.
        progress: Whether to show a bar.

    Raises:
        ValueError: If a prediction lies on another grid than its reference.
    """
    names, cases = [*ids], {case.id: case for case in dataset.cases}
    tasks = (
        joblib.delayed(_scored)(predict, cases[name], dataset, folder, tolerance_mm, failed is None)
        for name in names
    )
    found = joblib.Parallel(return_as="generator", batch_size=1)(tasks)
    scores: list[Score] = []
    bar = progress_bar(found, desc="evaluating", unit="case", total=len(names), shown=progress)
    for name, (of_case, why) in zip(names, bar, strict=True):
        scores += of_case
        if why is not None and failed is not None:
            failed[name] = why
    return scores


def _scored(
    predict: Callable[[Case], Volume],
    case: Case,
    dataset: Dataset,
    folder: Path | None,
    tolerance_mm: float,
    strict: bool,
) -> tuple[list[Score], str | None]:
    """The scores of a case, or why it has none; raises that if `strict`."""
    try:
        prediction = predict(case)
        if folder is not None:
            prediction.save(inside(folder, case.id, ".nii.gz"))
        return score_case(prediction, case, dataset, tolerance_mm), None
    except Exception as error:
        if strict:
            raise
        return [], reason(error)


def score_case(
    prediction: Volume, case: Case, dataset: Dataset, tolerance_mm: float = TOLERANCE_MM
) -> list[Score]:
    """One case's scores, in the order of the class values.

    Raises:
        ValueError: If the prediction lies on another grid than the reference, or holds values
            that are not classes.
    """
    label = load_label(case)
    problems = pair_problems(
        Path(f"prediction of {case.id}"),
        prediction,
        case.label,
        label,
        tolerance=dataset.grid_tolerance,
    )
    if problems:
        raise ValueError(problems[0])
    strange = sorted({*np.unique(prediction.array).tolist()} - {*dataset.labels})
    if strange:
        raise ValueError(
            f"prediction of {case.id}: values {strange} are not classes of {dataset.name} "
            f"({sorted(dataset.labels)}); number them like its labels"
        )
    known = annotated_classes(case, dataset)
    boxes = _boxes(prediction.array, label.array, dataset.targets)
    scores = []
    for name, of_target in dataset.targets.items():
        values, is_known = {}, bool(known[[*of_target]].all())
        if is_known:
            found, its = prediction.array[boxes[name]], label.array[boxes[name]]
            scored = its < len(dataset.labels)  # the others are to be ignored
            masks = np.isin(found, of_target) & scored, np.isin(its, of_target)
            values = {
                key: metric.function(*masks, label.spacing_mm, tolerance_mm)
                for key, metric in METRICS.items()
            }
        scores.append(
            Score(
                case=case.id,
                subject=case.subject,
                name=name,
                values=values,
                annotated=is_known,
                truncated=name in case.truncated,
            )
        )
    return scores


def summarise_scores(scores: Sequence[Score], classes: Sequence[str]) -> dict[str, Any]:
    """Mean Dice per class over cases, and their mean over classes; NaN becomes None."""
    per_class = {
        name: mean_of_known([score["dice"] for score in scores if score.name == name])
        for name in classes
    }
    return {
        "mean_dice": _plain(mean_of_known(list(per_class.values()))),
        "dice": {name: _plain(value) for name, value in per_class.items()},
        "cases": len({score.case for score in scores}),
    }


def class_table(scores: Sequence[Score], classes: Sequence[str]) -> list[ClassSummary]:
    """Every metric per class, and the mean of the classes in the last row.

    Intervals hold 95 % and are drawn by subject.
    """
    rows = [_summary(name, [s for s in scores if s.name == name]) for name in classes]
    return [*rows, _summary(OVERALL, [s for s in scores if s.name in classes])]


def case_means(scores: Sequence[Score]) -> dict[str, float]:
    """Mean Dice of every case over the classes that it has; best first, cases without last."""
    cases = dict.fromkeys(score.case for score in scores)
    means = {
        case: mean_of_known([score["dice"] for score in scores if score.case == case])
        for case in cases
    }
    return dict(sorted(means.items(), key=lambda item: (math.isnan(item[1]), -item[1])))


def paired_differences(scores: Sequence[Score], baseline: Sequence[Score]) -> list[Score]:
    """Case by case and class by class, the scores minus those of a baseline.

    The `class_table` of this is the paired comparison.

    Raises:
        ValueError: If the two are not about the same cases and classes.
    """
    theirs = {(score.case, score.name): score for score in baseline}
    lost = {(score.case, score.name) for score in scores} ^ theirs.keys()
    if lost:
        raise ValueError(
            f"{len(lost)} scores have no partner, e.g. {' '.join(min(lost))}; compare scores of "
            "the same cases and classes"
        )
    return [
        replace(
            score,
            values={m: score[m] - theirs[score.case, score.name][m] for m in METRICS},
        )
        for score in scores
    ]


def write_scores(
    folder: Path, scores: Sequence[Score], classes: Sequence[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes ``scores.csv`` (a row per case and class) and ``scores.json`` (summary and `about`).

    Returns:
        The content of the JSON file.
    """
    whole = [score for score in scores if not score.truncated]
    summary = {
        **summarise_scores(scores, classes),
        "tables": {
            "all": _as_json(class_table(scores, classes)),
            "without truncated": _as_json(class_table(whole, classes)),
        },
        **about,
    }
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for score in scores:
        flags = ("yes" if flag else "no" for flag in (score.annotated, score.truncated))
        shown = ("" if math.isnan(score[m]) else f"{score[m]:.6g}" for m in METRICS)
        table.writerow([score.case, score.subject, score.name, *shown, *flags])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "scores.csv", text.getvalue())
    write_json(folder / "scores.json", summary)
    return summary


def read_scores(path: Path) -> list[Score]:
    """The scores of a ``scores.csv``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another kind of table.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no scores at {path}; score the cases with recipes/evaluate.py")
    table = csv.DictReader(io.StringIO(read_text(path), newline=""))
    with reading(path):
        if not set(COLUMNS) <= set(table.fieldnames or ()):
            raise ValueError(
                f"{path} has no columns {', '.join(COLUMNS)}; score the cases again with "
                "recipes/evaluate.py"
            )
        rows = list(table)
        if odd := [row for row in rows if None in row or None in row.values()]:
            raise ValueError(
                f"{path} has rows that are cut or too long, e.g. {odd[0]}; copy it again"
            )
        times = Counter((row["case"], row["class"]) for row in rows)
        if twice := [" ".join(key) for key, n in times.items() if n > 1]:
            raise ValueError(f"{path} has several rows of {twice[0]}; keep one")
        return [
            Score(
                case=row["case"],
                subject=row["subject"],
                name=row["class"],
                values={metric: float(row[metric] or "nan") for metric in METRICS},
                annotated=row["annotated"] == "yes",
                truncated=row["truncated"] == "yes",
            )
            for row in rows
        ]


def _boxes(
    one: NDArray[np.integer[Any]],
    other: NDArray[np.integer[Any]],
    targets: Mapping[str, Sequence[int]],
) -> dict[str, tuple[slice, ...]]:
    """Per target the box around its values in both volumes, in one pass over each."""
    most = max(value for values in targets.values() for value in values)
    found = [ndimage.find_objects(x, max_label=most) for x in (one, other)]
    boxes = {}
    for name, values in targets.items():
        held = [x[value - 1] for x in found for value in values if x[value - 1] is not None]
        sides = zip(*held, strict=True)  # along X, Y, Z: a slice per box
        box = tuple(slice(min(s.start for s in x), max(s.stop for s in x)) for x in sides)
        boxes[name] = box or (slice(0),)
    return boxes


def _summary(name: str, scores: Sequence[Score]) -> ClassSummary:
    subjects, classes = ([getattr(s, key) for s in scores] for key in ("subject", "name"))
    return ClassSummary(
        name,
        cases=len({score.case for score in scores if not math.isnan(score["dice"])}),
        one_sided=sum(any(map(math.isinf, score.values.values())) for score in scores),
        values={
            metric: bootstrap_interval([s[metric] for s in scores], subjects, classes=classes)
            for metric in METRICS
        },
    )


def _as_json(table: Sequence[ClassSummary]) -> list[dict[str, Any]]:
    """The rows, every interval as mean, low and high."""
    return [
        {
            "class": row.name,
            "cases": row.cases,
            "one_sided": row.one_sided,
            **{metric: [_plain(v) for v in interval] for metric, interval in row.values.items()},
        }
        for row in table
    ]


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else round(value, 6)
