"""Pictures: contours, clicks and features on three planes, and the curves of training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from nibabel.affines import apply_affine

from sammed3d_backbone.data.geometry import Geometry, Triple, TripleMm
from sammed3d_backbone.data.regions import bounding_box
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.voxel_features import pca_colours, sampled
from sammed3d_backbone.files import atomic_path

PLANES = ("sagittal", "coronal", "axial")
LEVELS = 63  # levels of a colour channel in feature maps
ENDS = ("LR", "PA", "IS")  # letters at both ends of the axes
MARGIN_MM = 8.0  # margin around the drawn structures
LINES = ("reference", "prediction")  # names of solid and dotted outlines
FEW = 20  # curves with fewer points have markers
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
        path: The PNG file.
        shown: Cases, drawn from top to bottom.
        classes: Names of the classes 1, 2, ...
        records: Lines of the run's log, with ``step`` and ``loss`` or ``mean_dice``.
        title: First line of the figure.
        note: Printed below the title.
    """
    rows = len(shown)
    figure = Figure(figsize=(13, max(5.5, 0.9 + 3.1 * rows)), layout="constrained")
    figure.suptitle(title + (f"\n{note}" if note else ""), fontsize=11, wrap=True)
    grid = figure.add_gridspec(rows, 4, width_ratios=[1, 1, 1, 1.25])
    _draw_cases(figure, grid, shown)
    curves = grid[:, 3].subgridspec(3, 1, height_ratios=[1, 1, 0.5])
    _draw_curve(figure.add_subplot(curves[0]), records, "loss", "training loss")
    _draw_curve(figure.add_subplot(curves[1]), records, "mean_dice", "validation Dice (EMA)")
    legend = figure.add_subplot(curves[2])
    legend.set_axis_off()
    handles = _legend(classes)
    legend.legend(handles=handles, loc="center", fontsize=8, ncols=2, frameon=False)
    _save(figure, path)


def cases_figure(
    path: Path,
    shown: Sequence[Shown],
    classes: Sequence[str],
    lines: Sequence[str] = LINES,
) -> None:
    """Writes a PNG: one row of three planes per case, the classes' colours below.

    Args:
        path: The PNG file.
        shown: Cases, drawn from top to bottom.
        classes: Names of the classes 1, 2, ...
        lines: Names of the solid and the dotted outlines.
    """
    figure = Figure(figsize=(9, 0.8 + 3.0 * len(shown)), layout="constrained")
    _draw_cases(figure, figure.add_gridspec(len(shown), 3), shown)
    figure.legend(
        handles=_legend(classes, lines),
        loc="outside lower center",
        fontsize=9,
        ncols=5,
        frameon=False,
    )
    _save(figure, path)


@dataclass(frozen=True, eq=False)
class Clicked:
    """An object to draw with its clicks.

    Shapes:
        mask: (X, Y, Z) bool, on the grid of the image.
    """

    name: str
    mask: np.ndarray[Any, Any]
    clicks: Sequence[tuple[Triple, bool]]  # voxel of the image's grid, whether inside


def clicks_figure(
    path: Path, image: Volume, shown: Sequence[Clicked], *, overwrite: bool = True
) -> None:
    """Writes a PNG: one row per object, three planes through its first click.

    Clicks that lie in a plane are full marks, the others faint ones: + inside, x outside.
    """
    figure = Figure(figsize=(9, 0.8 + 3.0 * len(shown)), layout="constrained")
    geometry = Geometry.plan(image.shape, image.affine)
    oriented = geometry.oriented(image.array)
    for row, clicked in enumerate(shown):
        mask = geometry.oriented(clicked.mask)
        clicks = [(geometry.oriented_voxel(voxel), inside) for voxel, inside in clicked.clicks]
        centre = clicks[0][0] if clicks else _fullest_slices(mask)
        view = _view(mask, mask, geometry.spacing_mm)
        for voxel, _ in clicks:
            view = [(min(a, n), max(b, n + 1)) for (a, b), n in zip(view, voxel, strict=True)]
        for plane in range(3):
            axes = figure.add_subplot(len(shown), 3, 3 * row + plane + 1)
            background = oriented.take(centre[plane], axis=plane).T
            window = np.percentile(background, [1, 99])
            _show_slice(axes, background, window, plane, geometry.spacing_mm, view)
            _outline(axes, mask.take(centre[plane], axis=plane).T * (row + 1), "-")
            across, up = (axis for axis in range(3) if axis != plane)
            for voxel, inside in clicks:
                axes.plot(
                    voxel[across],
                    voxel[up],
                    "+" if inside else "x",
                    color="#009E73" if inside else "#D55E00",
                    markersize=9,
                    alpha=1.0 if voxel[plane] == centre[plane] else 0.35,
                )
            _label(axes, row, plane, clicked.name)
    _save(figure, path, overwrite=overwrite)


