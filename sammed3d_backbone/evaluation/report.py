"""The files of an evaluation: tables, figures and a page.

`write_results` writes ``scores.csv``, ``scores.json``, ``cases.png``, ``figure.png`` and
``report.html``; `write_report` writes the page again from the other files.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sammed3d_backbone.console import optional
from sammed3d_backbone.data.datasets import Dataset
from sammed3d_backbone.data.preparation import load_image, load_label
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.figures import Shown, cases_figure, curves_svg, run_figure
from sammed3d_backbone.evaluation.metrics import METRICS, mean_of_known
from sammed3d_backbone.evaluation.page import png, stated, write_page
from sammed3d_backbone.evaluation.scores import (
    Score,
    case_means,
    class_table,
    paired_differences,
    read_scores,
    write_scores,
)
from sammed3d_backbone.files import inside, read_text, reading

LEGEND = (
    " ".join(f"{metric.title}: {metric.meaning}." for metric in METRICS.values())
    + " All on the original grid of the scans. A structure that only the prediction or only the "
    "reference contains has the worst score; it is counted as one-sided, and infinite distances "
    "are left out of means."
)
CITATIONS = (
    "This package: sammed3d-backbone, an implementation of the image encoder of SAM-Med3D "
    "(Wang et al., arXiv:2310.15161; IEEE TNNLS 2025, doi 10.1109/TNNLS.2025.3586694).",
    "Networks, transforms and metrics: Cardoso et al., MONAI, arXiv:2211.02701.",
    "Surface Dice: Nikolov et al., Clinically applicable segmentation of head and neck anatomy "
    "for radiotherapy, J Med Internet Res 23:e26151, 2021.",
)


@dataclass(frozen=True)
class About:
    """Provenance of scores, for the report; empty entries are not shown."""

    title: str
    command: str = ""  # makes the scores again
    model: str = ""  # the scored model, such as "averaged weights of the last step"
    weights: str = ""  # report of loading the initial weights
    data_overlap: str = ""  # whether the data were seen in pretraining
    failed: Mapping[str, str] = field(default_factory=dict)  # case -> why it is not scored
    parameters: Mapping[str, int] = field(default_factory=dict)  # part of the network -> number
    steps: int | None = None  # optimiser steps
    seconds: float | None = None  # wall-clock time of the training
    cpu_seconds: float | None = None  # CPU time of the training, all cores together
    peak_memory_mb: float | None = None  # peak memory of the training process
    dataset: Mapping[str, str] = field(default_factory=dict)  # name, note, reference, licence
    split: str = ""  # scored cases and the rule that chose them
    tolerance_mm: float = 2.0  # tolerance of the surface Dice
    citations: Sequence[str] = ()  # weights and networks; the data's is in `dataset`
    config: Mapping[str, Any] = field(default_factory=dict)  # configuration of the run
    provenance: Mapping[str, Any] = field(default_factory=dict)  # machine, versions, commit, date


def write_results(
    folder: Path,
    scores: Sequence[Score],
    dataset: Dataset,
    about: About,
    records: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Writes tables, figures and report of scored cases.

    Args:
        folder: Holds ``predictions/<case>.nii.gz`` of the scored cases, and gets the rest.
        scores: Scores of `scores.score_cases`.
        dataset: The data set with the scored cases.
        about: Provenance of the scores.
        records: Lines of the training log, for the curves.

    Returns:
        The summary, as it stands in ``scores.json``.
    """
    summary = write_scores(folder, scores, [*dataset.targets], dataclasses.asdict(about))
    mean = "undefined" if summary["mean_dice"] is None else f"{summary['mean_dice']:.3f}"
    title = f"{about.title}, mean Dice {mean} over {summary['cases']} case(s)"
    with optional(folder / "figure.png"):
        shown = shown_cases(scores, dataset, folder / "predictions")
        run_figure(
            folder / "figure.png", shown, dataset.classes, records, title=title, note=dataset.note
        )
        cases_figure(folder / "cases.png", shown, dataset.classes)
    with optional(folder / "report.html"):
        write_report(folder, records)
    return summary


