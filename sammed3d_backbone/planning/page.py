"""The page of a plan: findings, three cases, histograms, and every choice with its reason."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from sammed3d_backbone.data.preparation import load_image, load_label
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.figures import COLOURS, Shown, as_svg, cases_figure
from sammed3d_backbone.evaluation.page import png, write_page
from sammed3d_backbone.planning.findings import SCALE_FACTOR, Finding
from sammed3d_backbone.planning.fingerprint import DIRECTIONS, Fingerprint
from sammed3d_backbone.planning.rules import Choice
from sammed3d_backbone.planning.writer import summary


def write_plan_page(
    path: Path, found: Fingerprint, findings: Sequence[Finding], choices: Sequence[Choice]
) -> Path:
    """Writes one HTML file without references.

    Args:
        path: The file; replaced if it exists.
        found: The fingerprint.
        findings: Suspicious properties.
        choices: The plan.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "cases.png"
        cases_figure(picture, _examples(found), found.dataset.classes, lines=("reference",))
        return write_page(
            path,
            "planning/plan.html",
            title=f"Plan for {found.dataset.name}",
            below=found.dataset.folder.name,
            note=found.dataset.note,
            findings=findings,
            summary=summary(found),
            choices=choices,
            pictures=png(picture),
            histograms=Markup(as_svg(_histograms(found))),
        )


def _examples(found: Fingerprint) -> list[Shown]:
    """The cases with least, median and most labelled volume; fewer if there are fewer."""
    ranked = sorted(found.cases, key=lambda c: sum(s.ml for s in c.structures.values()))
    ranks = {0: "least", len(ranked) // 2: "median", len(ranked) - 1: "most"}
    shown = []
    for place, rank in ranks.items():
        case = ranked[place].case
        label = load_label(case)
        nothing = Volume(np.zeros_like(label.array), label.affine)
        shown.append(Shown(f"{case.id}\n{rank} labelled", load_image(case), label, nothing))
    return shown


def _histograms(found: Fingerprint) -> Figure:
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    (spacing, sides), (volumes, intensities) = figure.subplots(2, 2)
    _by_axis(spacing, [case.spacing_mm for case in found.cases], "spacing, mm")
    _by_axis(
        sides, [np.multiply(c.shape, c.spacing_mm) for c in found.cases], "side of the scan, mm"
    )
    classes = [*found.median(lambda structure: structure.ml)]
    for row, name in enumerate(classes):
        ml = [structure.ml for structure in found.of_class(name)]
        volumes.plot(ml, [row] * len(ml), ".", color=COLOURS[row % len(COLOURS)], alpha=0.5)
        volumes.plot(np.median(ml), row, "|", color="black", markersize=14)
    volumes.set_yticks(range(len(classes)), classes, fontsize=8)
    volumes.set_xscale("log")
    volumes.set_title("volume of a class, ml; line: median", fontsize=10)
    for channel, name in enumerate(found.dataset.channels):
        low, middle, high = np.array(
            sorted((case.inside[channel][1:4] for case in found.labelled), key=lambda p: p[1])
        ).T
        place = np.arange(len(middle))
        colour = COLOURS[(4 + channel) % len(COLOURS)]
        intensities.fill_between(place, low, high, color=colour, alpha=0.25, linewidth=0)
        intensities.plot(place, middle, color=colour, label=name)
        if 0 < middle[0] * SCALE_FACTOR < middle[-1]:
            intensities.set_yscale("symlog")
    intensities.set_title("intensity inside labels: median, 5 to 95 %", fontsize=10)
    intensities.set_xlabel("cases, by median", fontsize=8)
    intensities.legend(fontsize=8)
    for axes in (spacing, sides, volumes, intensities):
        axes.tick_params(labelsize=8)
    return figure


def _by_axis(axes: Axes, values: Sequence[ArrayLike], title: str) -> None:
    """A histogram with one outline per direction."""
    columns = np.array(values)
    bins = np.linspace(0, columns.max() * 1.05, 41).tolist()
    for axis, name in enumerate(DIRECTIONS):
        axes.hist(
            columns[:, axis], bins, histtype="step", label=name, color=COLOURS[axis], linewidth=1.5
        )
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("cases", fontsize=8)
    axes.legend(fontsize=8)
