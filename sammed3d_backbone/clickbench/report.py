"""A finished run -> summary.json and a page: curves, tables, time per click, the worst targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
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
    reported_steps,
    summarise_clicks,
    times_by_part,
)
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.figures import COLOURS, Shown, as_svg, cases_figure
from sammed3d_backbone.evaluation.page import facts, heading, page, picture, table, tiles
from sammed3d_backbone.evaluation.statistics import Interval, format_number
from sammed3d_backbone.files import write_json, write_text

WORST = 3  # targets that are drawn
STARTS = {
    "centre": "the first click at the centre of the object's largest part",
    "random": "the first click anywhere in the object",
    "deep": "the first click deep inside the object",
}
MEANINGS = {
    "Dice": "overlap of mask and truth, 0 to 1",
    "NSD": "share of both surfaces within 2 mm of each other, 0 to 1",
    "HD95": "95th percentile of the distances between the surfaces, in mm, smaller is better; the "
    "volume's diagonal where the mask is empty",
    "nAUC": "area under the Dice curve over the clicks, 0 to 1",
    "clicks to 0.8, 0.9": "mean number of clicks until that Dice; targets that never get there "
    "count with the whole budget, and their share stands beside it",
    "regret": "best Dice of all steps minus the last one: what going on costs",
    "lowered": "share of corrections after which Dice was lower than before",
    "honoured": "share of clicks that the very next mask agrees with",
    "kept": "share of all clicks that the last mask agrees with",
    "repeats": "share of clicks whose best voxel had been clicked before, so that the next best "
    "was taken",
    "slices R, A, S": "mean Dice of neighbouring slices of the last mask along that axis, minus "
    "the same of the truth: far below 0 where a mask flickers from slice to slice",
    "volume error": "how far the last mask's volume is off, as a share of the truth's",
    "class-first, case-first": "mean of the classes' means, mean of the cases' means",
}


def write_click_report(folder: Path, click_set: ClickSet, machine: Mapping[str, Any]) -> Path:
    """Writes ``summary.json``, ``worst.png`` and ``report.html`` of a finished run.

    Args:
        folder: With ``clicks.jsonl``, ``times.jsonl`` and masks.
        click_set: What was played, for the images of the worst targets.
        machine: Where it ran, see `provenance`.
    """
    header, lines = read_journal(folder)
    rules = rules_of(header["protocol"])
    summary = {
        "header": header,
        **summarise_clicks(lines, rules.published),
        "machine": dict(machine),
    }
    seconds = times_by_part(read_times(folder))
    summary["seconds"] = seconds
    write_json(folder / "summary.json", summary)
    worst = [
        _shown(folder, line, click_set.target(line["case"], line["class"]))
        for line in _worst_targets(lines)
    ]
    if worst:
        cases_figure(folder / "worst.png", worst, ["object"])
    sections = [
        _head(header, summary),
        _curves(summary),
        _steps(summary),
        _behaviour(summary),
        _classes(summary),
        _times(seconds),
        _worst(folder / "worst.png") if worst else "",
        _published(summary, rules.source, rules.differs),
        _dropped(summary),
        "<h2>What the figures mean</h2>" + facts(MEANINGS),
        "<h2>Run</h2>" + facts({k: _told(v) for k, v in {**header, **machine}.items()}),
    ]
    write_text(folder / "report.html", page(_title(header), sections))
    return folder / "report.html"


def _title(header: Line) -> str:
    return f"{header['protocol']} on {header['dataset']}"


def _head(header: Line, summary: Mapping[str, Any]) -> str:
    """What it is, what has to be known before believing it, and the main figures."""
    notes = []
    if header["oracle"]:
        notes.append(f"ORACLE. This protocol takes from the truth: {header['oracle']}.")
    missing = set(rules_of(header["protocol"]).tracks) - set(summary["tracks"])
    if missing:
        notes.append(f"The protocol asks for {', '.join(sorted(missing))} starts as well.")
    notes += [header["note"], header.get("pretraining", "")]
    if all(found["subjects"] < 2 for found in summary["tracks"].values()):
        notes.append("One subject only: there are no intervals.")
    shown = []
    for track, found in summary["tracks"].items():
        for step in sorted({1, found["steps"]}):
            dice = Interval.from_json(found["curve"]["dice"][step - 1])
            name = f"Dice after {step} click{'s' * (step > 1)}, {track}"
            shown.append((name, format_number(dice.mean), dice.bounds()))
    below = (
        f"{header['model']}; 95 % bootstrap intervals of means over targets, drawing whole subjects"
    )
    return heading(_title(header), below, notes) + tiles(shown)


def _curves(summary: Mapping[str, Any]) -> str:
    """Dice, NSD and HD95 over the clicks."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    panels = (("dice", "Dice"), ("nsd_2mm", "NSD at 2 mm"), ("hd95_mm", "HD95, mm"))
    for axes, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for colour, (track, found) in zip(COLOURS, summary["tracks"].items(), strict=False):
            _draw(axes, found["curve"][name], track, colour)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("clicks", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.set_ylim(0, None if name == "hd95_mm" else 1)
    figure.axes[0].legend(fontsize=8, frameon=False)
    starts = "; ".join(f"{t}: {STARTS[t]}" for t in summary["tracks"])
    return (
        f"<h2>Curves</h2><figure>{as_svg(figure)}<figcaption>Mean over targets and its interval. "
        f"{escape(starts)}.</figcaption></figure>"
    )


def _draw(axes: Axes, curve: Sequence[Sequence[float | None]], name: str, colour: str) -> None:
    """One curve with the band of its intervals."""
    mean, low, high = np.array(curve, dtype=float).T
    clicks = np.arange(1, len(mean) + 1)
    axes.plot(clicks, mean, color=colour, label=name, marker="o", markersize=3, linewidth=1.3)
    axes.fill_between(clicks, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xticks(clicks)


def _steps(summary: Mapping[str, Any]) -> str:
    """Every metric after 1, 2, 3, 5 and 10 clicks."""
    rows = []
    for track, found in summary["tracks"].items():
        for step in reported_steps(found["steps"]):
            values = [
                _cell(found["curve"][name][step - 1], form)
                for name, form in (("dice", ".3f"), ("nsd_2mm", ".3f"), ("hd95_mm", ".1f"))
            ]
            rows.append([escape(track), str(step), *values])
    head = ["start", "clicks", "Dice", "NSD at 2 mm", "HD95, mm"]
    caption = "Small: 95 % bootstrap interval, drawing subjects."
    return "<h2>After so many clicks</h2>" + table(head, rows, caption=caption)


def _behaviour(summary: Mapping[str, Any]) -> str:
    """What clicking does, one column per track."""
    tracks = summary["tracks"]
    rows: list[tuple[str, Any]] = [
        ("nAUC", lambda t: _cell(t["nauc"])),
        ("clicks to 0.8", lambda t: _censored(t["noc80"])),
        ("clicks to 0.9", lambda t: _censored(t["noc90"])),
        ("Dice at the end, class-first", lambda t: _cell(t["class_first"])),
        ("Dice at the end, case-first", lambda t: format_number(_float(t["case_first"]))),
        ("regret", lambda t: _cell(t["regret"])),
        ("lowered", lambda t: _share(t["lowered"])),
        ("honoured", lambda t: _share(t["honoured"])),
        ("kept", lambda t: _share(t["kept"])),
        ("repeats", lambda t: _share(t["repeats"])),
        *(
            (f"slices {axis}", lambda t, axis=axis: _cell(t["slices"][axis]))
            for axis in ("R", "A", "S")
        ),
        ("volume error", lambda t: _cell(t["volume_error"])),
        ("failures", lambda t: str(t["failures"])),
    ]
    body = [[name, *(show(found) for found in tracks.values())] for name, show in rows]
    caption = "What each line means stands at the end of the page."
    return "<h2>What clicking does</h2>" + table(["", *map(escape, tracks)], body, caption=caption)


def _classes(summary: Mapping[str, Any]) -> str:
    """One row per class and track."""
    text = ""
    for track, found in summary["tracks"].items():
        steps = reported_steps(found["steps"])
        rows = [
            [
                escape(name),
                str(row["targets"]),
                *(format_number(_float(row["dice"][str(step)])) for step in steps),
                format_number(_float(row["nsd_2mm"])),
                format_number(_float(row["hd95_mm"]), ".1f"),
                format_number(_float(row["nauc"])),
                format_number(_float(row["noc90"]), ".1f"),
                format_number(_float(row["regret"])),
            ]
            for name, row in found["classes"].items()
        ]
        head = [
            "class",
            "targets",
            *(f"Dice, {step}" for step in steps),
            "NSD",
            "HD95, mm",
            "nAUC",
            "clicks to 0.9",
            "regret",
        ]
        caption = f"Dice after so many clicks, NSD and HD95 after {found['steps']}. A click on a "
        text += f"<h2>Per class, {escape(track)}</h2>" + table(
            head, rows, caption=f"{caption}column's head sorts.", kind="sortable"
        )
    return text


def _times(seconds: Mapping[str, Any]) -> str:
    """Seconds by part."""
    rows = [
        [
            f"{escape(kind)}: {escape(part)}",
            str(found["answers"]),
            f"{found['median']:.3f}",
            f"{found['p95']:.3f}",
        ]
        for kind, parts in seconds["parts"].items()
        for part, found in parts.items()
    ]
    if not rows:
        return ""
    caption = (
        '"click" is the whole of one answer, "set_volume" what comes before the first; other parts '
        "are those that the object tells."
    )
    if seconds["peak_rss_mib"]:
        caption += f" Peak memory of the process: {seconds['peak_rss_mib']:,.0f} MiB."
    head = ["part", "answers", "median, s", "95th percentile, s"]
    return "<h2>Time per click</h2>" + table(head, rows, caption=caption)


def _worst(path: Path) -> str:
    caption = (
        "Last masks with the lowest Dice, each target once. Solid: truth, dotted: mask. Planes "
        "through the slices where the truth is largest; the patient's right is on the right."
    )
    alt = "outlines of truth and mask on three planes"
    return "<h2>Worst targets</h2>" + picture(path.read_bytes(), alt, caption)


def _published(summary: Mapping[str, Any], source: str, differs: str) -> str:
    """The figures as the protocol was published with them."""
    rows = [
        [f"{escape(name)}, {escape(track)}", format_number(_float(value))]
        for track, found in summary["tracks"].items()
        for name, value in found.get("published", {}).items()
    ]
    if not rows:
        return ""
    caption = f"As in {source}." + (f" Different here: {differs}." if differs else "")
    return "<h2>As published</h2>" + table(["figure", "value"], rows, caption=caption)


def _dropped(summary: Mapping[str, Any]) -> str:
    rows = [
        [escape(entry["case"]), escape(entry["class"]), escape(entry["reason"])]
        for entry in summary["dropped"]
    ]
    if not rows:
        return ""
    head, caption = ["case", "class", "why"], "These are in no mean."
    return "<h2>Targets left out</h2>" + table(head, rows, caption=caption)


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


def _cell(interval: Sequence[float | None], form: str = ".3f") -> str:
    """A mean with its bounds beside it."""
    given = Interval.from_json(interval)
    return f"{format_number(given.mean, form)} <small>{given.bounds(form)}</small>"


def _censored(clicks: Mapping[str, Any]) -> str:
    """Clicks needed, and how many targets never got there."""
    return f"{_cell(clicks['clicks'], '.1f')} <small>{clicks['failed']:.0%} never</small>"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _told(value: object) -> str:
    """A header's value as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")
