"""The rules of a plan: fingerprint -> values of the recipe's configuration, each with its reason.

`from_data` reads the data only, so that its part of a plan is equal on every machine;
`from_machine` reads memory, precision and number of steps as well.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sammed3d_backbone.data.preprocessing import SAM_MED3D, Modality, Preprocessing
from sammed3d_backbone.loading.registry import WEIGHTS, default_weights
from sammed3d_backbone.loading.variants import variant
from sammed3d_backbone.planning.findings import one_sided
from sammed3d_backbone.planning.fingerprint import DIRECTIONS, Fingerprint, Structure

MIN_THICK_VOX = 8  # of the thinnest class
MIN_CROP_VOX = 32
RARE = 0.005  # share of a crop's volume
APART = 0.25  # of the mean side of two classes, from which on they lie in an order
IN_ONE_PIECE = 0.95  # share of a structure in its largest component, and of the cases
CROPS_PER_STEP = 2
FEW_SUBJECTS = 16
MOST_PROMPTS = 16  # classes; each costs a pass of the mask decoder
SHORT, LONG = 2400, 5000  # steps
STOPS = 4  # validations in a run
HURRIED = 1000  # steps up to which the higher learning rate is taken
HU = (-500.0, 500.0)  # what a CT's values reach on both sides
MODALITIES: dict[Modality, str] = {
    "ct": r"ct|cta|cect|ncct|cbct",
    "mr": r"mr|mri|t1\w*|t2\w*|flair|dwi|adc|pd|pdw|swi|bold|dixon|dce",
    "us": r"us|ultrasound|sonography",
}
BESIDE = ("to the right of", "in front of", "above")
SIDES = (
    r"left|right|l|r|lt|rt|sinister|dexter",
    r"anterior|posterior|front|back|ventral|dorsal",
    r"superior|inferior|upper|lower|cranial|caudal|top|bottom",
)


# GiB of weights, gradients, moments and average, and bytes per voxel of a float32 crop without
# logits. `tiny` was measured by --dry-run (two crops of 64: 1.25 GiB, 1.37 with 14 outputs; one,
# recomputed: 0.63); `vit_b` is taken to need as much per voxel.
MEMORY = {"tiny": (0.2, 2000.0), "vit_b": (2.0, 2000.0)}
PER_CLASS = 25.0  # bytes per voxel and output: logits, softmax and their gradients
RECOMPUTED, HALF = 0.85, 0.75  # factors on activations, the second that of step_cost


@dataclass(frozen=True)
class Choice:
    """A key of the configuration, its value and the reason in one line."""

    key: str
    value: Any
    why: str


def find_modality(found: Fingerprint, given: Modality | None = None) -> tuple[Modality, str]:
    """The modality and where it is known from.

    Args:
        found: The fingerprint.
        given: The modality that the user gives; None if none.

    Raises:
        ValueError: If neither the names of the channels nor the values tell it.
    """
    if given is not None:
        return given, "as given"
    names = found.dataset.channels
    told = {
        modality
        for name in names
        for modality, pattern in MODALITIES.items()
        if any(re.fullmatch(pattern, word) for word in _words(name))
    }
    if len(told) == 1:
        return told.pop(), f"the channel is named {', '.join(names)}"
    low, high = HU
    if not told and all(min(c.low) <= low and max(c.high) >= high for c in found.cases):
        return "ct", f"every scan has values below {low:g} and above {high:g}, as in HU"
    raise ValueError(
        f"the modality is unclear: channels {', '.join(names)}, values from "
        f"{min(min(c.low) for c in found.cases):g} to {max(max(c.high) for c in found.cases):g}; "
        "pass --modality ct, mr or us"
    )


def from_data(found: Fingerprint, size: str, modality: Modality | None, folds: int) -> list[Choice]:
    """The choices that follow from the data alone.

    Args:
        found: The fingerprint.
        size: The network size, a name in `loading.variants`.
        modality: The modality that the user gives; None if none.
        folds: Number of random folds if the data set names none.

    Raises:
        ValueError: If the modality is unclear.
    """
    expected = WEIGHTS[default_weights(size)].preprocessing or SAM_MED3D
    spacing = choose_spacing(found, expected)
    crop = choose_crop(found, expected, float(spacing.value[0]), variant(size).patch_size)
    rarest = _rarest(found, float(spacing.value[0]) * crop.value)
    return [
        Choice("folds", folds, "used where the folder has neither splits.json nor a split"),
        Choice("fold", 0, "fold=all trains all, one after another, and an ensemble"),
        choose_model(found),
        Choice("variant", size, f"its weights, {default_weights(size)}, are the start"),
        Choice("scratch", False, "weights were level with random initialisation or better"),
        Choice("freeze", 0, "the former tiny, frozen, was 0.8 Dice points below a trained one"),
        spacing,
        choose_intensity(found, expected, modality),
        Choice("statistics", expected.statistics, "as the weights were trained"),
        crop,
        Choice("on_foreground", 0.8 if rarest[1] < RARE else 0.5, rarest[0]),
        Choice(
            "foreground_weight",
            20.0 if rarest[1] < RARE else 1.0,
            f"20 where a class fills less than {RARE:.1%} of a crop, else 1",
        ),
        choose_flips(found),
        choose_components(found),
    ]


def choose_model(found: Fingerprint) -> Choice:
    """The decoder whose weights help where labels are few, else the best from random ones."""
    subjects, classes = len(found.subjects), len(found.dataset.classes)
    if subjects <= FEW_SUBJECTS and classes <= MOST_PROMPTS:
        why = "its decoder has weights, too: +13.0 Dice points with 4 subjects (transfer_abdomen)"
        return Choice("model", "class_prompts", why)
    reason = f"{subjects} subjects" if subjects > FEW_SUBJECTS else f"{classes} classes"
    why = f"{reason}, so more than {FEW_SUBJECTS}; 1.1 Dice points above unetr (decoder_study)"
    return Choice("model", "segresnet", why)


def choose_spacing(found: Fingerprint, expected: Preprocessing) -> Choice:
    """One spacing for all directions, as the weights were trained with cubes."""
    weights_mm = (expected.spacing_mm or (1.5,))[0]
    crop = expected.crop_vox[0]
    finest = min(found.spacing_mm)
    name, thin = min(found.median(lambda s: s.thickness_mm).items(), key=lambda item: item[1])
    wide = max(found.median(lambda s: sorted(s.sides_mm)[1]).values())
    limit = thin / MIN_THICK_VOX  # coarser, the thinnest class has too few voxels
    trained = f"the weights were trained at {weights_mm:g}"
    mm, why = weights_mm, trained
    if limit < weights_mm:
        mm, why = limit, f"finer for a thin class ({trained})"
    if finest > mm:
        mm, why = finest, f"the scans' own, since finer would invent voxels ({trained})"
    elif wide > mm * crop and limit > mm:
        mm = min(wide / crop, limit)
        why = f"coarser, so that a crop holds {wide:.0f} mm ({trained})"
    mm = max(0.1, math.floor(mm * 10 + 1e-6) / 10)
    between = max(found.spacing_mm)
    if between > 2 * mm:
        why += f"; between slices {between:.3g} mm apart voxels are interpolated"
    told = f"at {mm:g} mm {name} has {max(1, round(thin / mm))} voxels in its thinnest direction"
    return Choice("spacing_mm", [mm, mm, mm], f"{why}; {told}")


def choose_crop(found: Fingerprint, expected: Preprocessing, mm: float, patch: int) -> Choice:
    """The weights' crop, or a smaller one that holds a whole scan."""
    crop = expected.crop_vox[0]
    needed = max(MIN_CROP_VOX, math.ceil(max(found.sides_mm) / mm / patch) * patch)
    if needed < crop:
        return Choice("crop_vox", needed, f"{needed * mm:.0f} mm: a median scan fits into it")
    return Choice("crop_vox", crop, f"the weights' own: {crop * mm:.0f} mm")


