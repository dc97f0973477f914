"""Summary of the lines of a result file, and the paired difference of two files.

Tracks (first clicks at the centre, or anywhere) are never mixed. Intervals hold the mean over
targets with 95 %, drawing whole subjects; see `statistics`.

The figures are defined in the last section of ``report.html``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.clickbench.journal import Key, Line, key_of
from sammed3d_backbone.clickbench.scoring import plain
from sammed3d_backbone.evaluation.statistics import Interval, bootstrap_interval

# Scores of a line that reports show: title and format.
REPORTED = {
    "dice": ("Dice", ".3f"),
    "nsd_2mm": ("NSD at 2 mm", ".3f"),
    "hd95_mm": ("HD95, mm", ".1f"),
}
FIGURES = (*REPORTED, "nsd", "volume_error", "agreement", "agreement_all")
CVPR25_LOWEST_DICE = 0.2  # up to which the challenge's NSD of a case is 0


@dataclass(frozen=True, eq=False)
class Played:
    """All steps of one target and track.

    Shapes:
        values: figure -> (steps,); NaN where it is undefined.
        slices: (steps, 3), along R, A, S.
        clicks: (steps,) integers, new clicks of the step.
    """

    key: Key
    subject: str
    values: Mapping[str, NDArray[np.float64]]
    slices: NDArray[np.float64]
    clicks: NDArray[np.int64]
    repeats: int
    failures: int

    @property
    def dice(self) -> NDArray[np.float64]:
        """After every step."""
        return self.values["dice"]

    @property
    def nauc(self) -> float:
        """Area under the Dice curve over its width; NaN for a single step."""
        return _area(self.dice) / (len(self.dice) - 1) if len(self.dice) > 1 else math.nan

    @property
    def regret(self) -> float:
        """Best Dice minus the last."""
        return float(self.dice.max() - self.dice[-1])

    def clicks_to(self, dice: float) -> int | None:
        """Steps until a Dice is reached; None if it is not."""
        reached = np.flatnonzero(self.dice >= dice)
        return int(reached[0]) + 1 if len(reached) else None


def played_targets(lines: Iterable[Line]) -> list[Played]:
    """The targets of a file that were not dropped, in its order."""
    grouped: dict[Key, list[Line]] = {}
    for line in lines:
        if "dropped" not in line:
            grouped.setdefault(key_of(line), []).append(line)
    return [
        Played(
            key=key,
            subject=group[0]["subject"],
            values={name: _numbers(line[name] for line in group) for name in FIGURES},
            slices=np.stack([_numbers(line["slices"]) for line in group]),
            clicks=np.array([len(line["clicks"]) for line in group]),
            repeats=sum(click["repeat"] for line in group for click in line["clicks"]),
            failures=sum(bool(line["failure"]) for line in group),
        )
        for key, group in grouped.items()
    ]


def summarise_clicks(lines: Sequence[Line], published: str = "") -> dict[str, Any]:
    """All figures of a report, by track; ready for JSON.

    Args:
        lines: Lines of a result file.
        published: Name of the published figures of the protocol; "" for none.
    """
    played = played_targets(lines)
    tracks: dict[str, Any] = {}
    for track in dict.fromkeys(target.key[2] for target in played):
        targets = [target for target in played if target.key[2] == track]
        tracks[track] = _track(targets)
        if published:
            tracks[track]["published"] = {
                name: plain(value) for name, value in PUBLISHED[published](targets).items()
            }
    dropped = {
        (line["case"], line["class"]): line["dropped"] for line in lines if "dropped" in line
    }
    return {
        "tracks": tracks,
        "dropped": [{"case": c, "class": k, "reason": why} for (c, k), why in dropped.items()],
    }


def compare_runs(one: Sequence[Line], other: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """The other file's figures minus the one's, target by target, by track.

    Raises:
        ValueError: If the files share no target.
    """
    ours, theirs = ({t.key: t for t in played_targets(lines)} for lines in (one, other))
    shared = [key for key in ours if key in theirs]
    if not shared:
        raise ValueError("the two files share no target; compare runs on the same data")
    found: dict[str, dict[str, Any]] = {}
    for track in dict.fromkeys(key[2] for key in shared):
        pairs = [(ours[key], theirs[key]) for key in shared if key[2] == track]
        steps = min(len(target.dice) for pair in pairs for target in pair)
        measured: dict[str, Callable[[Played], float]] = {
            **{f"dice, click {n}": _at("dice", n) for n in reported_steps(steps)},
            **({"nauc": lambda target: target.nauc} if steps > 1 else {}),
            f"nsd_2mm, click {steps}": _at("nsd_2mm", steps),
            f"hd95_mm, click {steps}": _at("hd95_mm", steps),
            "regret": lambda target: target.regret,
        }
        found[track] = {
            "targets": len(pairs),
            "subjects": len({target.subject for target, _ in pairs}),
            "difference": {
                name: _interval(
                    [measure(new) - measure(old) for old, new in pairs], [t for t, _ in pairs]
                )
                for name, measure in measured.items()
            },
        }
    return found


def times_by_part(times: Iterable[Line]) -> dict[str, Any]:
    """Median and 95th percentile of every part, apart for a volume's first answer and later ones.

    The first answer after a volume was set contains the work that is done once per volume.
    """
    spent: dict[str, dict[str, list[float]]] = {}
    peak = 0.0
    for line in times:
        kind = "first answer on a volume" if "set_volume" in line["seconds"] else "later clicks"
        for part, value in line["seconds"].items():
            spent.setdefault(kind, {}).setdefault(part, []).append(value)
        peak = max(peak, line["peak_rss_mib"])
    parts = {
        kind: {
            part: {
                "answers": len(values),
                "median": round(float(np.median(values)), 4),
                "p95": round(float(np.percentile(values, 95)), 4),
            }
            for part, values in found.items()
        }
        for kind, found in spent.items()
    }
    return {"parts": parts, "peak_rss_mib": peak or None}


def reported_steps(steps: int) -> list[int]:
    """The steps that reports show: 1, 2, 3, 5, 10 and the last."""
    return sorted({n for n in (1, 2, 3, 5, 10) if n <= steps} | {steps})


def _track(targets: Sequence[Played]) -> dict[str, Any]:
    """The figures of one track."""
    steps = len(targets[0].dice)
    last = [target.dice[-1] for target in targets]
    corrections = sum(int((target.clicks[1:] > 0).sum()) for target in targets)
    lowered = sum(int(((np.diff(t.dice) < 0) & (t.clicks[1:] > 0)).sum()) for t in targets)
    clicks = sum(int(target.clicks.sum()) for target in targets)
    at_once = sum(float(np.nansum(t.values["agreement"] * t.clicks)) for t in targets)
    slices = np.stack([target.slices[-1] for target in targets])
    return {
        "targets": len(targets),
        "cases": len({target.key[0] for target in targets}),
        "subjects": len({target.subject for target in targets}),
        "steps": steps,
        "curve": {
            name: [_interval([t.values[name][i] for t in targets], targets) for i in range(steps)]
            for name in (*REPORTED, "nsd")
        },
        "class_first": _interval(last, targets, classes=True),
        "case_first": plain(_mean_of_means(last, [target.key[0] for target in targets])),
        "nauc": _interval([target.nauc for target in targets], targets),
        "noc80": _clicks_to(0.8, targets),
        "noc90": _clicks_to(0.9, targets),
        "best": _interval([target.dice.max() for target in targets], targets),
        "regret": _interval([target.regret for target in targets], targets),
        "lowered": plain(lowered / corrections if corrections else math.nan),
        "agreement": plain(at_once / clicks),
        "agreement_all": plain(
            float(np.mean([target.values["agreement_all"][-1] for target in targets]))
        ),
        "repeats": plain(sum(target.repeats for target in targets) / clicks),
        "failures": sum(target.failures for target in targets),
        "volume_error": _interval([abs(t.values["volume_error"][-1]) for t in targets], targets),
        "slices": {
            axis: _interval(slices[:, i], targets) for i, axis in enumerate(("R", "A", "S"))
        },
        "classes": {
            name: _class_row([target for target in targets if target.key[1] == name])
            for name in dict.fromkeys(target.key[1] for target in targets)
        },
    }


def _class_row(targets: Sequence[Played]) -> dict[str, Any]:
    """The figures of one class."""
    steps = len(targets[0].dice)
    return {
        "targets": len(targets),
        "dice": {str(n): _mean(_at("dice", n), targets) for n in reported_steps(steps)},
        "nsd_2mm": _mean(_at("nsd_2mm", steps), targets),
        "hd95_mm": _mean(_at("hd95_mm", steps), targets),
        "nauc": _mean(lambda target: target.nauc, targets),
        "noc90": _clicks_to(0.9, targets)["clicks"][0],
        "regret": _mean(lambda target: target.regret, targets),
    }


def _clicks_to(dice: float, targets: Sequence[Played]) -> dict[str, Any]:
    """Mean clicks to a Dice, and the share of targets that do not reach it."""
    needed = [target.clicks_to(dice) for target in targets]
    counted = [len(t.dice) if n is None else n for t, n in zip(targets, needed, strict=True)]
    return {
        "clicks": _interval(counted, targets),
        "failed": plain(needed.count(None) / len(needed)),
    }


def _best_dice(targets: Sequence[Played]) -> dict[str, float]:
    """SAM-Med3D's validation.py: the best Dice of each target, their mean."""
    return {"mean of best Dice": float(np.mean([target.dice.max() for target in targets]))}


