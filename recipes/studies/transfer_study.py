"""Does pretraining help? Fine-tunes every arm of a grid, run by run, and compares them.

    python recipes/studies/transfer_study.py recipes/studies/transfer_study.yaml
    python recipes/studies/transfer_study.py recipes/studies/transfer_study.yaml --report
    python recipes/studies/transfer_study.py recipes/studies/transfer_study.yaml --block 1

The YAML file holds the fields of `Study`. The same command resumes a study that was stopped and
skips the runs that have results; `--report` only rewrites table and figure, `--block` makes the
runs of one block of the grid, for another machine or checkout. With `rates`, every arm first tries
each learning rate on a fold that is not reported, and takes the best.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from matplotlib.axes import Axes
from sammed3d_backbone.recipes.studies import tables
from sammed3d_backbone.recipes.studies.arms import ArmConfig, fine_tune

from sammed3d_backbone import config, console
from sammed3d_backbone.files import write_text
from sammed3d_backbone.training.runs import Run, runs_folder

HERE = Path(__file__).parent
CELL = ["task", "labels", "arm"]
CASE = ["task", "labels", "draw", "case", "class"]  # key by which two arms are paired
METRICS = ["dice", "nsd"]
ADMITTED = 0.05  # Dice that a positive control has to gain


@dataclass(frozen=True)
class Study:
    """A study, as its YAML file states it; settings are arguments of the fine-tuning recipe."""

    out: str  # folder of the results, relative to recipes/studies/results
    # Arm -> its settings. `weights` may name a file relative to SAMMED3D_RUNS, also one of this
    # study, as {out}/{task}_{labels}_draw{draw}_ARM/last.safetensors.
    arms: Mapping[str, Mapping[str, Any]]
    # Blocks of runs, the most informative first: task (a file of recipes/configs), labels (numbers
    # of labelled subjects, or all), draws, arms, and settings of the block's runs.
    grid: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)  # for every run
    baseline: str = "scratch"
    controls: Sequence[str] = ()  # arms whose weights know the task: what can be gained at all
    rates: Sequence[float] = ()  # learning rates that every arm chooses from
    # of the trials, in which rates are compared: labels, and settings on top of the run's
    tuning: Mapping[str, Any] = field(default_factory=lambda: {"fold": 1, "labels": 8})


@dataclass(frozen=True)
class Planned:
    """One run of a study."""

    task: str
    labels: int | str
    draw: int  # seed of the drawn subjects and of the training
    arm: str
    settings: Mapping[str, Any] = field(compare=False)
    rate: float | None = None  # a trial of this learning rate; None: the run is reported

    @property
    def name(self) -> str:
        """Name of the run's folder and of its rows."""
        trial = "" if self.rate is None else f"_lr{self.rate:g}"
        return f"{Path(self.task).stem}_{self.labels}_draw{self.draw}_{self.arm}{trial}"


def read_study(path: Path) -> Study:
    """The study of a YAML file.

    Raises:
        ValueError: If a key is unknown or missing, or a block names an unknown arm.
    """
    study = tables.load(Study, path)
    if unknown := {study.baseline, *study.controls} - {*study.arms}:
        raise ValueError(f"{path}: baseline and controls name {sorted(unknown)}; add them to arms")
    for block in study.grid:
        if unknown := {*block["arms"]} - {*study.arms}:
            raise ValueError(f"{path}: grid names the arms {sorted(unknown)}; add them to arms")
    return study


def main(study: Study, *, report: bool = False, block: int | None = None) -> None:
    """Makes the runs that are missing, then table and figure.

    Args:
        study: The study.
        report: Make no runs.
        block: The block of the grid to make the runs of, counted from 0; None: all.

    Raises:
        ValueError: If there is no such block.
    """
    if block is not None:
        if not 0 <= block < len(study.grid):
            raise ValueError(f"--block {block}: the grid has the blocks 0 to {len(study.grid) - 1}")
        study = replace(study, grid=[study.grid[block]])
    out = HERE / "results" / study.out
    for run in () if report else in_order(study):
        settings = settings_of(run, study, out)
        if not tables.is_done(out, run.name, tables.digest(settings)):
            train(run, settings, study, out)
            write_report(out, study)
    write_report(out, study)


