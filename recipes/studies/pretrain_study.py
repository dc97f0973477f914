"""Which way of pretraining learns more on one budget? Pretrains every arm, and compares them.

    python recipes/studies/pretrain_study.py recipes/studies/pretrain_study.yaml
    python recipes/studies/pretrain_study.py recipes/studies/pretrain_study.yaml --report

The same command resumes a study that was stopped and skips the arms that have results; `--report`
only rewrites table and figure. All arms are scored on the same crops of cases that no arm was
trained on. Weights stay in SAMMED3D_RUNS.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sammed3d_backbone.recipes import pretrain_promptable
from sammed3d_backbone.recipes.studies import tables
from tqdm import tqdm

from sammed3d_backbone import config, console, sam
from sammed3d_backbone.files import write_text
from sammed3d_backbone.pretraining.click_loss import dice_per_click
from sammed3d_backbone.provenance import command_line, provenance
from sammed3d_backbone.training.runs import Run, runs_folder

HERE = Path(__file__).parent
CLICKS = (1, 3, 5)
DICE = [f"dice_{clicks}" for clicks in CLICKS]
# Okabe and Ito's colours, in the order of the arms.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
SMOOTHED = 10  # lines of the log in a point of the training curve


@dataclass(frozen=True)
class Study:
    """A study, as its YAML file states it; settings are arguments of the pretraining recipe."""

    base: str  # configuration of the pretraining, relative to this script
    out: str  # folder of the results, relative to recipes/studies/results
    arms: Mapping[str, Mapping[str, Any]]  # arm -> its settings; the first is the baseline
    settings: Mapping[str, Any] = field(default_factory=dict)  # for every arm
    crops: int = 96  # number of crops on which all arms are scored


def main(study: Study, *, report: bool = False) -> None:
    """Pretrains and scores the arms that are missing, then writes table and figure."""
    out = HERE / "results" / study.out
    for arm, own in {} if report else study.arms.items():
        settings = {**study.settings, **own, "crops": study.crops}
        if not tables.is_done(out, arm, tables.digest(settings)):
            train(arm, settings, study, out)
            write_report(out)
    write_report(out)


def train(arm: str, settings: Mapping[str, Any], study: Study, out: Path) -> None:
    """Pretrains and scores one arm and adds it to the study's files."""
    base = vars(config.load(pretrain_promptable.Config, HERE / study.base))
    own = {key: value for key, value in settings.items() if key != "crops"}
    values = {**base, **own, "name": f"{Path(study.out).name}/{arm}"}
    wanted = config.build(pretrain_promptable.Config, values)
    pretrain_promptable.main(wanted)
    folder = runs_folder() / wanted.name
    log = pd.DataFrame(Run(folder).records())
    trained = log[log["loss"].notna()]
    last = trained.iloc[-1]
    row = {
        "run": arm,
        "settings": json.dumps({**study.arms[arm]}),
        "config": tables.digest(settings),
        "seed": wanted.seed,
        "steps": int(last["step"]),
        "cpu_seconds": last["cpu_seconds"],
        "memory_gib": last["memory_gib"],
        "command": command_line(1),
        **tables.made(provenance(HERE)),
    }
    keys = ["step", "cpu_seconds", "dice_first", "dice_1", "patch_error"]
    curve = log.reindex(columns=keys)
    curve["cpu_seconds"] = curve["cpu_seconds"].ffill()  # validations follow their step's line
    curve.loc[trained.index, "patch_error"] = None  # validations have it
    scores = score(folder / "last.safetensors", wanted, study.crops)
    tables.add(out, row, scores=scores, curves=curve.dropna(subset=keys[2:], how="all"))


