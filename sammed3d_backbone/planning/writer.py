"""A plan as YAML: a configuration of the recipe in which every line says why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sammed3d_backbone.planning.findings import Finding
from sammed3d_backbone.planning.fingerprint import Fingerprint, by_axis
from sammed3d_backbone.planning.rules import Choice


def plan_text(
    name: str,
    found: Fingerprint,
    findings: Sequence[Finding],
    data: Sequence[Choice],
    machine: Sequence[Choice],
) -> str:
    """A configuration that `finetune_unetr` runs as it is.

    Args:
        name: Name of the file, for the command in its head.
        found: The fingerprint, whose main figures stand in the head.
        findings: Suspicious properties, for the head.
        data: The choices of `from_data`.
        machine: The choices of `from_machine`.
    """
    lines = [
        f"# Plan for {found.dataset.name}. Run it: sammed3d train {name}",
        "# Any line may be changed here, or as key=value behind the plan's name.",
        "",
        "# --- From the data: equal on every machine ---",
        *(f"# {line}" for line in summary(found)),
        *(f"# check: {finding}" for finding in findings),
        *map(_line, data),
        "",
        "# --- From this machine: memory, time and where the files lie ---",
        *map(_line, machine),
    ]
    return "\n".join(lines) + "\n"


def summary(found: Fingerprint) -> list[str]:
    """The main figures of a fingerprint, a line each."""
    cases, dataset = found.cases, found.dataset
    subjects = len(found.subjects)
    shapes = np.array([case.shape for case in cases])
    orientations = Counter(case.orientation for case in cases)
    lines = [
        f"{len(cases)} cases of {subjects} subjects; channels: {', '.join(dataset.channels)}",
        f"median shape {by_axis(np.median(shapes, axis=0))}, from {by_axis(shapes.min(axis=0))} to "
        f"{by_axis(shapes.max(axis=0))} voxels along R, A, S",
        f"median spacing {by_axis(found.spacing_mm)} mm; axes in the files: "
        + ", ".join(f"{name} ({n})" for name, n in sorted(orientations.items())),
        *(
            f"inside labels, {name}: median intensity {np.median(middles):.4g}, "
            f"from {min(middles):.4g} to {max(middles):.4g} by case"
            for channel, name in enumerate(dataset.channels)
            for middles in [[case.inside[channel][2] for case in found.labelled]]
        ),
    ]
    for name, ml in found.median(lambda structure: structure.ml).items():
        structures = found.of_class(name)
        sides = np.median([each.sides_mm for each in structures], axis=0)
        thin = np.median([each.thickness_mm for each in structures])
        lines.append(
            f"{name}: in {len(structures)} cases, median {ml:.3g} ml, box {by_axis(sides)} mm, "
            f"thickness {thin:.3g} mm"
        )
    return lines


def _line(choice: Choice) -> str:
    """``key: value  # why``; JSON is YAML, too."""
    return f"{choice.key}: {json.dumps(choice.value)}  # {choice.why}"
