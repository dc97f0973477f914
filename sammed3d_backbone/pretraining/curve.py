"""The log of a pretraining as one picture, which is redrawn at every validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sammed3d_backbone.files import atomic_path

POINTS = 60  # points of a training curve; each is a mean over equally many lines of the log
TRAINING = {"dice_first": "first click", "dice_last": "last click", "dense_dice": "classes"}


def draw_training_curve(path: Path, log: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG: validation Dice after each scored click, training Dice, and the loss.

    Args:
        path: The picture.
        log: Lines of `Run.records`; those with a loss are training steps, the others validations.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [line for line in log if "loss" in line]
    scored = [line for line in log if "loss" not in line]
    figure = Figure(figsize=(15, 4), layout="constrained")
    FigureCanvasAgg(figure)
    apart, training, loss = figure.subplots(1, 3)
    for key in sorted({key for line in scored for key in line if key.startswith("dice_")}):
        known = [line for line in scored if key in line]
        style = "-" if key.count("_") == 1 else ":"  # dotted: one source
        points = [line["step"] for line in known], [100 * line[key] for line in known]
        apart.plot(*points, style, marker=".", label=key.removeprefix("dice_").replace("_", ", "))
    for key, label in TRAINING.items():
        if not any(key in line for line in trained):
            continue
        steps, means = _smoothed([line for line in trained if key in line], key)
        training.plot(steps, [100 * mean for mean in means], label=label)
    loss.plot(*_smoothed(trained, "loss"))
    for axes, title in (
        (apart, "validation crops, by clicks and source"),
        (training, "training crops"),
        (loss, "training crops"),
    ):
        axes.set(title=title, xlabel="step", ylabel="loss" if axes is loss else "Dice (%)")
        axes.grid(alpha=0.3)
    for axes in (apart, training):
        if axes.lines:
            axes.legend(fontsize=7)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=100, format="png")


def _smoothed(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Last steps and means of equally many lines each."""
    parts = [part for part in np.array_split(np.arange(len(lines)), POINTS) if len(part)]
    steps = [int(lines[part[-1]]["step"]) for part in parts]
    return steps, [float(np.mean([lines[number][key] for number in part])) for part in parts]
