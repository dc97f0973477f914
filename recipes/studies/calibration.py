"""The calibration of a predicted Dice, fitted on the scores of a click study.

The study must have been played on patients that neither trained the weights nor report them
(`click_calibration.yaml`), with the confidence in place of a predicted Dice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sammed3d_backbone.recipes.studies import tables
from scipy.optimize import least_squares

from sammed3d_backbone.loading.calibration import DiceCalibration


def fit_calibration(results: Path, run: str) -> DiceCalibration:
    """The calibration with the least squared error, every class and every click the same weight.

    Args:
        results: Folder of the click study.
        run: Player whose clicks were given as the predictor gives them.

    Raises:
        FileNotFoundError: If the study has no scores of this player.
    """
    scores = tables.read(results, "scores")
    if scores.empty or run not in set(scores["run"]):
        raise FileNotFoundError(f"{results} holds no scores of {run!r}; run click_study.py first")
    rows = scores[scores["run"] == run].dropna(subset="predicted_dice")
    weights = np.sqrt(1 / rows.groupby(["class", "step"])["case"].transform("count"))

    def errors(values: np.ndarray) -> np.ndarray:
        calibration = DiceCalibration(*values)
        pairs = zip(rows["predicted_dice"], rows["step"], strict=True)
        expected = np.array([calibration.expected(*pair) for pair in pairs])
        return np.asarray(weights * (expected - rows["dice"]))

    found = least_squares(errors, np.array([0.0, 1.0, 0.0]))
    return DiceCalibration(*(round(float(value), 4) for value in found.x))
