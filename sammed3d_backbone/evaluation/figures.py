"""One picture of a run: contours on three planes of some cases, and the curves of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sammed3d_backbone.data.geometry import Geometry, TripleMm
from sammed3d_backbone.data.volume import Volume

PLANES = ("sagittal", "coronal", "axial")
MARGIN_MM = 8.0  # around what is drawn
# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


@dataclass(frozen=True, eq=False)
class Shown:
    """A case to draw: all three volumes on one grid."""

    title: str
    image: Volume
    label: Volume
    prediction: Volume


def run_figure(
    path: Path,
    shown: Sequence[Shown],
    classes: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    *,
    title: str,
    note: str = "",
) -> None:
    """Writes a PNG: one row of three planes per case, curves of loss and Dice beside them.

    Args:
        path: Of the PNG.
        shown: Cases, drawn from top to bottom.
        classes: Names of the classes 1, 2, ...
        records: Lines of the run's log, with ``step`` and ``loss`` or ``mean_dice``.
        title: First line of the figure.
        note: What the reader has to know before believing it; printed below the title.
    """
    rows = len(shown)
    figure = Figure(figsize=(13, max(5.5, 0.9 + 3.1 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title + (f"\n{note}" if note else ""), fontsize=11, wrap=True)
    grid = figure.add_gridspec(rows, 4, width_ratios=[1, 1, 1, 1.25])
    for row, case in enumerate(shown):
        image, label, prediction = (
            _towards_ras(volume) for volume in (case.image, case.label, case.prediction)
        )
        spacing_mm = Geometry.plan(case.image.shape, case.image.affine).spacing_mm
        centre = _fullest_slices(label)
        view = _view(label, prediction, spacing_mm)
        for plane in range(3):
            axes = figure.add_subplot(grid[row, plane])
            _draw_plane(axes, image, label, prediction, plane, centre[plane], spacing_mm, view)
            if row == 0:
                axes.set_title(PLANES[plane], fontsize=10)
            if plane == 0:
                axes.set_ylabel(case.title, fontsize=9)
    curves = grid[:, 3].subgridspec(3, 1, height_ratios=[1, 1, 0.5])
    _draw_curve(figure.add_subplot(curves[0]), records, "loss", "training loss")
    _draw_curve(figure.add_subplot(curves[1]), records, "mean_dice", "validation Dice (EMA)")
    legend = figure.add_subplot(curves[2])
    legend.set_axis_off()
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], label=name)
        for i, name in enumerate(classes)
    ]
    handles.append(Line2D([], [], color="grey", linestyle="-", label="reference"))
    handles.append(Line2D([], [], color="grey", linestyle=":", label="prediction"))
    legend.legend(handles=handles, loc="center", fontsize=8, ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_plane(
    axes: Axes,
    image: np.ndarray[Any, Any],
    label: np.ndarray[Any, Any],
    prediction: np.ndarray[Any, Any],
    plane: int,
    index: int,
    spacing_mm: TripleMm,
    view: list[tuple[int, int]],
) -> None:
    """One slice with the outlines of label (solid) and prediction (dotted)."""
    across, up = (axis for axis in range(3) if axis != plane)
    background = image.take(index, axis=plane).T
    low, high = np.percentile(image, [1, 99])
    aspect = spacing_mm[up] / spacing_mm[across]
    axes.imshow(background, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=aspect)
    for volume, style in ((label, "-"), (prediction, ":")):
        plane_labels = volume.take(index, axis=plane).T
        for value in np.unique(plane_labels[plane_labels > 0]):
            axes.contour(
                plane_labels == value,
                levels=[0.5],
                colors=[COLOURS[(int(value) - 1) % len(COLOURS)]],
                linestyles=style,
                linewidths=1.3,
            )
    axes.set_xlim(view[across][0] - 0.5, view[across][1] - 0.5)
    axes.set_ylim(view[up][0] - 0.5, view[up][1] - 0.5)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_curve(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color="#0072B2", linewidth=1.2)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _towards_ras(volume: Volume) -> np.ndarray[Any, Any]:
    """First channel with axes towards R, A, S; values untouched."""
    geometry = Geometry.plan(volume.shape, volume.affine)
    array: np.ndarray[Any, Any] = geometry.resample(volume.array)[0].numpy()
    return array


def _view(
    label: np.ndarray[Any, Any], prediction: np.ndarray[Any, Any], spacing_mm: TripleMm
) -> list[tuple[int, int]]:
    """Per axis, the voxels to show: all that is labelled or predicted anywhere, and a margin."""
    drawn = (label > 0) | (prediction > 0)
    view = []
    for axis, size in enumerate(drawn.shape):
        used = np.flatnonzero(drawn.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = round(MARGIN_MM / spacing_mm[axis])
        first, last = (used[0], used[-1]) if len(used) else (0, size - 1)
        view.append((max(0, int(first) - margin), min(size, int(last) + margin + 1)))
    return view


def _fullest_slices(label: np.ndarray[Any, Any]) -> list[int]:
    """Per axis, the slice with most labelled voxels."""
    labelled = label > 0
    return [
        int(labelled.sum(axis=tuple(a for a in range(3) if a != axis)).argmax())
        for axis in range(3)
    ]
