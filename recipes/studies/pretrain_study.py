"""Which way of pretraining learns more on one budget? Pretrains every arm, and compares them.

    python recipes/studies/pretrain_study.py recipes/studies/pretrain_study.yaml
    python recipes/studies/pretrain_study.py recipes/studies/pretrain_study.yaml --report

Arms that have results are skipped and a stopped one goes on, so the same command finishes the
study; --report only writes table and figure. All arms are scored on the same crops of cases that
none was trained on. An arm's scores, log and configuration lie in OUT/ARM, its weights in
SAMMED3D_RUNS; table.md and figure.png in OUT are made of them again after every arm.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sammed3d_backbone.recipes import pretrain_promptable
from sammed3d_backbone.recipes.studies.transfer_study import keep, refuse_other
from tqdm import tqdm

from sammed3d_backbone import config, sam
from sammed3d_backbone.evaluation.statistics import Interval, bootstrap_interval
from sammed3d_backbone.files import write_text
from sammed3d_backbone.pretraining.click_loss import dice_per_click
from sammed3d_backbone.training.runs import Run, runs_folder

HERE = Path(__file__).parent
FILES = ("config.yaml", "metrics.jsonl")
CLICKS = (1, 3, 5)
# Okabe and Ito's colours, in the order of the arms.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


@dataclass(frozen=True)
class Config:
    """The study."""

    base: str  # configuration of the pretraining, beside this script
    arms: tuple[str, ...]  # "NAME key=value ...", what sets each apart from the base
    out: str = "results/pretrain_study"  # seen from recipes/
    settings: tuple[str, ...] = ()  # key=value for every arm
    crops: int = 96  # that all arms are scored on


class Score(NamedTuple):
    """Dice of one object of one crop after one, three and five clicks."""

    crop: int
    source: str
    dice: tuple[float, ...]


def main(cfg: Config, *, report: bool = False) -> None:
    """Pretrains and scores the arms that are missing, then writes table and figure."""
    out = HERE / cfg.out
    runs = {name: run_config(name, cfg) for name in arms_of(cfg)}
    for name, wanted in runs.items():  # before anything is trained
        refuse_other(out / name / "config.yaml", wanted, pretrain_promptable.FREE)
        kept = out / name / "scores.csv"
        if kept.is_file() and (found := len({s.crop for s in read_scores(kept)})) != cfg.crops:
            raise ValueError(
                f"{kept} is of {found} crops, not {cfg.crops}; give another out=, or crops={found}"
            )
    for name, wanted in runs.items():
        if not report and not (out / name / "scores.csv").is_file():
            pretrain_promptable.main(wanted)
            folder = runs_folder() / wanted.name
            scores = score(folder / "last.safetensors", wanted, cfg.crops)
            keep(folder, out / name, FILES)
            write_scores(out / name / "scores.csv", scores)  # the last: an arm that has it has all
        write_report(out, runs)


def arms_of(cfg: Config) -> dict[str, list[str]]:
    """What sets each arm apart, by its name.

    Raises:
        ValueError: If two arms have one name.
    """
    split = [arm.split() for arm in cfg.arms]
    arms = {name: settings for name, *settings in split}
    if len(arms) < len(split):
        raise ValueError(f"arms={list(cfg.arms)} name one twice; give each a name of its own")
    return arms


def run_config(name: str, cfg: Config) -> pretrain_promptable.Config:
    """What the pretraining recipe is asked for."""
    here = HERE / cfg.base
    overrides = [*cfg.settings, *arms_of(cfg)[name], f"name={Path(cfg.out).name}/{name}"]
    path = here if here.is_file() else Path(cfg.base)
    return config.load(pretrain_promptable.Config, path, overrides)


def score(weights: Path, wanted: pretrain_promptable.Config, crops: int) -> list[Score]:
    """Plays the click protocol inside crops of cases set apart, other ones than in validation."""
    network = sam(wanted.variant, weights=weights, rel_pos=wanted.rel_pos).eval()
    _, apart, _ = pretrain_promptable.open_sources(wanted, None)
    stream = pretrain_promptable.scored_stream(
        replace(wanted, val_crops=crops), apart, network, part=2
    )
    scores = []
    for number in tqdm(range(len(stream)), desc=f"{wanted.name}: crops", leave=False):
        crop = stream[number]
        with torch.no_grad():
            dice = dice_per_click(network, crop["image"], crop["objects"], max(CLICKS))
        source = stream.sources[int(crop["source"])].name
        chosen = dice[:, [clicks - 1 for clicks in CLICKS]]
        scores += [Score(number, source, tuple(row)) for row in chosen.tolist()]
    return scores


def write_scores(path: Path, scores: Iterable[Score]) -> None:
    """A line per object."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["crop", "source", *(f"dice_{clicks}" for clicks in CLICKS)])
    lines.writerows((s.crop, s.source, *(f"{dice:.5f}" for dice in s.dice)) for s in scores)
    write_text(path, text.getvalue())


