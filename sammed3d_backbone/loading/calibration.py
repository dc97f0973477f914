"""Calibration of the Dice that is predicted for a mask after clicks."""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGEST = 100.0  # of the numbers of a calibration; fitted ones are near 1
LEAST = 0.01  # a confidence below this, or above 1 minus this, counts as this


@dataclass(frozen=True)
class DiceCalibration:
    """How the Dice to expect follows from a mask's confidence, fitted on held-out patients.

    logit(expected) = intercept + slope * logit(confidence) + per_click * log(clicks). The
    confidence is the soft Dice of a mask with its own probabilities. It ranks masks better than
    the estimate that SAM's decoders have an output for (`iou_predictions`), see the log of studies.

    Args:
        intercept: See above.
        slope: See above.
        per_click: See above; a mask prompt without clicks counts as one click.

    Raises:
        ValueError: If a number is not finite, or larger than `LARGEST`.
    """

    intercept: float = 0.0
    slope: float = 1.0
    per_click: float = 0.0

    def __post_init__(self) -> None:
        if not all(abs(n) <= LARGEST for n in (self.intercept, self.slope, self.per_click)):
            raise ValueError(f"{self}: expected numbers from -{LARGEST:g} to {LARGEST:g}")

    def __str__(self) -> str:
        """One line."""
        return (
            f"logit = {self.intercept:g} {self.slope:+g} logit(confidence) "
            f"{self.per_click:+g} log(clicks)"
        )

    def expected(self, confidence: float, clicks: int) -> float:
        """The Dice to expect after a number of clicks on the object; between 0 and 1."""
        value = min(max(confidence, LEAST), 1 - LEAST)
        logit = math.log(value / (1 - value))
        shifted = self.intercept + self.slope * logit + self.per_click * math.log(max(clicks, 1))
        return 1 / (1 + math.exp(min(-shifted, 700)))