def choose_intensity(
    found: Fingerprint, expected: Preprocessing, modality: Modality | None
) -> Choice:
    """The intensity mode of the modality, as the weights were trained."""
    known, source = find_modality(found, modality)
    if known != "ct" and any(max(case.negative) > 0.05 for case in found.cases):
        return Choice("intensity", "zscore", f"{known} ({source}) with values below 0")
    return Choice("intensity", expected.intensity_mode(known), f"{known}: {source}")


def choose_flips(found: Fingerprint) -> Choice:
    """The axes along which a mirror image has the same labels."""
    axes, reasons = [], []
    for axis, pattern in enumerate(SIDES):
        sided = [
            name
            for name in found.dataset.classes
            if any(re.fullmatch(pattern, word) for word in _words(name))
        ]
        sides = found.median(partial(_side_mm, axis=axis))
        ordered = [
            (first, second, apart_mm)
            for first, second, apart_mm, _ in one_sided(found, axis)
            if apart_mm > APART * (sides[first] + sides[second]) / 2
        ]
        if sided:
            reasons.append(f"{DIRECTIONS[axis]} no: the name {sided[0]} tells a side")
        elif ordered:
            first, second, apart_mm = ordered[0]
            reasons.append(
                f"{DIRECTIONS[axis]} no: {first} is {apart_mm:.0f} mm {BESIDE[axis]} {second}"
            )
        else:
            axes.append(axis)
            reasons.append(f"{DIRECTIONS[axis]} yes")
    return Choice("flip_axes", axes, "; ".join(reasons))


def _side_mm(structure: Structure, axis: int) -> float:
    return structure.sides_mm[axis]


