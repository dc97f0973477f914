"""Put the weights of a finished pretraining into the package, with their curve and their sums.

    python recipes/studies/publish_weights.py NAME RUN [RUN ...] [--variant VARIANT]

A RUN is a folder that pretrain_promptable.py has filled; several are the stages in their order, and
the averaged weights of the last one are published in half precision. NAME.safetensors and
SHA256SUMS go to weights/; a row per stage (runs.csv), the log (curves.csv) and one figure go to
results/NAME. --variant is the size's name where it has another one since the training. The record
in `sammed3d_backbone/loading/registry.py` and the card weights/NAME.md are written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from sammed3d_backbone.recipes.studies import tables

from sammed3d_backbone import console
from sammed3d_backbone.files import write_text
from sammed3d_backbone.loading.checkpoint import read, write
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
    stages: Sequence[Path], name: str, weights: Path, results: Path, *, variant: str | None = None
) -> str:
    """Writes what belongs together; returns the hash of the file.

    Raises:
        FileNotFoundError: If a run is not finished.
    """
    for run in stages:
        if not (run / "last.safetensors").is_file():
            raise FileNotFoundError(
                f"{run} holds no last.safetensors; let the pretraining get there"
            )
    path = weights / f"{name}.safetensors"
    tensors, metadata = read(stages[-1] / "last.safetensors")
    training = json.loads(metadata["training"])
    record = from_metadata(Weights(name=name), metadata)
    record = replace(
        record,
        name=name,
        variant=variant or record.variant,
        filename=path.name,
        clicks=training["config"]["clicks"],
    )
    entries = {"training": metadata["training"], **to_metadata(record)}
    write(path, {key: value.half() for key, value in tensors.items()}, entries, overwrite=True)
    files = sorted(weights.glob("*.safetensors"))
    write_text(weights / "SHA256SUMS", "".join(f"{sha256_of(f)}  {f.name}\n" for f in files))
    for number, run in enumerate(stages, start=1):
        config = (run / "config.yaml").read_text(encoding="utf-8")
        # The weights that a later stage started from, without the folder of this machine's runs.
        settings = yaml.safe_load(config.replace(f"{run.parent}/", ""))
        log = pd.DataFrame(Run(run).records())
        last = log[log["loss"].notna()].iloc[-1]
        row = {
            "run": f"stage{number}",
            "config": tables.digest(settings),
            **{key: last.get(key) for key in ("step", "cpu_seconds", "memory_gib")},
            "settings": json.dumps(settings),
        }
        known = [key for key in ("step", "loss", *KEYS) if key in log]
        tables.add(results, row, curves=log[known].round(5))
    draw_curve(results / "figure.png", tables.read(results, "curves"))
    return sha256_of(path)


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
    parser.add_argument("stages", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--variant", help="the size's name in the table of variants now")
    args = parser.parse_args()
    weights, results = HERE.parents[1] / "weights", HERE / "results" / args.name
    sys.exit(
        console.run_program(
            lambda: print(main(args.stages, args.name, weights, results, variant=args.variant)),
            "publish_weights",
        )
    )
