"""Scores and what they come from -> the files of a result, among them one page for a reader.

`write_results` leaves in a folder: ``scores.csv``, ``scores.json``, ``cases.png``, ``figure.png``
and ``report.html``, which holds pictures and style itself and asks no network for anything.
`write_report` makes the page again from the other files.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from sammed3d_backbone.data.datasets import Dataset
from sammed3d_backbone.data.preparation import load_image, load_label
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.figures import Shown, cases_figure, curves_svg, run_figure
from sammed3d_backbone.evaluation.metrics import mean_of_known
from sammed3d_backbone.evaluation.page import facts, heading, page, picture, table, tiles
from sammed3d_backbone.evaluation.scores import (
    ClassSummary,
    Score,
    case_means,
    class_table,
    paired_differences,
    read_scores,
    write_scores,
)
from sammed3d_backbone.evaluation.statistics import format_number
from sammed3d_backbone.files import inside, write_text

METRIC_NOTES = (
    "Dice: overlap of the volumes, 0 to 1. NSD: share of both surfaces that lies within "
    "{tolerance:g} mm of the other one, 0 to 1. HD95: 95th percentile of the distances between "
    "the surfaces, in mm, smaller is better. All on the original grid of the scans. A structure "
    "that only the prediction or only the reference has scores Dice 0, NSD 0 and an infinite "
    "HD95, which is counted as one-sided and left out of the mean HD95."
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
    """Where scores come from, in words for a reader; what is left empty is not shown.

    Args:
        title: First line of the report.
        command: Makes the scores again.
        model: What was scored, such as "averaged weights of the last step".
        weights: What was loaded before training, and what was not.
        contamination: Whether the data were seen in pretraining.
        parameters: Part of the network -> number of parameters.
        steps: Of the optimiser.
        seconds: On the clock, spent in training.
        cpu_seconds: Of all cores, likewise.
        peak_memory_mb: Of the training process.
        dataset: Name, note, reference, licence.
        split: Which cases these are and the rule that chose them.
        tolerance_mm: Of the surface Dice.
        citations: Of weights and networks; that of the data is in `dataset`.
        config: Every knob of the run.
        provenance: Machine, versions, commit, date.
    """

    title: str
    command: str = ""
    model: str = ""
    weights: str = ""
    contamination: str = ""
    parameters: Mapping[str, int] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory_mb: float | None = None
    dataset: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    tolerance_mm: float = 2.0
    citations: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


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
        scores: From `scores.score_cases`.
        dataset: What they were scored on.
        about: Where they come from.
        records: Lines of the training log, for the curves.

    Returns:
        The summary, as it stands in ``scores.json``.
    """
    summary = write_scores(folder, scores, dataset.classes, dataclasses.asdict(about))
    shown = shown_cases(scores, dataset, folder / "predictions")
    mean = "undefined" if summary["mean_dice"] is None else f"{summary['mean_dice']:.3f}"
    title = f"{about.title}, mean Dice {mean} over {summary['cases']} case(s)"
    run_figure(
        folder / "figure.png", shown, dataset.classes, records, title=title, note=dataset.note
    )
    cases_figure(folder / "cases.png", shown, dataset.classes)
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
    written = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    about = About(**{key: value for key, value in written.items() if key in known})
    table = class_table(scores, _class_names(scores))
    sections = (
        _head(scores, about, table[-1]),
        _classes(scores, about, table),
        _comparison(scores, baseline),
        _pictures(folder / "cases.png"),
        _curves(records),
        _cases(scores),
        _origin(about, records),
    )
    write_text(folder / "report.html", page(about.title, sections))
    return folder / "report.html"


def shown_cases(scores: Sequence[Score], dataset: Dataset, predictions: Path) -> list[Shown]:
    """Best, median and worst case, opened for drawing; few cases fill several of these ranks."""
    means = case_means(scores)
    ranked = list(means)
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


def _head(scores: Sequence[Score], about: About, overall: ClassSummary) -> str:
    """What it is, what has to be known before believing it, and the three means."""
    cases, subjects = ({getattr(s, key) for s in scores} for key in ("case", "subject"))
    named = (
        ("mean Dice", overall.dice, ".3f"),
        (f"mean NSD at {about.tolerance_mm:g} mm", overall.nsd, ".3f"),
        ("mean HD95, mm", overall.hd95_mm, ".2f"),
    )
    means = [
        *((name, format_number(of.mean, form), of.bounds(form)) for name, of, form in named),
        ("cases", str(len(cases)), f"of {len(subjects)} subjects"),
    ]
    notes = [about.dataset.get("note", ""), about.contamination]
    return heading(about.title, about.split, notes) + tiles(means)


