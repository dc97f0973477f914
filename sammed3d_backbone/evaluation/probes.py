"""Probes: simple classifiers of the features of a frozen encoder.

A probe is fitted to voxels of some subjects, the bank, and classifies voxels of others. Every probe
standardises each channel by the bank first, because raw tokens are dominated by a few channels.

`knn` follows DINO (Caron et al., ICCV 2021): the nearest voxels of the bank by cosine vote, each
with the weight exp(cosine / TEMPERATURE). `linear` is logistic regression, `prototype` the nearest
mean of a class among unit vectors. Balanced accuracy by chance is one over the number of classes;
the Dice of a guess depends on how it is skewed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from sammed3d_backbone.evaluation.statistics import Interval, bootstrap_interval

NEIGHBOURS = 20
TEMPERATURE = 0.07


@dataclass(frozen=True, eq=False)
class Voxels:
    """Labelled voxels with their features.

    Shapes:
        features: (N, E).
        values: (N,) integers, the class of each.
        subjects: (N,) names, whose voxel it is.
    """

    features: NDArray[Any]
    values: NDArray[Any]
    subjects: NDArray[Any]

    def __post_init__(self) -> None:
        sizes = (len(self.features), len(self.values), len(self.subjects))
        if len(set(sizes)) > 1 or not sizes[0]:
            raise ValueError(
                f"{sizes[0]} features, {sizes[1]} classes and {sizes[2]} subjects; give one of "
                "each for every voxel, and at least one voxel"
            )


@dataclass(frozen=True)
class ProbeScores:
    """Scores of a probe over the classified subjects, with 95 % intervals.

    Args:
        dice: Dice of each class but background on the classified voxels. With equally many voxels
            of every class it ranks features; in a segmentation, background is more frequent.
        mean_dice: Mean over these classes.
        balanced_accuracy: Mean recall over all classes.
        by_subject: Balanced accuracy of every subject, for paired comparisons.
    """

    dice: dict[str, Interval]
    mean_dice: Interval
    balanced_accuracy: Interval
    by_subject: dict[str, float]


def probe(
    kind: str, bank: Voxels, queries: Voxels, classes: Sequence[str], *, seed: int = 0
) -> ProbeScores:
    """Scores of a classifier that is fitted to the bank, on the voxels of other subjects.

    Args:
        kind: A name in `PROBES`.
        bank: Voxels to fit to.
        queries: Voxels to classify.
        classes: Names of the values 0, 1, ..., background first.
        seed: Seed of the intervals; the probes themselves are deterministic.

    Raises:
        ValueError: If there is no such probe, a subject is on both sides, or the bank is too small.
    """
    if kind not in PROBES:
        raise ValueError(f"unknown probe {kind!r}; choose one of {', '.join(PROBES)}")
    if both := sorted({*bank.subjects.tolist()} & {*queries.subjects.tolist()}):
        raise ValueError(
            f"{len(both)} subjects are in both bank and queries, {both[0]} for one; split by "
            "subject, or the probe recognises the subject"
        )
    known = np.unique(bank.values)
    if len(bank.values) < NEIGHBOURS or len(known) < 2:
        raise ValueError(
            f"a bank of {len(bank.values)} voxels of {len(known)} classes; draw at least "
            f"{NEIGHBOURS} voxels of two classes"
        )
    named = PROBES[kind]().fit(bank.features, bank.values).predict(queries.features)
    return _scores(named, queries, classes, seed)


def _scores(named: NDArray[Any], queries: Voxels, classes: Sequence[str], seed: int) -> ProbeScores:
    """Scores per subject and class, and their means; a class that a subject lacks is left out."""
    subjects, names, dice, found = [], [], [], []
    by_subject = {}
    for subject in np.unique(queries.subjects).tolist():
        own = queries.subjects == subject
        _, recall, f1, voxels = precision_recall_fscore_support(
            queries.values[own], named[own], labels=range(len(classes)), zero_division=0
        )
        by_subject[subject] = float(recall[voxels > 0].mean())
        for value in np.flatnonzero(voxels).tolist():
            subjects.append(subject)
            names.append(classes[value])
            dice.append(float(f1[value]))
            found.append(float(recall[value]))

    def mean_dice(of: Sequence[str]) -> Interval:
        kept = [d if name in of else math.nan for name, d in zip(names, dice, strict=True)]
        return bootstrap_interval(kept, subjects, classes=names, seed=seed)

    return ProbeScores(
        dice={name: mean_dice([name]) for name in classes[1:]},
        mean_dice=mean_dice(classes[1:]),
        balanced_accuracy=bootstrap_interval(found, subjects, classes=names, seed=seed),
        by_subject=by_subject,
    )


def _votes(distances: NDArray[Any]) -> NDArray[Any]:
    """Weights of neighbours by the distance between unit vectors, whose square is 2 - 2 cosine."""
    votes: NDArray[Any] = np.exp((1 - distances**2 / 2) / TEMPERATURE)
    return votes


PROBES: dict[str, Callable[[], Pipeline]] = {
    "knn": lambda: make_pipeline(
        StandardScaler(), Normalizer(), KNeighborsClassifier(NEIGHBOURS, weights=_votes)
    ),
    "linear": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    "prototype": lambda: make_pipeline(StandardScaler(), Normalizer(), NearestCentroid()),
}