def score(weights: Path, wanted: pretrain_promptable.Config, crops: int) -> pd.DataFrame:
    """Dice of every object after some clicks, in crops of held-out cases."""
    network = sam(wanted.variant, weights=weights, rel_pos=wanted.rel_pos).eval()
    _, apart, _ = pretrain_promptable.open_sources(wanted, None)
    stream = pretrain_promptable.scored_stream(
        replace(wanted, val_crops=crops), apart, network, part=2
    )
    rows = []
    for number in tqdm(range(len(stream)), desc=f"{wanted.name}: crops", leave=False):
        crop = stream[number]
        with torch.no_grad():
            dice = dice_per_click(
                network, crop["image"], crop["objects"], max(CLICKS), given=wanted.clicks
            )
        chosen = dice[:, [clicks - 1 for clicks in CLICKS]].round(5)
        source = stream.sources[int(crop["source"])].name
        rows.append(pd.DataFrame(chosen, columns=DICE).assign(crop=number, source=source))
    return pd.concat(rows, ignore_index=True)[["crop", "source", *DICE]]


def write_report(out: Path) -> None:
    """Writes table.md and figure.png from the CSV files."""
    runs, curves = tables.read(out, "runs"), tables.read(out, "curves")
    if runs.empty:
        return
    scores = tables.read(out, "scores").assign(subject=lambda rows: rows["crop"].astype(str))
    text = (
        f"Dice on {scores['crop'].nunique()} crops of held-out cases, in %, with 95 % intervals "
        "over crops; below it the gain over the first arm on the same objects, in points. One "
        "seed each.\n\n" + tables.markdown(main_table(runs, scores, curves))
    )
    columns = ["run", "seed", "command", "date", "commit", "processor", "threads", "torch"]
    text += "\n## What made the figures\n\n" + tables.markdown(runs[columns].astype(str))
    write_text(out / "table.md", text)
    draw_figure(out / "figure.png", runs, curves)


def main_table(runs: pd.DataFrame, scores: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """A row per arm."""
    scores = scores.assign(object=scores.groupby("run").cumcount())
    first = scores[scores["run"] == runs["run"].iloc[0]]
    lines = []
    for _, run in runs.iterrows():
        own = scores[scores["run"] == run["run"]]
        line = {
            "arm": run["run"],
            "settings": run["settings"].strip("{}").replace('"', ""),
            "steps": str(run["steps"]),
            "CPU min": f"{run['cpu_seconds'] / 60:.0f}",
            "GiB": f"{run['memory_gib']:.2f}",
        }
        gains = tables.paired(own, first, ["object"], DICE)
        for clicks, column in zip(CLICKS, DICE, strict=True):
            for source in sorted(own["source"].unique()):
                cell = tables.shown(tables.interval(own[own["source"] == source], column))
                if run["run"] != runs["run"].iloc[0]:
                    gain = tables.interval(gains[gains["source"] == source], column)
                    cell += f"<br>{tables.shown(gain, 1, '+')}"
                line[f"{clicks} click{'s'[: clicks > 1]}, {source}"] = cell
        error = curves.loc[curves["run"] == run["run"], "patch_error"].dropna()
        line["error of hidden patches"] = f"{error.iloc[-1]:.3f}" if len(error) else ""
        lines.append(line)
    return pd.DataFrame(lines)


def draw_figure(path: Path, runs: pd.DataFrame, curves: pd.DataFrame) -> None:
    """Writes a PNG: Dice after one click on held-out and training crops against CPU time."""
    figure = tables.new_figure(10, 4)
    panels = figure.subplots(1, 2)
    for arm, colour in zip(runs["run"], COLOURS, strict=False):
        own = curves[curves["run"] == arm].assign(minutes=lambda rows: rows["cpu_seconds"] / 60)
        scored, trained = own.dropna(subset="dice_1"), own.dropna(subset="dice_first")
        panels[0].plot(scored["minutes"], 100 * scored["dice_1"], "o-", color=colour, label=arm)
        smooth = trained["dice_first"].rolling(min(SMOOTHED, max(len(trained), 1))).mean()
        panels[1].plot(trained["minutes"], 100 * smooth, color=colour)
    titles = ("held-out crops", "training crops: objects get smaller")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=f"One click, {title}", xlabel="CPU minutes", ylabel="Dice (%)")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="YAML file with the fields of Study")
    parser.add_argument("--report", action="store_true", help="rewrite table and figure only")
    args = parser.parse_args()
    sys.exit(
        console.run_program(
            lambda: main(tables.load(Study, args.study), report=args.report), "pretrain_study"
        )
    )