def in_order(study: Study) -> Iterator[Planned]:
    """All runs: within a block all arms of a draw before the next; trials before their arm."""
    tried = set()
    for block in study.grid:
        labels = block["labels"]
        for number in labels if isinstance(labels, list) else [labels]:
            for draw in range(block["draws"]):
                for arm in block["arms"]:
                    settings = block.get("settings", {})
                    if study.rates and (block["task"], arm) not in tried:
                        tried.add((block["task"], arm))
                        for rate in study.rates:
                            first = study.tuning["labels"]
                            yield Planned(block["task"], first, 0, arm, settings, float(rate))
                    yield Planned(block["task"], number, draw, arm, settings)


def settings_of(run: Planned, study: Study, out: Path) -> dict[str, Any]:
    """The settings of a run on top of its task's file."""
    settings = {**study.settings, **run.settings, **study.arms[run.arm]}
    settings |= {"num_subjects": None if run.labels == "all" else run.labels, "seed": run.draw}
    rate = run.rate
    if rate is not None:
        settings |= {key: value for key, value in study.tuning.items() if key != "labels"}
    elif study.rates:
        rate = chosen_rate(run, out)
    if isinstance(weights := settings.get("weights"), str):
        place = {"out": Path(study.out).name, "task": Path(run.task).stem}
        settings["weights"] = weights.format(**place, labels=run.labels, draw=run.draw)
    return settings if rate is None else {**settings, "lr": rate}


def chosen_rate(run: Planned, out: Path) -> float:
    """The learning rate of an arm's best trial on a task."""
    trials = tables.read(out, "runs").query("trial_rate.notna()")
    own = trials[(trials.task == Path(run.task).stem) & (trials.arm == run.arm)]
    return float(own.loc[own["mean_dice"].idxmax(), "trial_rate"])


def recipe_config(run: Planned, settings: Mapping[str, Any], study: Study) -> ArmConfig:
    """The configuration of the fine-tuning recipe for a run."""
    path = HERE.parent / "configs" / f"{run.task}.yaml"
    task = yaml.safe_load((path if path.is_file() else Path(run.task)).read_text(encoding="utf-8"))
    values = {**task, **settings, "name": f"{Path(study.out).name}/{run.name}"}
    own = runs_folder() / str(values.get("weights"))
    if own.is_file():
        values["weights"] = str(own)
    return config.build(ArmConfig, values)


def train(run: Planned, settings: Mapping[str, Any], study: Study, out: Path) -> None:
    """Fine-tunes one run and adds it to the study's files."""
    wanted = recipe_config(run, settings, study)
    fine_tune(wanted)
    folder = runs_folder() / wanted.name
    about = json.loads((folder / "results" / "scores.json").read_text(encoding="utf-8"))
    curve = [line for line in Run(folder).records() if line.get("mean_dice") is not None]
    row = {
        "run": run.name,
        "task": Path(run.task).stem,
        "labels": str(run.labels),
        "draw": run.draw,
        "arm": run.arm,
        "trial_rate": run.rate,
        "settings": json.dumps(settings),
        "config": tables.digest(settings),
        "seed": run.draw,
        **{key: about[key] for key in ("mean_dice", "steps", "seconds", "cpu_seconds")},
        "peak_memory_mb": about["peak_memory_mb"],
        "parameters": about["parameters"]["all"],
        "trained_parameters": about["parameters"].get("trained"),
        "start": "; ".join(about["weights"].splitlines()),
        "seen": about["data_overlap"],
        "split": about["split"],
        "validation": " ".join(f"{line['step']}:{line['mean_dice']}" for line in curve),
        "command": about["command"],
        **tables.made(about["provenance"]),
    }
    kept = {"scores": pd.read_csv(folder / "results" / "scores.csv")} if run.rate is None else {}
    tables.add(out, row, **kept)


# --- report -------------------------------------------------------------------------------------