def read_scores(path: Path) -> list[Score]:
    """What `write_scores` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    return [
        Score(int(r["crop"]), r["source"], tuple(float(r[f"dice_{n}"]) for n in CLICKS))
        for r in rows
    ]


def write_report(out: Path, runs: Mapping[str, pretrain_promptable.Config]) -> None:
    """Writes table and figure of the arms that have results."""
    done = {name: out / name for name in runs if (out / name / "scores.csv").is_file()}
    if not done:
        return
    scores = {name: read_scores(folder / "scores.csv") for name, folder in done.items()}
    logs = {name: Run(folder).records() for name, folder in done.items()}
    write_text(out / "table.md", as_markdown(scores, logs, {name: runs[name] for name in done}))
    draw_figure(out / "figure.png", logs)


def as_markdown(
    scores: Mapping[str, Sequence[Score]],
    logs: Mapping[str, Sequence[dict[str, Any]]],
    runs: Mapping[str, pretrain_promptable.Config],
) -> str:
    """The table for people; Dice in points."""
    first = next(iter(scores.values()))
    sources = sorted({s.source for s in first})
    shown = [(n, clicks, source) for n, clicks in enumerate(CLICKS) for source in sources]
    heads = [f"{clicks} click{'s'[: clicks > 1]}, {source}" for _, clicks, source in shown]
    text = (
        f"Dice on {len({s.crop for s in first})} crops of cases set apart, in points, with 95 % "
        "intervals over crops;\nbelow it the gain over the first arm on the same objects. One "
        "seed each.\n\n"
        f"| arm | what sets it apart | steps | CPU min | GiB | {' | '.join(heads)} | "
        "hidden patches |\n"
        f"|---|---|---|---|---|{'---|' * len(heads)}---|\n"
    )
    base = runs[next(iter(scores))]
    for name, own in scores.items():
        last = [line for line in logs[name] if "loss" in line][-1]
        apart = config.differences(base, runs[name])
        apart.pop("name", None)
        cells = [
            name,
            ", ".join(f"{key}={value[1]}" for key, value in apart.items()),
            str(last["step"]),
            f"{last['cpu_seconds'] / 60:.0f}",
            f"{last['memory_gib']:.2f}",
        ]
        for n, _, source in shown:
            cell = _points([s for s in own if s.source == source], n)
            if own is not first:
                gains = [
                    Score(a.crop, a.source, tuple(np.subtract(a.dice, b.dice)))
                    for a, b in zip(own, first, strict=True)
                    if a.source == source
                ]
                cell += f"<br>{_points(gains, n, '+')}"
            cells.append(cell)
        scored = [line for line in logs[name] if "patch_error" in line and "loss" not in line]
        cells.append(f"{scored[-1]['patch_error']:.3f}" if scored else "")
        text += f"| {' | '.join(cells)} |\n"
    return text


def _points(scores: Sequence[Score], n: int, sign: str = "") -> str:
    """Mean (low to high) of one of the numbers of clicks."""
    found: Interval = bootstrap_interval([s.dice[n] for s in scores], [str(s.crop) for s in scores])
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in found)
    return f"{mean} ({low} to {high})"


def draw_figure(path: Path, logs: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Writes a PNG: Dice after one click, set apart and in training, against the time it took."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    apart, training = figure.subplots(1, 2)
    for (name, log), colour in zip(logs.items(), COLOURS, strict=False):
        minutes = {line["step"]: line["cpu_seconds"] / 60 for line in log if "loss" in line}
        scored = [line for line in log if "dice_1" in line]
        apart.plot(
            [minutes[line["step"]] for line in scored],
            [100 * line["dice_1"] for line in scored],
            marker="o",
            color=colour,
            label=name,
        )
        trained = [line for line in log if "dice_first" in line]
        if trained:
            width = min(10, len(trained))
            means = np.convolve(
                [100 * line["dice_first"] for line in trained], np.ones(width) / width, "valid"
            )
            times = [minutes[line["step"]] for line in trained[width - 1 :]]
            training.plot(times, means, color=colour, label=name)
    for axes, whose in ((apart, "set apart"), (training, "trained on: objects get smaller")):
        axes.set_title(f"One click, crops {whose}")
        axes.set_xlabel("CPU minutes")
        axes.set_ylabel("Dice (%)")
        axes.grid(alpha=0.3)
    apart.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    try:
        cfg, flags = config.parse(
            Config, description=__doc__, flags={"report": "train nothing, write table and figure"}
        )
        main(cfg, **flags)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
