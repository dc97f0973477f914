"""The decisions of `sammed3d curate` -> summary.json and a page: counts, pictures of examples."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sammed3d_backbone.console import optional
from sammed3d_backbone.curation.cases import Decision, open_grid, raw_targets
from sammed3d_backbone.curation.rules import PRESETS, CurationRules, Extent
from sammed3d_backbone.curation.sources import RawSet
from sammed3d_backbone.data.preparation import load_image
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.figures import Shown, cases_figure
from sammed3d_backbone.evaluation.page import png, stated, write_page
from sammed3d_backbone.files import inside, write_json

VERDICTS = ("kept", "changed", "dropped")
STEPS = {
    "grid": "0 grid",
    "annotation": "0 annotated in the case",
    "size": "1 size",
    "background": "2 background",
    "islands": "3 islands",
    "sides": "4 left and right",
}
SPARSE = "more than 99 % background"
EXAMPLES = 4  # per picture, each of another data set


def _step(decision: Decision, name: str) -> Mapping[str, Any]:
    """The record of one step on a mask; empty where the step does not apply."""
    found: Mapping[str, Any] = decision["steps"].get(name, {})
    return found


def _did(decision: Decision, name: str) -> str:
    return str(_step(decision, name).get("did", ""))


def is_sparse(decision: Decision) -> bool:
    """Whether the paper's rule on background would drop a mask, applied or not."""
    return "extent" in decision and bool(PRESETS["paper"].sparse(Extent(**decision["extent"])))


def _ml(decision: Decision) -> float:
    return float(decision["extent"]["ml"])


def _islands_ml(decision: Decision) -> float:
    return float(_step(decision, "islands")["beyond_ml"])


# Name of the picture -> title, which decisions, and their weight: the largest are shown.
GALLERIES: Mapping[str, tuple[str, Callable[[Decision], bool], Callable[[Decision], float]]] = {
    "size": (
        "Dropped by size, the largest of a data set",
        lambda d: _did(d, "size") == "dropped",
        _ml,
    ),
    "background": ("More than 99 % background, the largest of a data set", is_sparse, _ml),
    "islands": (
        "Islands removed, the most of a data set",
        lambda d: d["verdict"] == "changed" and _did(d, "islands") == "changed",
        _islands_ml,
    ),
    "scattered": (
        "Many parts, kept because the smaller ones are too large a share for debris",
        lambda d: _did(d, "islands") == "kept" and _step(d, "islands")["beyond"] > 0,
        _islands_ml,
    ),
    "sides": (
        "Left and right: split, or dropped because they lie on the wrong side",
        lambda d: _did(d, "sides") in ("changed", "dropped"),
        _ml,
    ),
}


def count_decisions(decisions: Sequence[Decision]) -> dict[str, Any]:
    """Counts of masks in all, per step, data set, modality and class."""
    masks = [decision for decision in decisions if decision["verdict"] != "refused"]
    return {
        "masks": _counts(masks),
        "refused_cases": len(decisions) - len(masks),
        "steps": {
            title: {
                **{verdict: sum(_did(d, step) == verdict for d in masks) for verdict in VERDICTS},
                "dropped by this only": sum(_dropping_steps(d) == [step] for d in masks),
            }
            for step, title in STEPS.items()
        },
        "data set": _grouped(masks, _data_set),
        "modality": _grouped(masks, lambda d: str(d["modality"])),
        "class": _grouped(masks, lambda d: str(d["class"])),
    }


def write_curation_report(
    folder: Path,
    raw_sets: Sequence[RawSet],
    decisions: Sequence[Decision],
    rules: CurationRules,
    about: Mapping[str, object],
) -> Path:
    """Writes ``summary.json``, ``examples/*.png`` and ``report.html`` of a finished run."""
    limits = dataclasses.asdict(rules)
    summary = {**about, "rules": limits, **count_decisions(decisions)}
    write_json(folder / "summary.json", summary)
    masks, cases = summary["masks"], {(d["place"], d["case"]) for d in decisions}
    share = "{:.1%}".format
    fate = "kept by this preset" if rules.max_background is None else "dropped by this preset"
    return write_page(
        folder / "report.html",
        "curation/report.html",
        title=f"Curation of {len(raw_sets)} data set{'s' * (len(raw_sets) > 1)}",
        below=f"Preset {about['preset']}: {rules.source}.",
        notes=[f"{raw_set.name}: {raw_set.note}" for raw_set in raw_sets if raw_set.note],
        tiles=[
            ("masks", f"{masks['masks']:,}", f"of {len(cases):,} cases"),
            *((v, f"{masks[v]:,}", share(masks[v] / (masks["masks"] or 1))) for v in VERDICTS),
            ("refused", f"{summary['refused_cases']:,}", "cases that cannot be used"),
        ],
        steps=summary["steps"],
        step_caption="Every mask is judged by all steps, so that one may be dropped by several. "
        f"Masks of more than 99 % background: {masks[SPARSE]:,} of {masks['masks']:,}, {fate}.",
        breakdowns=[_breakdown(name, summary[name]) for name in ("data set", "modality", "class")],
        galleries=[
            shown for name in GALLERIES if (shown := _gallery(folder, raw_sets, decisions, name))
        ],
        refused=[
            (f"{_data_set(d)} {d['case']}", "; ".join(d["why"]))
            for d in decisions
            if d["verdict"] == "refused"
        ],
        rules={name: "no limit" if v is None else v for name, v in limits.items()},
        about=stated(about),
    )


