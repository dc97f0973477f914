"""The decisions of `sammed3d curate` -> summary.json and a page: counts, pictures of examples."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sammed3d_backbone.curation.cases import Decision, open_grid, raw_targets
from sammed3d_backbone.curation.rules import PRESETS, CurationRules, Extent
from sammed3d_backbone.curation.sources import RawSet
from sammed3d_backbone.data.preparation import load_image
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.figures import Shown, cases_figure
from sammed3d_backbone.evaluation.page import facts, heading, page, picture, table, tiles
from sammed3d_backbone.files import inside, write_json, write_text

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


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Decisions that are worth a picture."""

    name: str  # of the file
    title: str
    is_one: Callable[[Decision], bool]
    weight: Callable[[Decision], float]  # the heaviest of every data set are shown


def _step(decision: Decision, name: str) -> Mapping[str, Any]:
    """What a step says of a mask; empty where it does not apply."""
    found: Mapping[str, Any] = decision["steps"].get(name, {})
    return found


def _did(decision: Decision, name: str) -> str:
    return str(_step(decision, name).get("did", ""))


def is_sparse(decision: Decision) -> bool:
    """Whether the paper's rule on background is against a mask, applied or not."""
    return "extent" in decision and bool(PRESETS["paper"].sparse(Extent(**decision["extent"])))


GALLERIES = (
    Gallery(
        "size",
        "Dropped by size, the largest of a data set",
        lambda d: _did(d, "size") == "dropped",
        lambda d: float(d["extent"]["ml"]),
    ),
    Gallery(
        "background",
        "More than 99 % background, the largest of a data set",
        is_sparse,
        lambda d: float(d["extent"]["ml"]),
    ),
    Gallery(
        "islands",
        "Islands removed, the most of a data set",
        lambda d: d["verdict"] == "changed" and _did(d, "islands") == "changed",
        lambda d: float(_step(d, "islands")["beyond_ml"]),
    ),
    Gallery(
        "scattered",
        "Many parts, left whole because the smaller ones hold too much for debris",
        lambda d: _did(d, "islands") == "kept" and _step(d, "islands")["beyond"] > 0,
        lambda d: float(_step(d, "islands")["beyond_ml"]),
    ),
    Gallery(
        "sides",
        "Left and right: split, or dropped because they lie on the wrong side",
        lambda d: _did(d, "sides") in ("changed", "dropped"),
        lambda d: float(d["extent"]["ml"]),
    ),
)


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
    """Writes ``summary.json``, ``examples/*.png`` and ``report.html`` of a finished run.

    Args:
        folder: Result folder of `curate`.
        raw_sets: What `curate` found.
        decisions: Of `curate`.
        rules: That were applied.
        about: Command, preset, machine and versions.
    """
    limits = dataclasses.asdict(rules)
    summary = {**about, "rules": limits, **count_decisions(decisions)}
    write_json(folder / "summary.json", summary)
    masks, steps = summary["masks"], summary["steps"]
    fate = "kept by this preset" if rules.max_background is None else "dropped by this preset"
    title = f"Curation of {len(raw_sets)} data set{'s' * (len(raw_sets) > 1)}"
    below = f"Preset {about['preset']}: {rules.source}."
    notes = [f"{raw_set.name}: {raw_set.note}" for raw_set in raw_sets if raw_set.note]
    sections = [
        heading(title, below, notes),
        tiles(
            [
                ("masks", f"{masks['masks']:,}", f"of {_cases(decisions):,} cases"),
                *((v, f"{masks[v]:,}", _share(masks[v], masks["masks"])) for v in VERDICTS),
                ("refused", f"{summary['refused_cases']:,}", "cases that cannot be used"),
            ]
        ),
        "<h2>Steps</h2>"
        + table(
            ["step", *VERDICTS, "dropped by this only"],
            [[title, *(f"{n:,}" for n in counts.values())] for title, counts in steps.items()],
            caption="Every mask is judged by all steps, so that one may be dropped by several. "
            f"Of more than 99 % background: {masks[SPARSE]:,} of {masks['masks']:,} masks, {fate}.",
        ),
        *(_breakdown(summary[name], name) for name in ("data set", "modality", "class")),
        *(_gallery(folder, raw_sets, decisions, gallery) for gallery in GALLERIES),
        _refused(decisions),
        "<h2>Rules</h2>" + facts({k: "no limit" if v is None else v for k, v in limits.items()}),
        "<h2>Run</h2>" + facts(about),
    ]
    write_text(folder / "report.html", page(title, sections))
    return folder / "report.html"


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
    """Where it lies in the raw folder; its name where it is the raw folder."""
    return str(decision["dataset"] if decision["place"] == "." else decision["place"])