def write_report(out: Path, study: Study) -> None:
    """Writes table.md and figure.png from runs.csv and scores.csv."""
    every = tables.read(out, "runs")
    runs = every[every["trial_rate"].isna()] if "trial_rate" in every else every
    if runs.empty:
        return
    keys = ["run", *CELL, "draw"]
    scores = tables.read(out, "scores").merge(runs[keys], on="run")
    whole = scores[scores["truncated"] == "no"].dropna(subset="dice")
    trials = every[every["trial_rate"].notna()]
    text = (
        "Means with 95 % intervals over draws and subjects, in %. Gains are over "
        f"{study.baseline} in the same draws and cases, in points. Steps: where the last "
        f"validation Dice of {study.baseline} is reached, of all steps. Cost: millions of trained "
        "parameters and of all, peak memory in MB, seconds per step on the clock and of CPU.\n\n"
        + tables.markdown(main_table(runs, scores, study.baseline))
        + "\n## By class\n\nDice of the structures that lie wholly in the volume.\n\n"
        + tables.markdown(class_table(whole, study.baseline))
    )
    if study.controls:
        text += "\n## Admission\n\n" + admission(runs, scores, study) + "\n"
    if not trials.empty:
        rates = trials.assign(dice=trials["mean_dice"].map("{:.2%}".format).str[:-1]).pivot_table(
            index=["task", "arm"], columns="trial_rate", values="dice", aggfunc="first", sort=False
        )
        rates.columns = [f"{rate:g}" for rate in rates.columns]
        fold = study.tuning.get("fold")
        where = "subjects that are not tested" if fold is None else f"fold {fold}"
        text += (
            f"\n## Learning rates\n\nDice on {where} with "
            f"{study.tuning['labels']} labelled subjects, one draw; the best was taken.\n\n"
            + tables.markdown(rates.reset_index())
        )
    starts = runs.drop_duplicates(["arm", "start"])
    columns = ["arm", "task", "start", "seen", "date", "commit", "processor", "threads", "torch"]
    text += "\n## What the arms started from\n\n" + tables.markdown(starts[columns].astype(str))
    write_text(out / "table.md", text)
    draw_figure(out / "figure.png", runs, scores)