def _classes(scores: Sequence[Score], about: About, table: Sequence[ClassSummary]) -> str:
    """Every metric per class, and once more without what the volumes cut off."""
    caption = METRIC_NOTES.format(tolerance=about.tolerance_mm)
    interval = "Small: 95 % bootstrap interval, resampling subjects."
    text = "<h2>Per class</h2>" + _class_table(table, f"{interval} {caption}")
    whole = [score for score in scores if not score.truncated]
    if len(whole) < len(scores):
        text += "<h2>Per class, only structures that lie inside their volume</h2>"
        text += _class_table(
            class_table(whole, _class_names(scores)),
            f"Without {len(scores) - len(whole)} structures that go on beyond their volume.",
        )
    return text


def _class_table(rows: Iterable[ClassSummary], caption: str, *, sign: str = "") -> str:
    """Sign "+" marks gains as such."""
    head = ["class", "cases", "Dice", "NSD", "HD95, mm", "one-sided"]
    body = [
        [
            escape(row.name),
            str(row.cases),
            *(
                f"{format_number(value.mean, form)} <small>{value.bounds(form)}</small>"
                for value, form in (
                    (row.dice, f"{sign}.3f"),
                    (row.nsd, f"{sign}.3f"),
                    (row.hd95_mm, f"{sign}.2f"),
                )
            ),
            str(row.one_sided),
        ]
        for row in rows
    ]
    return table(head, body, caption=caption, emphasise_last=True)


def _comparison(scores: Sequence[Score], baseline: Path | None) -> str:
    """How far a baseline's scores on the same cases are exceeded."""
    if baseline is None:
        return ""
    gains = class_table(paired_differences(scores, read_scores(baseline)), _class_names(scores))
    caption = (
        f"Difference to {baseline} on the same cases, with the 95 % bootstrap interval of paired "
        "differences, resampling subjects. Better: Dice and NSD above 0, HD95 below 0."
    )
    return "<h2>Against the baseline</h2>" + _class_table(gains, caption, sign="+")


def _pictures(path: Path) -> str:
    """The contours, inside the page."""
    if not path.is_file():
        return ""
    caption = (
        "Planes through the slices with most labelled voxels; the patient's right is on the right. "
        "Solid: reference, dotted: prediction."
    )
    alt = "outlines of reference and prediction on three planes"
    return "<h2>Best, median and worst case</h2>" + picture(path.read_bytes(), alt, caption)


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    return f"<h2>Training</h2><figure>{curves_svg(records)}</figure>" if records else ""


def _cases(scores: Sequence[Score]) -> str:
    """One row per case: means, and the Dice of every class."""
    classes = _class_names(scores)
    rows = []
    for case, mean in case_means(scores).items():
        own = {score.name: score for score in scores if score.case == case}
        distances = [s.hd95_mm for s in own.values() if math.isfinite(s.hd95_mm)]
        cells = [
            f"{format_number(own[name].dice)}{'†' if own[name].truncated else ''}"
            for name in classes
        ]
        nsd = mean_of_known([score.nsd for score in own.values()])
        rows.append(
            [
                escape(case),
                format_number(mean),
                format_number(nsd),
                format_number(mean_of_known(distances), ".2f"),
                *cells,
            ]
        )
    caption = (
        "Means over the annotated classes; Dice per class. † goes on beyond the volume. - not "
        "annotated, or in neither. A click on a column's head sorts. Every number is in scores.csv."
    )
    head = ["case", "Dice", "NSD", "HD95, mm", *map(escape, classes)]
    return "<h2>Per case</h2>" + table(head, rows, caption=caption, kind="sortable")


def _origin(about: About, records: Sequence[Mapping[str, Any]]) -> str:
    """Cost, weights, command, machine and what to cite."""
    rates = [record["images_per_s"] for record in records if "images_per_s" in record]
    cost = {
        "model": about.model,
        "parameters": ", ".join(f"{part} {n:,}" for part, n in about.parameters.items()),
        "optimiser steps": "" if about.steps is None else f"{about.steps:,}",
        "training on the clock": _duration(about.seconds),
        "training, CPU time": _duration(about.cpu_seconds),
        "speed": f"{sum(rates) / len(rates):.2f} crops per second" if rates else "",
        "peak memory": f"{about.peak_memory_mb:,.0f} MB" if about.peak_memory_mb else "",
    }
    dataset = {key: value for key, value in about.dataset.items() if key != "note"}
    config = "\n".join(f"{key}: {value}" for key, value in about.config.items())
    cited = [*filter(None, [about.dataset.get("reference")]), *about.citations, *CITATIONS]
    parts = {
        "Cost": facts(cost),
        "Weights": f"<pre>{escape(about.weights)}</pre>" if about.weights else "",
        "Data": facts(dataset),
        "Do it again": (f"<pre>{escape(about.command)}</pre>" if about.command else "")
        + (
            f"<details><summary>configuration</summary><pre>{escape(config)}</pre></details>"
            if config
            else ""
        ),
        "Machine and versions": facts(about.provenance),
        "Please cite": "".join(f"<p>{escape(entry)}</p>" for entry in cited),
    }
    return "".join(f"<h2>{title}</h2>{text}" for title, text in parts.items() if text)


def _class_names(scores: Iterable[Score]) -> list[str]:
    """In the order of their values."""
    return list(dict.fromkeys(score.name for score in scores))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