def choose_components(found: Fingerprint) -> Choice:
    """Whether every class is one connected structure."""
    scattered = {
        name: np.mean([each.main_share < IN_ONE_PIECE for each in found.of_class(name)])
        for name in found.median(lambda structure: structure.main_share)
    }
    name, share = max(scattered.items(), key=lambda item: item[1])
    if share > 1 - IN_ONE_PIECE:
        return Choice(
            "keep_largest_component", False, f"{name} has several parts in {share:.0%} of the cases"
        )
    return Choice("keep_largest_component", True, "every class is one part in nearly every case")


def from_machine(
    found: Fingerprint,
    data: list[Choice],
    memory_gib: float,
    steps: int | None,
    precision: str,
    why_steps: str = "as given",
) -> list[Choice]:
    """The choices that follow from memory, time and precision.

    Args:
        found: The fingerprint.
        data: The choices of `from_data`.
        memory_gib: For network, gradients and activations.
        steps: Optimiser steps; None to choose by the number of subjects.
        precision: "no" or "bf16".
        why_steps: The reason for the number of steps, if it is given.

    Raises:
        ValueError: If not even one recomputed crop fits into the memory.
    """
    chosen = {choice.key: choice.value for choice in data}
    if steps is None:
        steps = SHORT if len(found.subjects) <= FEW_SUBJECTS else LONG
        why_steps = f"{SHORT} for up to {FEW_SUBJECTS} subjects, else {LONG}; --hours or --steps"
    if chosen["variant"] == "tiny":
        fast = 2e-3 if chosen["model"] == "class_prompts" else 3e-3
        lr = fast if steps <= HURRIED else 1e-3
        why_lr = f"{fast:g} up to {HURRIED} steps, where it was better (studies); 0.001 beyond"
    else:
        lr, why_lr = 3e-4, "the recipe's; the released weights were not measured here"
    ways = [(2, 1, False), (1, 2, False), (2, 1, True), (1, 2, True)]
    costs = [step_gib(chosen, found, way[0], way[2], precision) for way in ways]
    fitting = [n for n, gib in enumerate(costs) if gib <= memory_gib]
    if not fitting:
        raise ValueError(
            f"--memory {memory_gib:g}GB: a step needs about {min(costs):.1f} GiB with one "
            "recomputed crop; give more, or --variant tiny"
        )
    best = fitting[0]
    batch, accumulate, checkpointing = ways[best]
    gib = prepared_gib(found, float(chosen["spacing_mm"][0]), chosen["crop_vox"])
    return [
        Choice("steps", steps, why_steps),
        Choice("warmup_steps", min(500, steps // 20), "a twentieth of the steps, at most 500"),
        Choice("lr", lr, why_lr),
        Choice("validate_every", -(-steps // STOPS), "four times a run: whole scans take long"),
        Choice("mixed_precision", precision, "bf16 on a GPU; on a CPU only with --precision bf16"),
        Choice("batch", batch, f"about {costs[best]:.1f} of {memory_gib:g} GiB for a step"),
        Choice("accumulate", accumulate, f"so that a step has {CROPS_PER_STEP} crops"),
        Choice("checkpointing", checkpointing, "recompute only where memory asks for it"),
        Choice(
            "cache",
            "~/sammed3d_cache" if gib > memory_gib / 4 else None,
            f"prepared cases are {gib:.1f} GiB; on disk above a quarter of the memory",
        ),
        Choice("workers", None, "none on a CPU; with a GPU one per core, at most 8"),
    ]


def step_gib(
    chosen: dict[str, Any], found: Fingerprint, batch: int, recomputed: bool, precision: str
) -> float:
    """The estimated memory of a training step in GiB."""
    fixed_gib, per_voxel = MEMORY[chosen["variant"]]
    classes = len(found.dataset.labels)
    per_voxel = per_voxel * (RECOMPUTED if recomputed else 1) + PER_CLASS * classes
    crops: float = batch * chosen["crop_vox"] ** 3 * per_voxel
    return fixed_gib + crops * (HALF if precision == "bf16" else 1) / 2**30


def prepared_gib(found: Fingerprint, mm: float, crop: int) -> float:
    """Size of all prepared cases: float32 per channel and one byte of labels per voxel."""
    each = 4 * len(found.dataset.channels) + 1
    voxels = (
        math.prod(
            max(crop, round(n * own / mm))
            for n, own in zip(case.shape, case.spacing_mm, strict=True)
        )
        for case in found.cases
    )
    return each * sum(voxels) / 2**30


def _rarest(found: Fingerprint, side_mm: float) -> tuple[str, float]:
    """A sentence on the class that fills least of a crop, and its share."""
    shares = {n: ml * 1000 / side_mm**3 for n, ml in found.median(lambda s: s.ml).items()}
    name, share = min(shares.items(), key=lambda item: item[1])
    return f"{name} fills {share:.2g} of a crop's volume; 0.8 below {RARE:g}", share


def _words(name: str) -> list[str]:
    """``RightParotid``, ``kidney_right`` and ``T1-weighted`` in lower-case words."""
    return re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
