"""Suspicious properties of a data set: a line each, with the cases to look at.

None of them stops a plan. Cases that cannot be used at all raise a `DatasetError` while the
fingerprint is taken.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sammed3d_backbone.curation.sides import separations_mm
from sammed3d_backbone.data.datasets import read_folds
from sammed3d_backbone.planning.fingerprint import DIRECTIONS, CasePrint, Fingerprint, by_axis

SPACING_FACTOR = 3.0  # between a case's spacing and the median
SCALE_FACTOR = 100.0  # between intensities of two cases
MIN_CASES = 5  # from which on a majority counts
MAJORITY = 0.8  # share of cases in which two classes lie in one order
MARGIN_MM = 5.0  # closer together, two classes have no order
LISTED = 5  # cases named in a line


@dataclass(frozen=True)
class Finding:
    """A suspicious property and the cases that have it."""

    what: str
    cases: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line that names the first cases."""
        more = len(self.cases) - LISTED
        named = ", ".join(self.cases[:LISTED]) + (f" and {more} more" if more > 0 else "")
        return f"{self.what}: {named}" if named else self.what


def find_suspicious(found: Fingerprint, folds: int) -> list[Finding]:
    """The suspicious properties of a data set.

    Args:
        found: The fingerprint.
        folds: Number of random folds if the data set names none.
    """
    findings = [
        *_duplicates(found),
        *_spacings(found),
        *_swapped_sides(found),
        *_mirrored(found),
        *_borders(found),
        *_classes(found),
        *_folds(found, folds),
        *_scales(found),
    ]
    if all(case.case.subject == case.case.id for case in found.cases):
        findings.append(Finding("no subjects are named: each case is taken for another subject"))
    return findings


def one_sided(found: Fingerprint, axis: int) -> list[tuple[str, str, float, list[str]]]:
    """Pairs of classes that lie in one order along an axis in most cases.

    Args:
        found: The fingerprint.
        axis: 0 left-right, 1 back-front, 2 feet-head.

    Returns:
        The class that lies further towards R, A or S, the other, the median distance in mm, and
        the cases in which they lie the other way round.
    """
    pairs = []
    for a, b in itertools.combinations(found.dataset.classes, 2):
        apart = {
            case.case.id: case.structures[a].centre_mm[axis] - case.structures[b].centre_mm[axis]
            for case in found.cases
            if a in case.structures and b in case.structures
        }
        if not apart:
            continue
        middle = float(np.median([*apart.values()]))
        sign = 1.0 if middle > 0 else -1.0
        agree = np.mean([distance * sign > 0 for distance in apart.values()])
        if agree >= MAJORITY:
            against = [name for name, mm in apart.items() if mm * sign < -MARGIN_MM]
            pairs.append(((a, b) if sign > 0 else (b, a), abs(middle), against))
    return [(first, second, mm, against) for (first, second), mm, against in pairs]


def _names(cases: Iterable[CasePrint]) -> tuple[str, ...]:
    return tuple(case.case.id for case in cases)


def _duplicates(found: Fingerprint) -> list[Finding]:
    groups: dict[str, list[CasePrint]] = defaultdict(list)
    for case in found.cases:
        groups[case.content].append(case)
    return [
        Finding("the same scan several times", _names(group))
        for group in groups.values()
        if len(group) > 1
    ]


def _spacings(found: Fingerprint) -> list[Finding]:
    limit = np.log(SPACING_FACTOR)
    odd = [
        case
        for case in found.cases
        if np.abs(np.log(np.divide(case.spacing_mm, found.spacing_mm))).max() >= limit
    ]
    line = (
        f"spacing {SPACING_FACTOR:g} times the median of {by_axis(found.spacing_mm)} mm, or a third"
    )
    named = [f"{case.case.id} ({by_axis(case.spacing_mm)} mm)" for case in odd]
    return [Finding(line, tuple(named))] if odd else []


def _swapped_sides(found: Fingerprint) -> list[Finding]:
    swapped = []
    for case in found.cases:
        x_mm = {name: structure.centre_mm[0] for name, structure in case.structures.items()}
        if any(apart < -MARGIN_MM for apart in separations_mm(x_mm).values()):
            swapped.append(case)
    line = "a class named right lies left of its partner; the scan or its names are mirrored"
    return [Finding(line, _names(swapped))] if swapped else []


def _mirrored(found: Fingerprint) -> list[Finding]:
    """Cases in which all ordered pairs of classes lie the other way round than elsewhere."""
    findings = []
    for axis, direction in enumerate(DIRECTIONS):
        against: Counter[str] = Counter()
        ordered: Counter[str] = Counter()
        for first, second, mm, exceptions in one_sided(found, axis):
            both = [c for c in found.cases if first in c.structures and second in c.structures]
            if mm > MARGIN_MM and len(both) >= MIN_CASES:
                ordered.update(_names(both))
                against.update(exceptions)
        odd = tuple(name for name, n in ordered.items() if against[name] == n)
        if odd:
            line = f"classes lie mirrored against the other cases, {direction}"
            findings.append(Finding(line, odd))
    return findings


def _borders(found: Fingerprint) -> list[Finding]:
    findings = []
    for name in found.dataset.classes:
        cut = [
            case
            for case in found.cases
            if name in case.structures
            and case.structures[name].at_border
            and name not in case.case.truncated
        ]
        if cut:
            total = len(found.of_class(name))
            line = f"{name} touches the volume's border in {len(cut)} of {total} cases"
            findings.append(Finding(line, _names(cut)))
    return findings


def _classes(found: Fingerprint) -> list[Finding]:
    findings = []
    for name in found.dataset.classes:
        having = [case for case in found.cases if name in case.structures]
        lacking = [
            case
            for case in found.cases
            if name not in case.structures and name in (case.case.annotated or [name])
        ]
        if not having:
            findings.append(Finding(f"{name} has no voxel in any case; it cannot be learned"))
        elif lacking:
            line = f"{name} has no voxel in {len(lacking)} of the cases where it was looked for"
            findings.append(Finding(line, _names(lacking)))
    return findings


def _folds(found: Fingerprint, folds: int) -> list[Finding]:
    made = read_folds(found.dataset, folds=folds)
    findings = []
    for name in found.dataset.classes:
        cases = {case.case.id for case in found.cases if name in case.structures}
        inside = [number for number, fold in enumerate(made) if cases & {*fold.val}]
        if len(made) > 1 and len(inside) == 1:
            line = f"{name} occurs in fold {inside[0]} only, whose network cannot learn it"
            findings.append(Finding(line, tuple(sorted(cases))))
    return findings


def _scales(found: Fingerprint) -> list[Finding]:
    tops = [abs(case.inside[0][-1]) for case in found.labelled]
    low, high = min(tops), max(tops)
    line = f"intensities inside labels reach {low:.3g} in one case and {high:.3g} in another"
    return [Finding(line)] if high > SCALE_FACTOR * max(low, 1e-6) else []
