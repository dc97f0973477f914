"""Scores networks by clicks on crops set apart: a teacher, its student, and the student alone.

    python recipes/studies/distillation_study.py teacher=tiny distilled=RUN alone=RUN

Each NAME=WEIGHTS is a name of weights, or a run's folder with its last.safetensors. The crops are
those of a validation of `recipes/configs/pretrain/distill_nano.yaml`, drawn with another seed: the
held-out cases of its sources, and synthetic volumes. All networks see the same ones, and are
clicked at the centre of the largest error. Rows go to results/distillation.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sammed3d_backbone.recipes.distill import Config
from sammed3d_backbone.recipes.pretrain_promptable import (
    SCORED_CLICKS,
    SYNTHETIC,
    choose_cases,
    scan_source,
    scored_stream,
)
from sammed3d_backbone.recipes.studies import tables

from sammed3d_backbone import config, console, sam
from sammed3d_backbone.files import write_text
from sammed3d_backbone.loading.hub import locate, sha256_of
from sammed3d_backbone.loading.opening import variant_for
from sammed3d_backbone.pretraining.click_loss import dice_per_click
from sammed3d_backbone.pretraining.object_crops import Source, SyntheticSource
from sammed3d_backbone.provenance import provenance
from sammed3d_backbone.training.runs import Run

HERE = Path(__file__).parent
OUT = HERE / "results" / "distillation"
CONFIG = HERE.parent / "configs" / "pretrain" / "distill_nano.yaml"
DICE = [f"dice_{clicks}" for clicks in SCORED_CLICKS]
TEACHER, DISTILLED, ALONE = "teacher", "distilled", "alone"


def main(networks: dict[str, str], crops: int = 96) -> str:
    """Scores the networks and writes the table, which is returned."""
    cfg: Config = config.load(Config, CONFIG, [f"val_crops={crops}"])
    torch.set_num_threads(1)
    sources: list[Source] = [SyntheticSource()]
    for source in cfg.scored:
        if source != SYNTHETIC:
            name, _, apart = choose_cases(cfg, source)
            sources.append(scan_source(cfg, name, apart))
    for name, weights in networks.items():
        folder = Path(weights)
        file = folder / "last.safetensors" if folder.is_dir() else locate(weights)[1]
        score(cfg, sources, name, file, folder)
    text = table()
    write_text(OUT / "table.md", text)
    return text


def score(cfg: Config, sources: list[Source], name: str, file: Path, folder: Path) -> None:
    """Adds the rows of a network."""
    variant = variant_for(file)
    network = sam(variant, weights=file).eval()
    stream = scored_stream(cfg, sources, network, part=3)
    given = network.pretrained_cfg.clicks
    rows = []
    for number in range(len(stream)):
        crop = stream[number]
        dice = dice_per_click(
            network, crop["image"], crop["objects"], max(SCORED_CLICKS), given=given
        ).mean(0)
        about = {"subject": number, "source": stream.sources[int(crop["source"])].name}
        found = {key: dice[clicks - 1] for key, clicks in zip(DICE, SCORED_CLICKS, strict=True)}
        rows.append(about | found)
    log: list[dict[str, Any]] = Run(folder).records() if folder.is_dir() else []
    trained = [line for line in log if "loss" in line][-1:]
    run = {
        "run": name,
        "variant": variant,
        "sha256": sha256_of(file),
        "steps": trained[0]["step"] if trained else None,
        "cpu_seconds": trained[0]["cpu_seconds"] if trained else None,
        **tables.made(provenance(HERE)),
    }
    tables.add(OUT, run, scores=pd.DataFrame(rows).round(4))


def table() -> str:
    """Dice of each network, the share of the teacher's, and the gain over the student alone."""
    scores, runs = tables.read(OUT, "scores"), tables.read(OUT, "runs")
    scores["subject"] = scores["subject"].astype(str)
    rows = []
    for run in runs.itertuples():
        mine = scores[scores["run"] == run.run]
        cost = {"network": run.run, "size": run.variant, "CPU s": run.cpu_seconds}
        dice = {
            f"after {n}": tables.shown(tables.interval(mine, f"dice_{n}")) for n in SCORED_CLICKS
        }
        rows.append(cost | dice)
    by_run: dict[Any, pd.DataFrame] = dict([*scores.groupby("run")])
    for name, other in ((DISTILLED, ALONE), (DISTILLED, TEACHER)):
        if {name, other} <= by_run.keys():
            gain = tables.paired(by_run[name], by_run[other], ["subject"], DICE)
            dice = {
                f"after {n}": tables.shown(tables.interval(gain, f"dice_{n}"), sign="+")
                for n in SCORED_CLICKS
            }
            rows.append({"network": f"{name} - {other}"} | dice)
    crops = scores["subject"].nunique()
    return (
        f"Dice in % on {crops} crops set apart (64³ voxels of 2 mm), 95 % intervals over crops.\n"
        f"CPU s: of the training alone, on one thread.\n\n{tables.markdown(pd.DataFrame(rows))}"
    )


if __name__ == "__main__":
    networks = dict(argument.split("=", 1) for argument in sys.argv[1:])
    sys.exit(console.run_program(lambda: print(main(networks)), "distillation_study"))