def main_table(runs: pd.DataFrame, scores: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row per task, number of labels and arm."""
    lines = []
    for cell, own in runs.groupby(CELL, sort=False):
        task, labels, arm = cell
        mine = scores[scores["run"].isin(own["run"])]
        same = runs[(runs["task"] == task) & (runs["labels"] == labels)]
        twins = same[same["arm"] == baseline]
        theirs = scores[scores["run"].isin(twins["run"])]
        line = dict(zip(CELL, cell, strict=True)) | {"draws": str(len(own))}
        line |= {m.upper(): tables.shown(tables.interval(mine, m), 2) for m in METRICS}
        if arm != baseline and len(theirs):
            gains = tables.paired(mine, theirs, CASE, METRICS)
            for metric in METRICS:
                gain = tables.interval(gains, metric)
                line[f"{metric.upper()} gain"] = tables.shown(gain, 2, "+")
            pairs = own.merge(twins, on="draw", suffixes=("", "_twin"))
            curves = zip(pairs["validation"], pairs["validation_twin"], strict=True)
            line["steps"] = ", ".join(steps_to_reach(*map(points, pair)) for pair in curves)
        lines.append(line | {"cost": cost(own.iloc[0])})
    columns = [*CELL, "draws", "DICE", "NSD", "DICE gain", "NSD gain", "steps", "cost"]
    table = pd.DataFrame(lines).reindex(columns=columns)
    return table.rename(columns=lambda name: name.replace("DICE", "Dice"))


def admission(runs: pd.DataFrame, scores: pd.DataFrame, study: Study) -> str:
    """A line per task, number of labels and positive control: whether a gain could have shown."""
    lines = [
        "A task, budget and way of transfer count if weights that know the task, trained on its "
        f"other subjects, gain at least {100 * ADMITTED:g} Dice, with the whole interval above 0.\n"
    ]
    controls = runs[runs["arm"].isin(study.controls)]
    for (task, labels, arm), own in controls.groupby(CELL, sort=False):
        same = runs[(runs["task"] == task) & (runs["labels"] == labels)]
        twins = same[same["arm"] == study.baseline]
        mine, theirs = (scores[scores["run"].isin(part["run"])] for part in (own, twins))
        gain = tables.interval(tables.paired(mine, theirs, CASE, ["dice"]), "dice")
        passed = gain.mean >= ADMITTED and gain.low > 0
        lines.append(
            f"- {task}, {labels} subjects, {arm}: {tables.shown(gain, 2, '+')}, "
            f"{'admitted' if passed else 'not admitted'}"
        )
    return "\n".join(lines)


def class_table(scores: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row per task, number of labels, class and arm."""
    lines = []
    for cell, own in scores.groupby([*CELL[:2], "class"], sort=False):
        theirs = own[own["arm"] == baseline]
        for arm, mine in own.groupby("arm", sort=False):
            line = dict(zip([*CELL[:2], "class"], cell, strict=True))
            line |= {"cases": str(mine["case"].nunique()), "arm": arm}
            line["Dice"] = tables.shown(tables.interval(mine, "dice"), 2)
            gains = tables.paired(mine, theirs, CASE, ["dice"])
            if arm != baseline and len(gains):
                line["Dice gain"] = tables.shown(tables.interval(gains, "dice"), 2, "+")
            lines.append(line)
    return pd.DataFrame(lines)


def points(text: str) -> list[tuple[int, float]]:
    """Steps and validation Dice of a curve in runs.csv."""
    pairs = (point.split(":") for point in text.split()) if isinstance(text, str) else ()
    return [(int(step), float(dice)) for step, dice in pairs]


def steps_to_reach(ours: Sequence[tuple[int, float]], theirs: Sequence[tuple[int, float]]) -> str:
    """The first step at which one curve is as high as another at its end, of the other's steps."""
    steps, last = theirs[-1]
    return f"{next((step for step, dice in ours if dice >= last), 'never')}/{steps}"


def cost(run: pd.Series) -> str:
    """Parameters, memory and time of a run."""
    numbers = [run[key] / 1e6 for key in ("trained_parameters", "parameters")]
    seconds = [run[key] / run["steps"] for key in ("seconds", "cpu_seconds")]
    trained, every = ("not kept" if pd.isna(n) else f"{n:.2f}" for n in numbers)
    memory = "not kept" if pd.isna(run["peak_memory_mb"]) else f"{run['peak_memory_mb']:.0f}"
    times = " / ".join(f"{each:.3f}" for each in seconds if pd.notna(each))
    return f"{trained} of {every}, {memory}, {times or 'no training'}"


def draw_figure(path: Path, runs: pd.DataFrame, scores: pd.DataFrame) -> None:
    """Writes a PNG with a column per task: Dice against labelled subjects, and against steps."""
    tasks = runs["task"].unique()
    figure = tables.new_figure(5 * len(tasks), 7.5)
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in zip(axes.T, tasks, strict=True):
        own = runs[runs["task"] == task]
        colours = {arm: f"C{number}" for number, arm in enumerate(own["arm"].unique())}
        draw_scores(column[0], scores[scores["task"] == task], colours)
        column[0].set_title(task)
        first = own["labels"].iloc[0]
        for _, run in own[(own["labels"] == first) & own["validation"].notna()].iterrows():
            steps, dice = zip(*points(run["validation"]), strict=True)
            label = run["arm"] if run["draw"] == 0 else None
            percent = [100 * value for value in dice]
            column[1].plot(steps, percent, ".-", lw=1, color=colours[run["arm"]], label=label)
        column[1].set_title(f"{task}, {first} labelled subjects: each draw", fontsize=10)
        column[1].set(xlabel="steps", ylabel="validation Dice (%)")
        for each in column:
            each.grid(alpha=0.3)
            each.legend(fontsize=8, framealpha=0.5)  # an interval may end behind it
    figure.savefig(path, dpi=110)


def draw_scores(axes: Axes, scores: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """Means and intervals of every arm by number of labelled subjects."""
    ticks = sorted(scores["labels"].unique(), key=lambda n: math.inf if n == "all" else int(n))
    for number, (arm, colour) in enumerate(colours.items()):
        cells = dict([*scores[scores["arm"] == arm].groupby("labels")])
        shift = 0.06 * (number - (len(colours) - 1) / 2)  # centred on the tick
        found = {ticks.index(n) + shift: tables.interval(own, "dice") for n, own in cells.items()}
        for place, each in sorted(found.items()):
            mean, low, high = (100 * (each.mean if math.isnan(v) else v) for v in each)
            sides = [[mean - low], [high - mean]]
            label = arm if place == min(found) else None
            axes.errorbar(place, mean, sides, fmt="o", capsize=3, color=colour, label=label)
        line = sorted(found)
        axes.plot(line, [100 * found[place].mean for place in line], color=colour)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.5, len(ticks) - 0.5)  # also where there is only one number
    axes.set(xlabel="labelled subjects", ylabel="Dice (%), 95 % interval")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="YAML file with the fields of Study")
    parser.add_argument("--report", action="store_true", help="rewrite table and figure only")
    parser.add_argument("--block", type=int, metavar="N", help="the runs of this block alone")
    args = parser.parse_args()
    sys.exit(
        console.run_program(
            lambda: main(read_study(args.study), report=args.report, block=args.block),
            "transfer_study",
        )
    )