def _class_mean_dice(targets: Sequence[Played]) -> dict[str, float]:
    """SAM-Med3D's compute_dataset_metrics.py: mean over cases per class, mean over classes."""
    last = [float(target.dice[-1]) for target in targets]
    return {"mean of class Dice": _mean_of_means(last, [target.key[1] for target in targets])}


def _cvpr25(targets: Sequence[Played]) -> dict[str, float]:
    """The challenge's figures: classes averaged within a case, then cases; areas of 0 to 4.

    The NSD of a case is 0 at steps where its mean Dice is at most 0.2.
    """
    cases: dict[str, list[Played]] = {}
    for target in targets:
        cases.setdefault(target.key[0], []).append(target)
    rows = []
    for group in cases.values():
        dice = np.mean([target.dice for target in group], axis=0)  # (steps,)
        nsd = np.mean([target.values["nsd_2mm"] for target in group], axis=0)
        nsd = np.where(dice > CVPR25_LOWEST_DICE, nsd, 0.0)
        rows.append([_area(dice), _area(nsd), dice[-1], nsd[-1]])
    names = ("DSC_AUC", "NSD_AUC", "DSC_Final", "NSD_Final")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


PUBLISHED: dict[str, Callable[[Sequence[Played]], dict[str, float]]] = {
    "best_dice": _best_dice,
    "class_mean_dice": _class_mean_dice,
    "cvpr25": _cvpr25,
}


