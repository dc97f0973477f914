"""Bootstrap intervals of means over observations that are grouped by subject."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 5000


class Interval(NamedTuple):
    """A mean and its confidence bounds; NaN where they are undefined."""

    mean: float
    low: float
    high: float

    @classmethod
    def from_json(cls, values: Sequence[float | None]) -> Interval:
        """The interval of a list [mean, low, high] in which None stands for NaN."""
        return cls(*(math.nan if value is None else value for value in values))

    def __format__(self, form: str) -> str:
        """For example "0.378 (0.331 to 0.425)"; without the bounds where there are none."""
        mean = format_number(self.mean, form)
        return f"{mean} ({self.bounds(form)})" if self.bounds(form) else mean

    def bounds(self, form: str = ".3f") -> str:
        """For example "0.331 to 0.425"; empty where there are none."""
        if math.isnan(self.low):
            return ""
        return f"{format_number(self.low, form)} to {format_number(self.high, form)}"


def format_number(value: float, form: str = ".3f") -> str:
    """A number for a reader: "-" for NaN, "∞" for infinity."""
    if math.isnan(value):
        return "-"
    return "∞" if math.isinf(value) else format(value, form or ".3f")


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    draws: Sequence[str] | None = None,
    seed: int = 0,
) -> Interval:
    """Mean of some values and its 95 % percentile interval, drawing whole groups with replacement.

    Two scans of one subject are not independent; with the subject as their group they are drawn
    together. For a paired comparison pass differences. Values that are not finite are left out. The
    bounds are NaN where fewer than two groups are left.

    Args:
        values: One per observation.
        groups: Subject of each value; None: every value is a group of its own.
        classes: Class of each value; the mean is then that of the classes' means, so that a class
            with few values counts like the others. None: one class.
        draws: Repetition of an experiment that each value is from, such as the draw of training
            cases. Repetitions and groups are drawn independently of each other. None: one
            repetition.
        seed: Seed of the bootstrap.
    """
    given = np.asarray(values, dtype=float)
    known = np.isfinite(given)
    if not known.any():
        return Interval(math.nan, math.nan, math.nan)
    draw = _numbered([""] * len(given) if draws is None else draws, known)
    subject = _numbered(range(len(given)) if groups is None else groups, known)
    cells, cell = np.unique(np.stack([draw, subject]), axis=1, return_inverse=True)
    cell = cell.reshape(-1)
    kind = _numbered([""] * len(given) if classes is None else classes, known)
    sums = np.zeros((cell.max() + 1, kind.max() + 1))  # (C, K)
    counts = np.zeros_like(sums)
    np.add.at(sums, (cell, kind), given[known])
    np.add.at(counts, (cell, kind), 1)

    def mean(drawn: NDArray[Any]) -> NDArray[np.float64]:
        """Mean over classes for each row of how often every cell was drawn, (R, C) -> (R,)."""
        with np.errstate(invalid="ignore"):  # a class that no drawn cell has is left out
            means: NDArray[np.float64] = np.nanmean((drawn @ sums) / (drawn @ counts), axis=1)
            return means

    (centre,) = mean(np.ones((1, len(sums))))
    subjects = subject.max() + 1
    if subjects < 2:
        return Interval(float(centre), math.nan, math.nan)
    rng = np.random.default_rng(seed)
    of_draw, of_subject = (
        rng.multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
        for number in (draw.max() + 1, subjects)
    )
    drawn = of_draw[:, cells[0]] * of_subject[:, cells[1]]  # (R, C)
    drawn = drawn[drawn.any(axis=1)]  # repetitions without a common subject may leave a row empty
    low, high = np.quantile(mean(drawn), [0.025, 0.975])
    return Interval(float(centre), float(low), float(high))


def _numbered(names: Sequence[object], known: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The kept names as 0, 1, 2, ..."""
    return np.unique(np.asarray(names)[known], return_inverse=True)[1]
