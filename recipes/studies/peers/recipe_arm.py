"""The parts of the peers study that run our recipe, each a process of its own on one thread.

    python recipe_arm.py measure PLAN.yaml ITERATIONS [segresnet] key=value ...
    python recipe_arm.py train PLAN.yaml segresnet key=value ...
    python recipe_arm.py predict MODEL.safetensors IN OUT

The last line that a command prints is its figures as JSON. `segresnet` puts MONAI's SegResNetDS in
the place of the plan's network; plain arms train with `sammed3d train`.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import SegResNetDS
from sammed3d_backbone.recipes import finetune_unetr
from torch import nn

from sammed3d_backbone import config
from sammed3d_backbone.data.datasets import Dataset, Fold
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import Segmenter
from sammed3d_backbone.loading.checkpoint import read
from sammed3d_backbone.loading.opening import CARD_KEY
from sammed3d_backbone.training.finetuning import build_model
from sammed3d_backbone.training.runs import Run, runs_folder

SEGRESNET = "segresnet"
NETWORK = "MONAI SegResNetDS"
BLOCKS = (1, 2, 2, 4, 4)  # Auto3DSeg's
FILTERS = 16  # Auto3DSeg's 32 take four times as long, 7 s of CPU for two crops of 56
SKIPPED = 2  # iterations that are not measured: memory is allocated in them


def segresnet(card: Card, dataset_name: str, **_: object) -> tuple[nn.Module, Card]:  # noqa: ARG001
    """MONAI's network with random initialisation and the card that says so.

    It has as many levels as the crop can be halved, at most Auto3DSeg's five.
    """
    levels = len(BLOCKS)
    while card.preprocessing.crop_vox[0] % 2 ** (levels - 1):
        levels -= 1
    network = SegResNetDS(
        init_filters=FILTERS,
        in_channels=len(card.channels),
        out_channels=len(card.labels),
        norm="instance",
        blocks_down=BLOCKS[:levels],
        dsdepth=min(4, levels - 1),
    )
    start = {"weights": f"{NETWORK}: random initialisation"}
    return network, replace(card, network=NETWORK, training={**card.training, "start": start})


def measure(plan: Path, iterations: int, *given: str) -> dict[str, Any]:
    """CPU seconds of an iteration of a plan, from a short run that validates one case."""
    cfg, build = _arm(plan, given)
    short = {"steps": iterations, "validate_every": iterations, "warmup_steps": 1}
    cfg = replace(cfg, name=f"{cfg.name}_measured", **short)
    folder = runs_folder() / cfg.name
    shutil.rmtree(folder, ignore_errors=True)

    def draw(_: Dataset, fold: Fold) -> Fold:
        return replace(fold, val=fold.val[:1])

    finetune_unetr.main(cfg, draw=draw, build=build)
    clocks = [line["cpu_seconds"] for line in Run(folder).records() if "cpu_seconds" in line]
    shutil.rmtree(folder)
    steps = [after - before for before, after in pairwise(clocks)]
    used = steps[SKIPPED - 1 :]
    return {"step_cpu_seconds": statistics.mean(used), "measured": len(used)}


def train(plan: Path, *given: str) -> dict[str, Any]:
    """Trains or resumes by a plan; returns the scores."""
    cfg, build = _arm(plan, given)
    return finetune_unetr.main(cfg, build=build)


def predict(model: Path, source: Path, target: Path) -> dict[str, Any]:
    """Predicts every scan of a folder, with the time of reading and writing."""
    torch.set_num_threads(1)
    tensors, metadata = read(model)
    card = Card.from_json(metadata[CARD_KEY])
    if card.network == NETWORK:
        network, _ = segresnet(card, "")
        network.load_state_dict(tensors)
        segmenter = Segmenter(network.eval(), card)
    else:
        segmenter = Segmenter.from_pretrained(model)
    before, clock = time.process_time(), time.monotonic()
    scans = sorted(source.glob("*_0000.nii.gz"))
    for scan in scans:
        name = scan.name.replace("_0000.nii.gz", ".nii.gz")
        segmenter.predict(Volume.load(scan)).save(target / name)
    used, took = time.process_time() - before, time.monotonic() - clock
    return {"cases": len(scans), "cpu_seconds": used, "seconds": took}


def _arm(plan: Path, given: tuple[str, ...]) -> tuple[finetune_unetr.Config, Any]:
    """The configuration of an arm, and what builds its network."""
    other = SEGRESNET in given
    overrides = [each for each in given if each != SEGRESNET]
    overrides += ["model=basicunet", "scratch=true"] * other  # without an encoder of ours
    cfg = config.load(finetune_unetr.Config, plan, overrides)
    return cfg, segresnet if other else build_model


if __name__ == "__main__":
    command, first, *rest = sys.argv[1:]
    if command == "measure":
        figures = measure(Path(first), int(rest[0]), *rest[1:])
    elif command == "train":
        figures = train(Path(first), *rest)
    else:
        figures = predict(Path(first), *map(Path, rest))
    print(json.dumps(figures))