def _grouped(
    masks: Iterable[Decision], key: Callable[[Decision], str]
) -> dict[str, dict[str, int]]:
    """Counts of every group."""
    groups: dict[str, list[Decision]] = {}
    for mask in masks:
        groups.setdefault(key(mask), []).append(mask)
    return {name: _counts(groups[name]) for name in sorted(groups)}


def _counts(masks: Sequence[Decision]) -> dict[str, int]:
    """Masks of a group: how many, with which verdict, dropped by what."""
    verdicts = Counter(mask["verdict"] for mask in masks)
    drops = Counter(step for mask in masks for step in _dropping_steps(mask))
    return {
        "masks": len(masks),
        **{verdict: verdicts[verdict] for verdict in VERDICTS},
        **{f"dropped, {title}": drops[step] for step, title in STEPS.items() if drops[step]},
        SPARSE: sum(map(is_sparse, masks)),
    }


def _dropping_steps(decision: Decision) -> list[str]:
    return [step for step in STEPS if _did(decision, step) == "dropped"]


def _data_set(decision: Decision) -> str:
    """The data set's subfolder of the raw folder, or its name if it is the raw folder."""
    return str(decision["dataset"] if decision["place"] == "." else decision["place"])


def _breakdown(
    name: str, groups: Mapping[str, Mapping[str, int]]
) -> tuple[str, list[str], Mapping[str, Mapping[str, int]]]:
    """A table of groups: its name, the columns that are not 0 everywhere, its rows."""
    drops = [f"dropped, {title}" for title in STEPS.values()]
    used = {column for counts in groups.values() for column in counts}
    return name, ["masks", *VERDICTS, *(drop for drop in drops if drop in used), SPARSE], groups


def _gallery(
    folder: Path, raw_sets: Sequence[RawSet], decisions: Sequence[Decision], name: str
) -> dict[str, str] | None:
    """A picture of the decisions of a kind with the largest weights, one per data set."""
    title, is_member, weight = GALLERIES[name]
    largest: dict[str, Decision] = {}
    for decision in sorted(filter(is_member, decisions), key=weight, reverse=True):
        largest.setdefault(decision["place"], decision)
    if not largest:
        return None
    chosen = list(largest.values())[:EXAMPLES]
    path = folder / "examples" / f"{name}.png"
    with optional(path):
        shown = [_shown(folder, raw_sets, decision) for decision in chosen]
        cases_figure(path, shown, ["kept", "removed"], lines=())
    caption = "; ".join(f"{_data_set(d)} {d['case']}, {d['class']}: {_reasons(d)}" for d in chosen)
    return {"title": title, "source": png(path), "caption": f"{caption}."}


def _reasons(decision: Decision) -> str:
    """The decision on a mask as text."""
    islands = _step(decision, "islands")
    reasons = [*decision["why"]] or [decision["verdict"]]
    if islands["beyond"]:
        reasons.append(
            f"{islands['beyond']} of {islands['parts']} parts hold {islands['beyond_ml']:.3g} ml"
        )
    return f"{', '.join(reasons)} ({decision['extent']['ml']:.3g} ml)"


def _shown(folder: Path, raw_sets: Sequence[RawSet], decision: Decision) -> Shown:
    """The kept and the removed part of a mask; the planes go through the removed part, if any."""
    raw_set = next(one for one in raw_sets if one.place == decision["place"])
    raw = next(one for one in raw_set.cases if one.case.id == decision["case"])
    grid = open_grid(raw)
    before = next(
        target.on(grid).array
        for target, _ in raw_targets(raw, grid)
        if target.name == decision["raw_class"]
    )
    kept = np.zeros_like(before)
    if decision["mask"]:
        place = inside(folder / decision["place"] / "cases", decision["case"])
        kept = Volume.load(place / decision["mask"]).array.astype(np.uint8)
    removed = 2 * (before - kept)
    title = f"{decision['case']}\n{decision['class']}"
    drawn = (Volume(array, grid.affine) for array in (removed if removed.any() else kept, kept))
    return Shown(title, load_image(raw.case), *drawn)