def _cases(decisions: Iterable[Decision]) -> int:
    return len({(decision["place"], decision["case"]) for decision in decisions})


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _breakdown(groups: Mapping[str, Mapping[str, int]], name: str) -> str:
    """One row per group; what is 0 everywhere is no column."""
    drops = [f"dropped, {title}" for title in STEPS.values()]
    used = {column for counts in groups.values() for column in counts}
    columns = ["masks", *VERDICTS, *(drop for drop in drops if drop in used), SPARSE]
    rows = [
        [escape(group), *(f"{counts.get(column, 0):,}" for column in columns)]
        for group, counts in groups.items()
    ]
    head = [name, *map(escape, columns)]
    caption = "A click on a column's head sorts."
    return f"<h2>By {name}</h2>" + table(head, rows, caption=caption, kind="sortable")


def _gallery(
    folder: Path,
    raw_sets: Sequence[RawSet],
    decisions: Sequence[Decision],
    gallery: Gallery,
) -> str:
    """Pictures of the heaviest decisions of a kind, one per data set."""
    heaviest: dict[str, Decision] = {}
    for decision in decisions:
        place = decision["place"]
        if gallery.is_one(decision) and (
            place not in heaviest or gallery.weight(decision) > gallery.weight(heaviest[place])
        ):
            heaviest[place] = decision
    if not heaviest:
        return ""
    chosen = sorted(heaviest.values(), key=gallery.weight, reverse=True)[:EXAMPLES]
    path = folder / "examples" / f"{gallery.name}.png"
    shown = [_shown(folder, raw_sets, decision) for decision in chosen]
    cases_figure(path, shown, ["stays", "goes"], lines=())
    caption = "; ".join(f"{_data_set(d)} {d['case']}, {d['class']}: {_told(d)}" for d in chosen)
    alt = "outlines of what stays and what goes on three planes"
    return f"<h2>{gallery.title}</h2>" + picture(path.read_bytes(), alt, f"{caption}.")


def _told(decision: Decision) -> str:
    """What was decided on a mask, in words."""
    extent, islands = decision["extent"], _step(decision, "islands")
    told = [*decision["why"]] or [decision["verdict"]]
    if islands["beyond"]:
        told.append(
            f"{islands['beyond']} of {islands['parts']} parts hold {islands['beyond_ml']:.3g} ml"
        )
    return f"{', '.join(told)} ({extent['ml']:.3g} ml)"


def _shown(folder: Path, raw_sets: Sequence[RawSet], decision: Decision) -> Shown:
    """What goes of a mask and what stays, for drawing: planes through what goes, if anything."""
    raw_set = next(one for one in raw_sets if one.place == decision["place"])
    raw = next(one for one in raw_set.cases if one.case.id == decision["case"])
    grid = open_grid(raw.case)
    before = next(
        target.on(grid).array
        for target, _ in raw_targets(raw, grid)
        if target.name == decision["raw_class"]
    )
    stays = np.zeros_like(before)
    if decision["mask"]:
        place = inside(folder / decision["place"] / "cases", decision["case"])
        stays = Volume.load(place / decision["mask"]).array.astype(np.uint8)
    goes = 2 * (before - stays)
    title = f"{decision['case']}\n{decision['class']}"
    drawn = (Volume(array, grid.affine) for array in (goes if goes.any() else stays, stays))
    return Shown(title, load_image(raw.case), *drawn)


def _refused(decisions: Iterable[Decision]) -> str:
    rows = [
        [escape(f"{_data_set(d)} {d['case']}"), escape("; ".join(d["why"]))]
        for d in decisions
        if d["verdict"] == "refused"
    ]
    if not rows:
        return ""
    caption = "Nothing of these is in the result; mend them and start the same command again."
    return "<h2>Refused</h2>" + table(["case", "why"], rows, caption=caption)
