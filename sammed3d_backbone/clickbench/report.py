"""Summary and page of a finished run: curves, tables, time per click, the worst targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import ndimage

from sammed3d_backbone.clickbench.cases import ClickSet, ClickTarget
from sammed3d_backbone.clickbench.journal import (
    Key,
    Line,
    key_of,
    mask_path,
    read_journal,
    read_times,
)
from sammed3d_backbone.clickbench.presets import rules_of
from sammed3d_backbone.clickbench.summary import (
    REPORTED,
    reported_steps,
    summarise_clicks,
    times_by_part,
)
from sammed3d_backbone.console import optional
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.figures import COLOURS, Shown, as_svg, cases_figure
from sammed3d_backbone.evaluation.page import png, write_page
from sammed3d_backbone.files import write_json

WORST = 3  # targets that are drawn
STARTS = {
    "centre": "the first click at the centre of the object's largest part",
    "random": "the first click anywhere in the object",
    "deep": "the first click deep inside the object",
}


def write_click_report(folder: Path, click_set: ClickSet, machine: Mapping[str, Any]) -> Path:
    """Writes ``summary.json``, ``worst.png`` and ``report.html`` of a finished run."""
    header, lines = read_journal(folder)
    rules = rules_of(header["protocol"])
    summary = {
        "header": header,
        **summarise_clicks(lines, rules.published),
        "machine": dict(machine),
        "seconds": times_by_part(read_times(folder)),
    }
    write_json(folder / "summary.json", summary)
    with optional(folder / "worst.png"):
        worst = [
            _shown(folder, line, click_set.target(line["case"], line["class"]))
            for line in _worst_targets(lines)
        ]
        if worst:
            cases_figure(folder / "worst.png", worst, ["object"])
    return write_page(
        folder / "report.html",
        "clickbench/report.html",
        title=f"{header['protocol']} on {header['dataset']}",
        header=header,
        notes=_notes(header, summary),
        summary=summary,
        figures=REPORTED,
        reported_steps=reported_steps,
        curves=Markup(_curves(summary["tracks"])),
        dice_heads={
            track: [f"Dice, {step}" for step in reported_steps(found["steps"])]
            for track, found in summary["tracks"].items()
        },
        starts=STARTS,
        worst=png(folder / "worst.png"),
        rules=rules,
        run={name: _as_text(value) for name, value in {**header, **machine}.items() if value},
    )


def _notes(header: Line, summary: Mapping[str, Any]) -> list[str]:
    """Notes that stand above the figures."""
    notes = []
    if header["oracle"]:
        notes.append(f"ORACLE. This protocol takes from the truth: {header['oracle']}.")
    missing = set(rules_of(header["protocol"]).tracks) - set(summary["tracks"])
    if missing:
        notes.append(f"The protocol also has {', '.join(sorted(missing))} starts; run them too.")
    notes += [header["note"], header.get("pretraining", "")]
    if all(found["subjects"] < 2 for found in summary["tracks"].values()):
        notes.append("One subject only: there are no intervals.")
    return notes


def _curves(tracks: Mapping[str, Any]) -> str:
    """Every score over the clicks, as an SVG element."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, (name, (title, _)) in zip(
        figure.subplots(1, len(REPORTED)), REPORTED.items(), strict=True
    ):
        for colour, (track, found) in zip(COLOURS, tracks.items(), strict=False):
            _draw(axes, found["curve"][name], track, colour)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("clicks", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.set_ylim(0, None if name == "hd95_mm" else 1)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return as_svg(figure)


def _draw(axes: Axes, curve: Sequence[Sequence[float | None]], name: str, colour: str) -> None:
    """One curve with the band of its intervals."""
    mean, low, high = np.array(curve, dtype=float).T
    clicks = np.arange(1, len(mean) + 1)
    axes.plot(clicks, mean, color=colour, label=name, marker="o", markersize=3, linewidth=1.3)
    axes.fill_between(clicks, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xticks(clicks)


def _worst_targets(lines: Sequence[Line]) -> list[Line]:
    """The last lines of the targets with the lowest Dice, each target once."""
    last: dict[Key, Line] = {key_of(line): line for line in lines if "dropped" not in line}
    worst: dict[tuple[str, str], Line] = {}
    for line in sorted(last.values(), key=lambda line: line["dice"]):
        worst.setdefault((line["case"], line["class"]), line)
    return list(worst.values())[:WORST]


def _shown(folder: Path, line: Line, target: ClickTarget) -> Shown:
    """A target for drawing; a mask on a crop's grid is brought back by nearest voxels."""
    mask = Volume.load(mask_path(folder, line))
    image = target.image
    native = ndimage.affine_transform(
        mask.array,
        np.linalg.inv(mask.affine) @ image.affine,
        output_shape=image.shape,
        order=0,
    )
    title = f"{line['case']}, {line['class']}\n{line['first']}: Dice {line['dice']:.3f}"
    truth, found = (Volume(a.astype(np.uint8), image.affine) for a in (target.truth, native))
    return Shown(title, image, truth, found)


def _as_text(value: object) -> str:
    """A value of the header."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
