"""Put the weights of a finished pretraining into the package, with their curve and their sums.

    python recipes/studies/publish_weights.py NAME [RUN ...] [--variant VARIANT] [--decoder RUN]
        [--calibration STUDY]

A RUN is a folder that pretrain_promptable.py has filled; several are the stages in their order, and
the averaged weights of the last one are published in half precision. NAME.safetensors and
SHA256SUMS go to weights/; a row per stage (runs.csv), the log (curves.csv) and one figure go to
results/NAME. --variant is the size's name where it has another one since the training. With
--decoder, the run of pretrain_decoder.py on these weights, the file also holds its UNETR decoder,
whose log goes to results/NAME_decoder; without a RUN it is added to the published file.
--calibration is the folder of a click study on patients that are not reported; the calibration of
the predicted Dice is fitted on its scores and printed. The record in
`sammed3d_backbone/loading/registry.py` and the card weights/NAME.md are written by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from sammed3d_backbone.recipes.studies import tables
from sammed3d_backbone.recipes.studies.calibration import fit_calibration
from torch import Tensor

from sammed3d_backbone import console
from sammed3d_backbone.files import write_text
from sammed3d_backbone.loading.checkpoint import ENCODER, UNETR, read, write
from sammed3d_backbone.loading.hub import sha256_of
from sammed3d_backbone.loading.registry import Weights, from_metadata, to_metadata
from sammed3d_backbone.training.runs import Run

HERE = Path(__file__).parent
WINDOW = 10  # lines of the log that make a point of the curve
PANELS = {  # label -> keys of the log, and what they are
    "Dice": {
        "dice_first": "first click",
        "dice_last": "last click",
        "dice_1": "one click",
        "dice_5": "five clicks",
    },
    "error of hidden patches": {"patch_error": "1: each patch's mean"},
    "places whose nearest is of their object": {"nearest_same": "share"},
}
KEYS = [key for keys in PANELS.values() for key in keys]


def main(
    stages: Sequence[Path],
    name: str,
    weights: Path,
    results: Path,
    *,
    variant: str | None = None,
    decoder: Path | None = None,
    calibration: Path | None = None,
) -> str:
    """Writes what belongs together; returns the hash of the file.

    Raises:
        FileNotFoundError: If a run is not finished.
        ValueError: If the decoder was trained on another encoder.
    """
    for run in (*stages, *([decoder] if decoder else [])):
        if not (run / "last.safetensors").is_file():
            raise FileNotFoundError(
                f"{run} holds no last.safetensors; let the pretraining get there"
            )
    path = weights / f"{name}.safetensors"
    tensors, metadata = read(stages[-1] / "last.safetensors" if stages else path)
    tensors = {key: value.half() for key, value in tensors.items()}
    training = json.loads(metadata["training"])
    record = from_metadata(Weights(name=name), metadata)
    record = replace(
        record,
        name=name,
        variant=variant or record.variant,
        filename=path.name,
        clicks=training["config"]["clicks"],
    )
    entries = {"training": metadata["training"]}
    if stages:
        record = replace(record, dice_calibration=None)  # fitted on other values
    if calibration is not None:
        fitted = fit_calibration(calibration, training["config"]["clicks"])
        record = replace(record, dice_calibration=fitted)
        print(fitted)
    if decoder is not None:
        added, about = read(decoder / "last.safetensors")
        require_same_encoder(tensors, added, decoder)
        own = from_metadata(Weights(name=name), about)
        record = replace(record, unetr=own.unetr, pretraining=own.pretraining)
        entries["unetr_training"] = about["unetr_training"]
        tensors |= {key: value for key, value in added.items() if key.startswith(UNETR)}
        log = pd.DataFrame(Run(decoder).records())
        row = stage_row("decoder", decoder, log)
        tables.add(results.with_name(f"{name}_decoder"), row, curves=log.round(5))
        shutil.copy(decoder / "curve.png", results.with_name(f"{name}_decoder") / "figure.png")
    write(path, tensors, {**entries, **to_metadata(record)}, overwrite=True)
    files = sorted(weights.glob("*.safetensors"))
    write_text(weights / "SHA256SUMS", "".join(f"{sha256_of(f)}  {f.name}\n" for f in files))
    for number, run in enumerate(stages, start=1):
        log = pd.DataFrame(Run(run).records())
        row = stage_row(f"stage{number}", run, log)
        known = [key for key in ("step", "loss", *KEYS) if key in log]
        tables.add(results, row, curves=log[known].round(5))
    if stages:
        draw_curve(results / "figure.png", tables.read(results, "curves"))
    return sha256_of(path)


def require_same_encoder(
    tensors: Mapping[str, Tensor], added: Mapping[str, Tensor], decoder: Path
) -> None:
    """Refuses a decoder that was trained on other features."""
    for key, value in tensors.items():
        if key.startswith(ENCODER) and not (key in added and torch.equal(value, added[key].half())):
            raise ValueError(
                f"{decoder} was trained on another encoder ({key} differs); train the decoder "
                "again with weights= this one"
            )


def stage_row(name: str, run: Path, log: pd.DataFrame) -> dict[str, Any]:
    """The row of runs.csv for a pretraining run."""
    config = (run / "config.yaml").read_text(encoding="utf-8")
    # The weights that a later stage started from, without the folder of this machine's runs.
    settings = yaml.safe_load(config.replace(f"{run.parent}/", ""))
    last = log[log["loss"].notna()].iloc[-1]
    return {
        "run": name,
        "config": tables.digest(settings),
        **{key: last.get(key) for key in ("step", "cpu_seconds", "memory_gib")},
        "settings": json.dumps(settings),
    }


def draw_curve(path: Path, log: pd.DataFrame) -> None:
    """Writes a PNG: Dice of training steps and of the click protocol, and the other objectives."""
    ends = log.groupby("run", sort=False)["step"].max().cumsum()
    log = log.assign(step=log["step"] + log["run"].map(ends.shift(fill_value=0)))
    panels = {label: keys for label, keys in PANELS.items() if {*keys} & {*log.columns}}
    figure = tables.new_figure(5 * len(panels), 4)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, keys) in zip(all_axes, panels.items(), strict=True):
        for key, whose in keys.items():
            known = log.dropna(subset=key) if key in log else log.iloc[:0]
            trained, scored = known[known["loss"].notna()], known[known["loss"].isna()]
            if len(trained):
                means = trained[["step", key]].groupby(np.arange(len(trained)) // WINDOW)
                points = means.agg({"step": "last", key: "mean"})
                axes.plot(points["step"], points[key], alpha=0.7, label=f"training, {whose}")
            if len(scored):
                axes.plot(scored["step"], scored[key], marker="o", label=f"held out, {whose}")
        for step in ends.iloc[:-1]:
            axes.axvline(step, color="grey", linestyle=":")
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("stages", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--variant", help="the size's name in the table of variants now")
    parser.add_argument("--decoder", type=Path, metavar="RUN")
    parser.add_argument("--calibration", type=Path, metavar="STUDY")
    args = parser.parse_intermixed_args()
    if not (args.stages or args.decoder or args.calibration):
        parser.error("give the RUN of the weights, of a decoder, or a click study")
    weights, results = HERE.parents[1] / "weights", HERE / "results" / args.name
    options = {
        "variant": args.variant,
        "decoder": args.decoder,
        "calibration": args.calibration,
    }
    sys.exit(
        console.run_program(
            lambda: print(main(args.stages, args.name, weights, results, **options)),
            "publish_weights",
        )
    )
