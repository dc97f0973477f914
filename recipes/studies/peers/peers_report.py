"""Table and figure of the study of peers, from its runs.csv and scores.csv."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from sammed3d_backbone.recipes.studies import tables
from sammed3d_backbone.recipes.studies.transfer_study import (
    CASE,
    CELL,
    METRICS,
    class_table,
    points,
    steps_to_reach,
)

from sammed3d_backbone.files import write_text

BASELINE = "nnunet"
SEEN = (
    "The pretraining of `tiny` saw masks of these organs of `headneck_ct` in other patients, some "
    "of those trained on here among them, but not in folds 0 and 1, which are tested on.\n\n"
)


def write_report(out: Path, budget_cpu_seconds: float, counted_iterations: int) -> None:
    """Writes table.md and figure.png from runs.csv and scores.csv."""
    runs = tables.read(out, "runs")
    if runs.empty:
        return
    scores = tables.read(out, "scores").merge(runs[["run", *CELL, "draw"]], on="run")
    whole = scores[scores["truncated"] == "no"].dropna(subset="dice")
    starts = runs.drop_duplicates(["arm", "task", "labels"])
    columns = ["arm", "task", "labels", "plan", "start", "seen", "split", "date", "commit"]
    text = (
        f"Equal CPU time: {budget_cpu_seconds:g} s of training on one thread, with crops and "
        "augmentation, user and system time of the process and its workers; planning, "
        "preprocessing, validation for the curve and prediction are not in it. The schedule of "
        "each arm ends with it. Means with 95 % intervals over draws and subjects, in %; "
        "differences to nnU-Net in the same draws and cases, in points. Level at: the CPU seconds "
        "after which an arm's validation Dice is that of nnU-Net at its end, of all. Cost: CPU "
        "seconds of training, peak memory in MB, millions of parameters, CPU seconds per predicted "
        "case. No arm mirrors when it predicts.\n\n"
        + tables.markdown(main_table(runs, scores, budget_cpu_seconds))
        + "\n"
        + "\n".join(verdicts(runs, counted_iterations))
        + f"\n\n{SEEN if 'headneck_ct' in {*runs['task']} else ''}## By class\n\n"
        + "Dice of the structures that lie wholly in the volume.\n\n"
        + tables.markdown(class_table(whole, BASELINE))
        + "\n## Plans and starts\n\n"
        + tables.markdown(starts[columns].astype(str))
    )
    write_text(out / "table.md", text)
    draw_figure(out / "figure.png", runs)


def main_table(runs: pd.DataFrame, scores: pd.DataFrame, budget_cpu_seconds: float) -> pd.DataFrame:
    """A row per task, number of labels and arm."""
    lines = []
    for cell, own in runs.groupby(CELL, sort=False):
        same = runs[(runs["task"] == cell[0]) & (runs["labels"] == cell[1])]
        peers = same[same["arm"] == BASELINE]
        mine, theirs = (scores[scores["run"].isin(part["run"])] for part in (own, peers))
        line = dict(zip(CELL, cell, strict=True)) | {"draws": str(len(own))}
        for metric, label in zip(METRICS, ("Dice", "NSD"), strict=True):
            line[label] = tables.shown(tables.interval(mine, metric), 2)
            if cell[2] != BASELINE and len(gains := tables.paired(mine, theirs, CASE, METRICS)):
                line[f"{label} - nnU-Net"] = tables.shown(tables.interval(gains, metric), 2, "+")
        pairs = own.merge(peers, on="draw", suffixes=("", "_peer"))
        curves = zip(pairs["curve"], pairs["curve_peer"], strict=True)
        line["level at"] = ", ".join(steps_to_reach(*map(points, pair)) for pair in curves)
        line["iterations"] = ", ".join(map(str, own["iterations"]))
        over = own["cpu_seconds"].max() > budget_cpu_seconds
        line["cost"] = (
            f"{own['cpu_seconds'].mean():.0f}{' (over the budget)' if over else ''}, "
            f"{own['peak_memory_mb'].max():.0f}, {own['parameters'].iloc[0] / 1e6:.2f}, "
            f"{own['case_cpu_seconds'].mean():.1f}"
        )
        lines.append(line)
    found = pd.DataFrame(lines)
    columns = ["Dice", "Dice - nnU-Net", "NSD", "NSD - nnU-Net", "level at", "iterations", "cost"]
    return found.reindex(columns=[*CELL, "draws", *columns])


def verdicts(runs: pd.DataFrame, counted_iterations: int) -> list[str]:
    """A line per task and number of labels: whether nnU-Net had iterations enough to count."""
    lines = [
        f"A set on which nnU-Net had fewer than {counted_iterations:,} iterations does not "
        "count for or against any one:\n"
    ]
    for (task, labels), own in runs.groupby(CELL[:2], sort=False):
        had = own.loc[own["arm"] == BASELINE, "iterations"]
        if had.empty:
            word = "nnU-Net has not run yet"
        else:
            counts = had.min() >= counted_iterations
            word = f"{'counts' if counts else 'does not count'}, {had.min():,} iterations"
        lines.append(f"- {task}, {labels} subjects: {word}")
    return lines


def draw_figure(path: Path, runs: pd.DataFrame) -> None:
    """Writes a PNG with validation Dice against CPU time, a panel per task and number of labels."""
    panels = [*runs.groupby(CELL[:2], sort=False)]
    figure = tables.new_figure(5 * len(panels), 4)
    arms = {arm: f"C{number}" for number, arm in enumerate(runs["arm"].unique())}
    for axes, ((task, labels), own) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for _, run in own.iterrows():
            seconds, dice = zip(*points(run["curve"]), strict=True)
            label = run["arm"] if run["draw"] == own["draw"].min() else None
            percent = [100 * value for value in dice]
            axes.plot(seconds, percent, ".-", lw=1, color=arms[run["arm"]], label=label)
        axes.set_title(f"{task}, {labels} subjects", fontsize=10)
        axes.set(xlabel="CPU seconds of training", ylabel="validation Dice (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
