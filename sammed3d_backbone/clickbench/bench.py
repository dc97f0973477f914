"""A run: every target of a data set is played, scored and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sammed3d_backbone.clickbench.cases import ClickSet, ClickTarget
from sammed3d_backbone.clickbench.journal import Journal, Line, key_of, read_journal
from sammed3d_backbone.clickbench.protocol import ClickRules, ClickStep, Player, PromptableModel
from sammed3d_backbone.clickbench.scoring import plain, score
from sammed3d_backbone.console import progress_bar, reason
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import UNWRITABLE
from sammed3d_backbone.provenance import resident_bytes
from sammed3d_backbone.strategies import Click, Draws


def header_of(
    rules: ClickRules, click_set: ClickSet, tracks: Iterable[str], *, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """The header of a journal, apart from model and versions."""
    return {
        "protocol": rules.name,
        "source": rules.source,
        "oracle": rules.oracle,
        "differs": rules.differs,
        "steps": rules.steps,
        "starts": list(tracks),
        "dataset": click_set.name,
        "dataset_sha256": click_set.content_sha256(),
        "note": click_set.note,
        "cases": len(click_set.cases),
        "classes": list(classes) or "all",
        "instances": click_set.instances,
    }


def run_benchmark(
    model: PromptableModel,
    rules: ClickRules,
    click_set: ClickSet,
    journal: Journal,
    tracks: Iterable[str],
) -> dict[str, str]:
    """Plays every target and track that is not in the journal yet.

    Returns:
        Cases that could not be played to their end, with the reason.
    """
    failed: dict[str, str] = {}
    player = Player(model)
    bar = progress_bar(click_set.cases, desc="clicking", unit="case")
    for case in bar:
        try:
            for target in click_set.targets(case):
                bar.set_postfix_str(f"{target.case} {target.name}")
                for track in tracks:
                    if not journal.has((target.case, target.name, track)):
                        journal.write(*played(player, rules, target, track))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in UNWRITABLE:
                raise  # of the disk, not of the case
            failed[case.case.id] = reason(error)
    return failed


def played(
    player: Player, rules: ClickRules, target: ClickTarget, track: str
) -> tuple[list[Line], list[Line], Volume | None]:
    """Lines, times and last mask of one target and track."""
    about = {"case": target.case, "subject": target.subject, "class": target.name, "first": track}
    voxels = int(target.truth.sum())
    if voxels < rules.min_voxels:
        reason = f"{voxels} voxels, fewer than {rules.min_voxels}"
        return [{**about, "dropped": reason}], [], None
    draws = Draws(target.dataset, target.case, target.name, "first")
    lines: list[Line] = []
    times: list[Line] = []
    before: ClickStep | None = None
    figures: Line = {}
    for step in rules.show(player, target, rules.tracks[track], draws, rules.steps):
        if before is None or step.mask is not before.mask:
            figures = score(step)
        before = step
        number = len(lines) + 1
        clicks = [_clicked(click, step) for click in step.clicks]
        line = {**about, "step": number, "clicks": clicks, **figures, "failure": step.failure}
        if step.predicted_dice is not None:
            line["predicted_dice"] = plain(step.predicted_dice)
        lines.append(line)
        seconds = {part: round(value, 4) for part, value in step.seconds.items()}
        peak_mib = round(resident_bytes("VmHWM") / 2**20, 1)  # peak of the process so far
        times.append({**about, "step": number, "seconds": seconds, "peak_rss_mib": peak_mib})
    if before is None:
        return [{**about, "dropped": "empty at the protocol's spacing"}], [], None
    return lines, times, Volume(before.mask.astype(np.uint8), before.affine)


def first_difference(
    model: PromptableModel, rules: ClickRules, click_set: ClickSet, folder: Path, targets: int
) -> str:
    """Plays the first targets of a finished run again; "" if every line is the same."""
    _, lines = read_journal(folder)
    player = Player(model)
    for key in list(dict.fromkeys(map(key_of, lines)))[:targets]:
        case, name, track = key
        again, _, _ = played(player, rules, click_set.target(case, name), track)
        for old, new in zip((line for line in lines if key_of(line) == key), again, strict=True):
            new = json.loads(json.dumps(new))
            for entry in old:
                if old[entry] != new[entry]:
                    place = f"{', '.join(key)}, step {old.get('step')}, {entry}"
                    return f"{place}: {old[entry]} became {new[entry]}"
    return ""


def _clicked(click: Click, step: ClickStep) -> Line:
    """A click for the file: voxel of the volume that the model got, and world coordinates."""
    point_mm = (step.clicked_affine @ [*click.point_vox, 1])[:3]
    return {
        "vox": list(click.point_vox),
        "mm": [plain(float(v)) for v in point_mm],
        "positive": click.positive,
        "repeat": click.is_repeat,
    }