def write_report(
    folder: Path, records: Sequence[Mapping[str, Any]] = (), *, baseline: Path | None = None
) -> Path:
    """Writes ``report.html`` from the other files of a result.

    Args:
        folder: With ``scores.csv``, ``scores.json`` and, if there are pictures, ``cases.png``.
        records: Lines of the training log, for the curves.
        baseline: ``scores.csv`` of the same cases to compare with.

    Raises:
        FileNotFoundError: If there are no scores.
        ValueError: If a table is of another kind, or the baseline is about other cases.
    """
    scores = read_scores(folder / "scores.csv")
    known = {entry.name for entry in dataclasses.fields(About)}
    path = folder / "scores.json"
    with reading(path):
        written = json.loads(read_text(path))
        about = About(**{key: value for key, value in written.items() if key in known})
    names = list(dict.fromkeys(score.name for score in scores))
    classes = class_table(scores, names)
    whole = [score for score in scores if not score.truncated]
    gains = None if baseline is None else paired_differences(scores, read_scores(baseline))
    better = (f"{m.title} {'above' if m.higher_is_better else 'below'} 0" for m in METRICS.values())
    return write_page(
        folder / "report.html",
        "evaluation/report.html",
        title=about.title,
        about=about,
        notes=[
            about.dataset.get("note", ""),
            about.data_overlap,
            *(f"NOT SCORED: {case}: {why}" for case, why in about.failed.items()),
        ],
        metrics=list(METRICS.values()),
        heads=[metric.head for metric in METRICS.values()],
        legend=LEGEND.format(tolerance=about.tolerance_mm),
        names=names,
        subjects=len({score.subject for score in scores}),
        overall=classes[-1],
        classes=classes,
        whole=class_table(whole, names) if len(whole) < len(scores) else (),
        truncated=len(scores) - len(whole),
        baseline=baseline,
        better=f"Better: {', '.join(better)}.",
        gains=gains and class_table(gains, names),
        pictures=png(folder / "cases.png"),
        curves=Markup(curves_svg(records)) if records else "",
        cases=[_case_row(case, scores) for case in case_means(scores)],
        cost=_cost(about, records),
        dataset=stated({key: value for key, value in about.dataset.items() if key != "note"}),
        citations=[*filter(None, [about.dataset.get("reference")]), *about.citations, *CITATIONS],
    )


def shown_cases(scores: Sequence[Score], dataset: Dataset, predictions: Path) -> list[Shown]:
    """Best, median and worst case, opened for drawing; few cases fill several of these ranks."""
    means = case_means(scores)
    ranked = [case for case, mean in means.items() if not math.isnan(mean)] or list(means)
    ranks: dict[str, str] = {}
    for rank, place in (("best", 0), ("median", len(ranked) // 2), ("worst", -1)):
        name = ranked[place]
        ranks[name] = f"{ranks[name]}, {rank}" if name in ranks else rank
    cases = {case.id: case for case in dataset.cases}
    return [
        Shown(
            f"{rank}: {name}\nDice {means[name]:.3f}",
            load_image(cases[name]),
            load_label(cases[name]),
            Volume.load(inside(predictions, name, ".nii.gz")),
        )
        for name, rank in ranks.items()
    ]


def _case_row(case: str, scores: Sequence[Score]) -> dict[str, Any]:
    """The scores of one case in the order of the classes, and the means of the finite ones."""
    own = [score for score in scores if score.case == case]
    means = {
        name: mean_of_known([score[name] for score in own if not math.isinf(score[name])])
        for name in METRICS
    }
    return {"name": case, "scores": own, "means": means}


def _cost(about: About, records: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Size and cost of the training."""
    rates = [record["images_per_s"] for record in records if "images_per_s" in record]
    return stated(
        {
            "model": about.model,
            "parameters": ", ".join(f"{part} {n:,}" for part, n in about.parameters.items()),
            "optimiser steps": "" if about.steps is None else f"{about.steps:,}",
            "training, wall-clock time": _duration(about.seconds),
            "training, CPU time": _duration(about.cpu_seconds),
            "speed": f"{sum(rates) / len(rates):.2f} crops per second" if rates else "",
            "peak memory": f"{about.peak_memory_mb:,.0f} MB" if about.peak_memory_mb else "",
        }
    )


def _duration(seconds: float | None) -> str:
    """For example "1:02:03", in hours, minutes and seconds."""
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))