def features_figure(
    path: Path,
    image: Volume,
    maps: Mapping[str, torch.Tensor],
    affine: np.ndarray[Any, Any],
    *,
    title: str,
    overwrite: bool = True,
) -> None:
    """Writes a PNG: the image on three planes through its middle, and below it each map in colours.

    Maps are drawn on the image's own grid. Equal colours mean alike tokens within one row only.

    Args:
        path: The PNG file.
        image: One channel.
        maps: Name -> tokens, drawn from top to bottom.
        affine: (4, 4), token index -> RAS+ mm of the token's centre.
        title: First line of the figure.
        overwrite: Whether to replace an existing file.

    Shapes:
        maps: (E, x, y, z), axes towards R, A, S.
    """
    geometry = Geometry.plan(image.shape, image.affine)
    oriented = geometry.oriented(image.array)
    x_mm, y_mm, z_mm = np.multiply(oriented.shape, geometry.spacing_mm)
    widths = (y_mm, x_mm, x_mm)  # one scale for all planes, so that their structures line up
    height = 7.8 * max(y_mm, z_mm) / sum(widths)
    figure = Figure(figsize=(8, 0.9 + height * (1 + len(maps))), layout="constrained")
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(
        "red, green, blue: the three principal parts of a block's tokens; rows have colours of "
        "their own",
        fontsize=9,
    )
    grid = figure.add_gridspec(1 + len(maps), 3, width_ratios=widths)
    centre = [n // 2 for n in oriented.shape]
    view = [(0, n) for n in oriented.shape]
    window = np.percentile(oriented, [1, 99])
    coloured = {name: pca_colours(tokens) for name, tokens in maps.items()}
    for plane in range(3):
        ranges = [np.arange(n) for n in oriented.shape]
        ranges[plane] = np.array([centre[plane]])
        voxels = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).squeeze(plane)
        tokens_at = torch.from_numpy(apply_affine(np.linalg.inv(affine) @ geometry.affine, voxels))
        drawn = {"image": oriented.take(centre[plane], axis=plane)}
        for name, colours in coloured.items():
            flat = sampled(colours, tokens_at.reshape(-1, 3))
            # The reduced number of levels is not visible and halves the file.
            drawn[name] = (flat.reshape(voxels.shape) * LEVELS).round().numpy() / LEVELS
        for row, (name, values) in enumerate(drawn.items()):
            axes = figure.add_subplot(grid[row, plane])
            background = values.swapaxes(0, 1)
            _show_slice(axes, background, window, plane, geometry.spacing_mm, view)
            axes.set_anchor("N")
            _label(axes, row, plane, name.replace("_", " "))
    _save(figure, path, dpi=80, overwrite=overwrite)


def curves_svg(records: Sequence[Mapping[str, Any]]) -> str:
    """Loss, Dice of every class and learning rate over the steps, as an SVG element.

    Args:
        records: Lines of the run's log, with ``step`` and ``loss`` and ``lr``, or ``dice``.
    """
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    loss, dice, lr = figure.subplots(1, 3)
    _draw_curve(loss, records, "loss", "training loss")
    per_class = [{"step": r["step"], **r["dice"]} for r in records if "dice" in r]
    for number, name in enumerate(per_class[0] if per_class else ()):
        if name != "step":
            _draw_curve(dice, per_class, name, "", colour=_colour(number), width=0.8)
    _draw_curve(dice, records, "mean_dice", "validation Dice: mean, classes", colour="black")
    _draw_curve(lr, records, "lr", "learning rate")
    return as_svg(figure)


def as_svg(figure: Figure) -> str:
    """A figure as an SVG element, to stand inside a page."""
    file = io.StringIO()
    # Text stays text, and the same numbers give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]  # without the head of a file of its own


def _save(figure: Figure, path: Path, dpi: int = 110, *, overwrite: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, overwrite=overwrite) as draft:
        figure.savefig(draft, dpi=dpi)


def _draw_cases(figure: Figure, grid: GridSpec, shown: Sequence[Shown]) -> None:
    """One row of three planes per case, in the first three columns of a grid."""
    for row, case in enumerate(shown):
        geometry = Geometry.plan(case.image.shape, case.image.affine)
        first = case.image.array.reshape(-1, *case.image.shape)[0]  # channel
        arrays = (first, case.label.array, case.prediction.array)
        image, label, prediction = (geometry.oriented(array) for array in arrays)
        spacing_mm = geometry.spacing_mm
        centre = _fullest_slices(label)
        view = _view(label, prediction, spacing_mm)
        window = np.percentile(image, [1, 99])
        for plane in range(3):
            axes = figure.add_subplot(grid[row, plane])
            background, *outlined = (
                volume.take(centre[plane], axis=plane).T for volume in (image, label, prediction)
            )
            _show_slice(axes, background, window, plane, spacing_mm, view)
            for labels, style in zip(outlined, ("-", ":"), strict=True):
                _outline(axes, labels, style)
            _label(axes, row, plane, case.title)