def _area(curve: NDArray[np.float64]) -> float:
    """Under straight lines between points one step apart."""
    return float((curve[1:] + curve[:-1]).sum() / 2)


def _at(name: str, step: int) -> Callable[[Played], float]:
    """Reads a figure after some steps."""
    return lambda target: float(target.values[name][step - 1])


def _mean(measure: Callable[[Played], float], targets: Iterable[Played]) -> float | None:
    return plain(float(np.mean([measure(target) for target in targets])))


def _mean_of_means(values: Sequence[float], groups: Sequence[str]) -> float:
    """Mean over groups of the means within them."""
    grouped: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        grouped.setdefault(group, []).append(value)
    return float(np.mean([np.mean(group) for group in grouped.values()]))


def _interval(
    values: Sequence[float] | NDArray[np.float64],
    targets: Sequence[Played],
    *,
    classes: bool = False,
) -> list[float | None]:
    """Mean, low and high, drawing subjects."""
    interval: Interval = bootstrap_interval(
        [float(value) for value in values],
        [target.subject for target in targets],
        classes=[target.key[1] for target in targets] if classes else None,
    )
    return [plain(value) for value in interval]


def _numbers(values: Iterable[float | None]) -> NDArray[np.float64]:
    """NaN for None."""
    return np.array([math.nan if value is None else value for value in values])
