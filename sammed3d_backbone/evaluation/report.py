"""Scores of many cases -> a CSV table, a JSON summary, and the lines to print."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sammed3d_backbone.evaluation.metrics import mean_of_known


@dataclass(frozen=True)
class CaseScores:
    """Dice of one case, class by class, in the order of the class values."""

    case: str
    dice: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the classes that the case has."""
        return mean_of_known(list(self.dice))


def summarise(scores: Sequence[CaseScores], classes: Sequence[str]) -> dict[str, Any]:
    """Mean Dice per class over cases, and their mean over classes; NaN becomes None."""
    per_class = {
        name: mean_of_known([score.dice[i] for score in scores]) for i, name in enumerate(classes)
    }
    overall = mean_of_known(list(per_class.values()))
    return {
        "mean_dice": _plain(overall),
        "dice": {name: _plain(value) for name, value in per_class.items()},
        "cases": len(scores),
    }


def write_scores(
    folder: Path, scores: Sequence[CaseScores], classes: Sequence[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes ``scores.csv`` (one row per case) and ``scores.json`` (means, cases, `about`).

    Returns:
        The summary, as in the JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["case", *(f"dice_{name}" for name in classes), "dice_mean"])
        for score in scores:
            values = [*score.dice, score.mean]
            table.writerow([score.case, *("" if math.isnan(v) else f"{v:.6f}" for v in values)])
    summary = {**summarise(scores, classes), **about}
    per_case = {s.case: dict(zip(classes, map(_plain, s.dice), strict=True)) for s in scores}
    text = json.dumps({**summary, "per_case": per_case}, indent=1)
    (folder / "scores.json").write_text(text + "\n", encoding="utf-8")
    return summary


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else round(value, 6)