def _show_slice(
    axes: Axes,
    background: np.ndarray[Any, Any],
    window: np.ndarray[Any, Any],
    plane: int,
    spacing_mm: TripleMm,
    view: Sequence[tuple[int, int]],
) -> None:
    """Draws a slice, (Y, X) or (Y, X, 3) in colours, with letters for its directions.

    As viewers show it: the patient's right, and of a sagittal slice the front, are on the left.
    """
    across, up = (axis for axis in range(3) if axis != plane)
    axes.imshow(
        background,
        cmap="gray",
        vmin=window[0],
        vmax=window[1],
        origin="lower",
        interpolation="nearest" if background.ndim == 3 else None,
        aspect=spacing_mm[up] / spacing_mm[across],
    )
    axes.set_xlim(view[across][1] - 0.5, view[across][0] - 0.5)
    axes.set_ylim(view[up][0] - 0.5, view[up][1] - 0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    edged = [withStroke(linewidth=2, foreground="black")]  # readable on any colour
    style: dict[str, Any] = {
        "color": "white",
        "fontsize": 8,
        "weight": "bold",
        "path_effects": edged,
    }
    for letter, x, y, ha, va in (
        (ENDS[across][1], 0.02, 0.5, "left", "center"),
        (ENDS[across][0], 0.98, 0.5, "right", "center"),
        (ENDS[up][0], 0.5, 0.02, "center", "bottom"),
        (ENDS[up][1], 0.5, 0.98, "center", "top"),
    ):
        axes.annotate(letter, (x, y), xycoords="axes fraction", ha=ha, va=va, **style)


def _label(axes: Axes, row: int, plane: int, name: str) -> None:
    """Names of the planes above the first row, names of the rows beside the first plane."""
    if row == 0:
        axes.set_title(PLANES[plane], fontsize=10)
    if plane == 0:
        axes.set_ylabel(name, fontsize=9)


def _outline(axes: Axes, labels: np.ndarray[Any, Any], style: str) -> None:
    """The outline of every class in one slice, (Y, X)."""
    # With a border, since contours need two voxels along each axis and end at the last.
    edged = np.pad(labels, 1)
    up, across = (np.arange(-1, n + 1) for n in labels.shape)
    for value in np.unique(labels[labels > 0]):
        axes.contour(
            across,
            up,
            edged == value,
            levels=[0.5],
            colors=[_colour(int(value))],
            linestyles=style,
            linewidths=1.3,
        )


def _legend(classes: Sequence[str], lines: Sequence[str] = LINES) -> list[Line2D]:
    """Legend entries of the classes' colours and the outlines' line styles."""
    named = [Line2D([], [], color=_colour(i), label=name) for i, name in enumerate(classes, 1)]
    styles: tuple[Literal["-", ":"], ...] = ("-", ":")
    styled = [
        Line2D([], [], color="grey", linestyle=style, label=line)
        for line, style in zip(lines, styles, strict=False)
    ]
    return [*named, *styled]


def _colour(value: int) -> str:
    """Colour of a class value, counted from 1."""
    return COLOURS[(value - 1) % len(COLOURS)]


def _draw_curve(
    axes: Axes,
    records: Sequence[Mapping[str, Any]],
    key: str,
    title: str,
    *,
    colour: str = "#0072B2",
    width: float = 1.2,
) -> None:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        marker = "." if len(points) < FEW else None
        axes.plot(steps, values, color=colour, linewidth=width, marker=marker)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _view(
    label: np.ndarray[Any, Any], prediction: np.ndarray[Any, Any], spacing_mm: TripleMm
) -> list[tuple[int, int]]:
    """The range of voxels to show along each axis: all labels and predictions, with a margin."""
    box = bounding_box((label > 0) | (prediction > 0)) or tuple(map(slice, label.shape))
    view = []
    for side, size, mm in zip(box, label.shape, spacing_mm, strict=True):
        margin = round(MARGIN_MM / mm)
        view.append((max(0, (side.start or 0) - margin), min(size, side.stop + margin)))
    return view


def _fullest_slices(label: np.ndarray[Any, Any]) -> list[int]:
    """The slice with the most labelled voxels along each axis."""
    labelled = label > 0
    return [
        int(labelled.sum(axis=tuple(a for a in range(3) if a != axis)).argmax())
        for axis in range(3)
    ]
