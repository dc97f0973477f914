"""Calibration of the Dice that a promptable network predicts for its own mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST = 0.01  # predicted Dice below this, or above 1 minus this, counts as this


@dataclass(frozen=True)
class DiceCalibration:
    """The Dice to expect from the Dice that a network predicts, fitted on held-out patients.

    logit(expected) = intercept + slope * logit(predicted) + per_click * log(clicks)

    Args:
        intercept: See above.
        slope: See above.
        per_click: See above; a mask prompt without clicks counts as one click.
    """

    intercept: float = 0.0
    slope: float = 1.0
    per_click: float = 0.0

    def __str__(self) -> str:
        """One line."""
        return (
            f"logit = {self.intercept:g} {self.slope:+g} logit(predicted) "
            f"{self.per_click:+g} log(clicks)"
        )

    def expected(self, predicted_dice: float, clicks: int) -> float:
        """The Dice to expect after a number of clicks on the object; between 0 and 1."""
        value = min(max(predicted_dice, LEAST), 1 - LEAST)
        logit = math.log(value / (1 - value))
        shifted = self.intercept + self.slope * logit + self.per_click * math.log(max(clicks, 1))
        return 1 / (1 + math.exp(-shifted))
