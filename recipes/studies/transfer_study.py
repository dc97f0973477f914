"""Does pretraining help? Fine-tunes every arm of a grid, run by run, and compares them.

    python recipes/studies/transfer_study.py recipes/studies/transfer_study.yaml weights=FILE
    python recipes/studies/transfer_study.py recipes/studies/transfer_study.yaml --report

Runs that have results are skipped and a stopped one goes on, so the same command finishes the
study; --report only writes table and figure. A run's scores, log and configuration lie in OUT/RUN;
table.md, table.json and figure.png in OUT are made of them again after every run. With rates=, an
arm first tries each learning rate on a fold that is not reported, and takes the best.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sammed3d_backbone.recipes import finetune_unetr

from sammed3d_backbone import config
from sammed3d_backbone.evaluation.scores import Score, differences, read_scores
from sammed3d_backbone.evaluation.statistics import Interval, bootstrap_interval
from sammed3d_backbone.files import write_text
from sammed3d_backbone.training.runs import Run, runs_folder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

HERE = Path(__file__).parent
DECODERS = ("flexible_unet", "segresnet", "linear_head", "expanding_head")  # scratch is UNETR
ARMS: dict[str, tuple[str, ...]] = {
    "pretrained": ("scratch=false",),
    "scratch": ("scratch=true",),
    "zero_encoder": ("scratch=true", "control=zero_encoder"),
    "frozen": ("scratch=false", "freeze=encoder"),
    "frozen_random": ("scratch=true", "freeze=encoder"),
    "lora": ("scratch=false", "peft=lora"),
    "bottleneck": ("scratch=false", "peft=bottleneck", "peft_size=32"),
    "first_channel": ("scratch=false", "channel_gains=[1, 0]"),
    "shared": ("scratch=false", "channels=shared"),
    **{model: ("scratch=true", f"model={model}") for model in DECODERS},
}
BASELINE = "scratch"
# The scores last: a run that has them has all.
FILES = ("config.yaml", "metrics.jsonl", "results/scores.json", "results/scores.csv")


@dataclass(frozen=True)
class Config:
    """The study."""

    # "TASK LABELS DRAWS ARM,ARM key=value ...", most telling first; LABELS may be all, and what
    # follows the arms is set for their runs only.
    blocks: tuple[str, ...]
    weights: str | None = None  # file or name of the pretrained arms
    # "ARM FILE" for arms that begin with other weights; files are seen from SAMMED3D_RUNS.
    more_weights: tuple[str, ...] = ()
    # Learning rates to choose among for every arm; (): the task's own.
    rates: tuple[float, ...] = ()
    tuning_fold: int = 1  # that they are compared on, with one draw
    tuning_labels: str = "8"
    out: str = "results/transfer_study"  # seen from recipes/
    settings: tuple[str, ...] = ()  # key=value of the fine-tuning recipe, for every run


@dataclass(frozen=True)
class Row:
    """One run of the study."""

    task: str  # a file of recipes/configs, or the path of another
    labels: str
    draw: int  # seed of the drawn subjects and of the training
    arm: str
    settings: tuple[str, ...] = field(default=(), compare=False)
    rate: float | None = None  # that is tried; None: the run is reported

    @property
    def name(self) -> str:
        """Of its folder."""
        tried = "" if self.rate is None else f"_lr{self.rate:g}"
        return f"{Path(self.task).stem}_{self.labels}_draw{self.draw}_{self.arm}{tried}"


Scores = Mapping[Row, Sequence[Score]]  # of runs


def main(cfg: Config, *, report: bool = False) -> None:
    """Makes the runs that are missing, then table and figure."""
    out = HERE / cfg.out
    rows = list(rows_of(cfg))
    if not report:
        in_order = [each for row in rows for each in (*trials_of(row, cfg), row)]
        for row in in_order:  # before anything is trained
            wanted = run_config(row, cfg)
            refuse_other(out / row.name / "config.yaml", wanted, finetune_unetr.FREE)
        for row in in_order:
            if not is_done(out, row):
                wanted = run_config(row, cfg)
                finetune_unetr.main(wanted)
                keep(runs_folder() / wanted.name, out / row.name, FILES)
                write_report(out, rows, cfg)
    write_report(out, rows, cfg)


def rows_of(cfg: Config) -> Iterator[Row]:
    """All runs in their order: within a block, all arms of a draw before the next draw.

    Raises:
        ValueError: If a block cannot be read.
    """
    for block in cfg.blocks:
        try:
            task, labels, draws, arms, *settings = block.split()
            numbers = range(int(draws))
        except ValueError:
            raise ValueError(f"block {block!r}; write it as TASK LABELS DRAWS ARM,ARM") from None
        known = [*ARMS, *other_starts(cfg)]
        if unknown := set(arms.split(",")) - {*known}:
            raise ValueError(
                f"block {block!r} has arms {sorted(unknown)}; choose among {known}, or give their "
                "weights by more_weights=['ARM FILE']"
            )
        for n in numbers:
            yield from (Row(task, labels, n, arm, tuple(settings)) for arm in arms.split(","))


def other_starts(cfg: Config) -> dict[str, Path]:
    """The weights of the arms that begin with others than the study's, by arm.

    Raises:
        ValueError: If an entry cannot be read, or an arm means something else.
    """
    found: dict[str, Path] = {}
    for entry in cfg.more_weights:
        arm, _, file = entry.partition(" ")
        if not file or arm in ARMS:
            raise ValueError(f"more_weights={entry!r}; write it as ARM FILE, ARM none of {[*ARMS]}")
        found[arm] = runs_folder() / file.strip()
    return found


def trials_of(row: Row, cfg: Config) -> list[Row]:
    """The runs that choose the learning rate of a row: one draw, a fold that is not reported."""
    first = replace(row, labels=cfg.tuning_labels, draw=0)
    return [replace(first, rate=rate) for rate in cfg.rates]


def chosen_rate(row: Row, cfg: Config) -> float | None:
    """With the best mean Dice on the tuning fold; None: not all of them have been tried."""
    out = HERE / cfg.out
    trials = trials_of(row, cfg)
    if not trials or not all(is_done(out, trial) for trial in trials):
        return None
    return max(trials, key=lambda trial: mean_dice(out, trial)).rate


def is_done(out: Path, row: Row) -> bool:
    """Whether a run has results."""
    return (out / row.name / "scores.csv").is_file()


def mean_dice(out: Path, row: Row) -> float:
    """Of a run's last averaged weights, over classes and cases."""
    return interval({row: read_scores(out / row.name / "scores.csv")}, "dice")[0] or 0.0


def run_config(row: Row, cfg: Config) -> finetune_unetr.Config:
    """What the fine-tuning recipe is asked for.

    Raises:
        ValueError: If a pretrained arm has no weights.
    """
    means = ARMS.get(row.arm, ARMS["pretrained"])
    is_random = "scratch=true" in means
    weights = other_starts(cfg).get(row.arm, None if is_random else cfg.weights)
    if not is_random and weights is None:
        raise ValueError(f"arm {row.arm} needs trained weights; pass weights=FILE")
    here = HERE.parent / "configs" / f"{row.task}.yaml"
    rate = chosen_rate(row, cfg) if row.rate is None else row.rate
    overrides = [
        *cfg.settings,
        *row.settings,
        *means,
        f"weights={'null' if weights is None else weights}",
        f"labels={'null' if row.labels == 'all' else row.labels}",
        f"seed={row.draw}",
        f"name={Path(cfg.out).name}/{row.name}",
        *([] if rate is None else [f"lr={rate}", f"scratch_lr={rate}"]),
        *([] if row.rate is None else [f"fold={cfg.tuning_fold}"]),
    ]
    path = here if here.is_file() else Path(row.task)
    return config.load(finetune_unetr.Config, path, overrides)


def refuse_other(kept: Path, wanted: DataclassInstance, free: Collection[str]) -> None:
    """Results of other weights or settings must not pass for those of a study.

    Args:
        kept: The configuration of results, if there are any.
        wanted: The configuration that is asked for.
        free: Keys that do not count.

    Raises:
        ValueError: If they differ in what counts.
    """
    if kept.is_file():
        found = config.differences(config.load(type(wanted), kept), wanted)
        changed = sorted(
            key
            for key, (a, b) in found.items()
            if key not in free and without_runs(str(a)) != without_runs(str(b))
        )
        if changed:
            raise ValueError(f"{kept.parent} is of other values of {changed}; give another out=")


def keep(run: Path, folder: Path, files: Sequence[str]) -> None:
    """Copies what a comparison needs; each file is whole at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        text = (run / name).read_text(encoding="utf-8")
        write_text(folder / Path(name).name, without_runs(text))


def without_runs(text: str) -> str:
    """Paths in it as seen from SAMMED3D_RUNS, so that a study goes on where that lies elsewhere."""
    return text.replace(f"{runs_folder()}/", "")


def write_report(out: Path, rows: Sequence[Row], cfg: Config) -> None:
    """Writes table and figure of the runs that have results."""
    table = make_table(out, [row for row in rows if is_done(out, row)])
    trials = dict.fromkeys(trial for row in rows for trial in trials_of(row, cfg))
    tried = {row: mean_dice(out, row) for row in trials if is_done(out, row)}
    if not table and not tried:
        return
    write_text(out / "table.json", json.dumps(table, indent=1) + "\n")
    text = "".join(
        (as_markdown(table), classes_shown(table), trials_shown(tried, cfg), origins_shown(table))
    )
    write_text(out / "table.md", text)
    if table:
        draw_figure(out / "figure.png", table)


def make_table(out: Path, done: Sequence[Row]) -> list[dict[str, Any]]:
    """A line per task, number of labels and arm; gains are over scratch in the same draws."""
    scores = {row: read_scores(out / row.name / "scores.csv") for row in done}
    curves = {row: curve(out, row) for row in done}
    cells = dict.fromkeys((row.task, row.labels, row.arm) for row in done)
    lines = []
    for task, labels, arm in cells:
        rows = [row for row in done if (row.task, row.labels, row.arm) == (task, labels, arm)]
        twins = {row: replace(row, arm=BASELINE) for row in rows}
        paired = {row: twin for row, twin in twins.items() if twin in scores and arm != BASELINE}
        gains = {row: differences(scores[row], scores[twin]) for row, twin in paired.items()}
        line: dict[str, Any] = {
            "task": Path(task).stem,
            "labels": labels,
            "arm": arm,
            "draws": len(rows),
            "paired_draws": len(gains),
        }
        for metric in ("dice", "nsd"):
            line[metric] = interval({row: scores[row] for row in rows}, metric)
            line[f"{metric}_gain"] = interval(gains, metric)
        line["classes"] = by_class({row: scores[row] for row in rows}, gains)
        about = json.loads((out / rows[0].name / "scores.json").read_text(encoding="utf-8"))
        line["cost"] = cost(about)
        line["origin"] = origin(about)
        line["curves"] = [curves[row] for row in rows]
        line["steps_to_scratch"] = [
            steps_to_reach(curves[row], curves[twin]) for row, twin in paired.items()
        ]
        lines.append(line)
    return lines


def interval(scores: Scores, metric: str) -> list[float | None]:
    """Mean and bounds, drawing draws and subjects, each independently of the other."""
    flat = [(row.draw, score) for row, of_run in scores.items() for score in of_run]
    found: Interval = bootstrap_interval(
        [getattr(score, metric) for _, score in flat],
        [score.subject for _, score in flat],
        classes=[score.name for _, score in flat],
        draws=[str(draw) for draw, _ in flat],
    )
    return [None if math.isnan(value) else round(value, 5) for value in found]


def by_class(scores: Scores, gains: Scores) -> dict[str, dict[str, Any]]:
    """Dice and its gain for every class, without the structures that the volume cuts off."""

    def only(of_runs: Scores, name: str) -> Scores:
        return {
            row: [
                score
                for score in of_run
                if score.name == name and not score.truncated and not math.isnan(score.dice)
            ]
            for row, of_run in of_runs.items()
        }

    found = {}
    for name in dict.fromkeys(score.name for of_run in scores.values() for score in of_run):
        own = only(scores, name)
        found[name] = {
            "cases": len({score.case for of_run in own.values() for score in of_run}),
            "dice": interval(own, "dice"),
            "dice_gain": interval(only(gains, name), "dice"),
        }
    return found


def cost(about: dict[str, Any]) -> dict[str, float | None]:
    """What a run's scores say it took, of one draw since all draws are alike."""
    return {
        "trained_parameters": about["parameters"].get("trained"),
        "parameters": about["parameters"]["all"],
        "peak_memory_mb": about["peak_memory_mb"],
        "seconds_per_step": round(about["seconds"] / about["steps"], 3),
        "cpu_seconds_per_step": round(about["cpu_seconds"] / about["steps"], 3),
    }


def origin(about: dict[str, Any]) -> dict[str, str]:
    """What a run's scores say it began with, and what made them."""
    made = about["provenance"]
    return {
        "start": about["weights"],
        "contamination": about["contamination"],
        "training": f"{about['steps']} steps; {about['split']}",
        "command": about["command"],
        "made": (
            f"{made['date']}, commit {made['commit']}, {made['processor']}, "
            f"accelerator {made['accelerator']}, threads {made['threads']}, torch {made['torch']}"
        ),
    }


def curve(out: Path, row: Row) -> list[tuple[int, float]]:
    """Steps of a run and the mean validation Dice at each."""
    lines = Run(out / row.name).records()
    return [
        (line["step"], line["mean_dice"]) for line in lines if line.get("mean_dice") is not None
    ]


def steps_to_reach(
    ours: Sequence[tuple[int, float]], theirs: Sequence[tuple[int, float]]
) -> tuple[int | None, int]:
    """The first step at which one curve is as high as another at its end, and the other's steps."""
    steps, last = theirs[-1]
    return next((step for step, dice in ours if dice >= last), None), steps


def as_markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table for people; all in points, hundredths."""
    head = (
        "Means with 95 % intervals (over draws and subjects); gains over scratch are\n"
        "paired, in points. Steps: where scratch's last validation Dice is reached, of all.\n"
        "Cost: millions of trained parameters and of all, peak memory in MB, seconds per step on\n"
        "the clock and of CPU.\n"
        "\n| task | labels | arm | draws | Dice | NSD | Dice gain | NSD gain | steps | cost |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for line in table:
        reached = (f"{a or 'never'}/{b}" for a, b in line["steps_to_scratch"])
        cells = [
            *(str(line[key]) for key in ("task", "labels", "arm", "draws")),
            *(_shown(line[metric], 100, "") for metric in ("dice", "nsd")),
            *(_shown(line[f"{metric}_gain"], 100, "+") for metric in ("dice", "nsd")),
            ", ".join(reached),
            _cost_shown(line["cost"]),
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    return head + "".join(lines)


def classes_shown(table: Sequence[dict[str, Any]]) -> str:
    """The table class by class."""
    text = (
        "\n## By class\n\nDice as above, only of structures that lie wholly in the volume; cases: "
        "that have one.\n\n| task | labels | class | cases | arm | Dice | Dice gain |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for task, labels in dict.fromkeys((line["task"], line["labels"]) for line in table):
        arms = [line for line in table if (line["task"], line["labels"]) == (task, labels)]
        for name in arms[0]["classes"]:
            for line in arms:
                own = line["classes"][name]
                cells = [
                    *(task, labels, name, str(own["cases"]), line["arm"]),
                    _shown(own["dice"], 100, ""),
                    _shown(own["dice_gain"], 100, "+"),
                ]
                text += f"| {' | '.join(cells)} |\n"
    return text


def trials_shown(tried: Mapping[Row, float], cfg: Config) -> str:
    """How each arm's learning rate was chosen."""
    if not tried:
        return ""
    text = (
        f"\n## Learning rates\n\nDice on fold {cfg.tuning_fold}, {cfg.tuning_labels} labels, one "
        "draw; the best was taken for all runs of\nthe arm on that task.\n\n"
        f"| task | arm | {' | '.join(f'{rate:g}' for rate in cfg.rates)} |\n"
        f"|---|---|{'---|' * len(cfg.rates)}\n"
    )
    for task, arm in dict.fromkeys((row.task, row.arm) for row in tried):
        dice = {row.rate: d for row, d in tried.items() if (row.task, row.arm) == (task, arm)}
        cells = (f"{100 * dice[rate]:.2f}" if rate in dice else "" for rate in cfg.rates)
        text += f"| {Path(task).stem} | {arm} | {' | '.join(cells)} |\n"
    return text


def origins_shown(table: Sequence[dict[str, Any]]) -> str:
    """What the arms began with and what made their figures, each start said once."""
    text = (
        "\n## What the arms began with\n\n"
        "Decoders read the maps of an encoder's blocks: its neck is removed, whatever it held.\n"
    )
    firsts: dict[tuple[str, str], dict[str, Any]] = {}
    for line in table:
        firsts.setdefault((line["arm"], line["origin"]["start"]), line)
    for line in firsts.values():
        rows = (f"{key}: {value}" for key, value in line["origin"].items())
        where = f"{line['task']}, labels {line['labels']}"
        text += "\n".join([f"\n### {line['arm']} ({where})\n", "```text", *rows, "```\n"])
    return text


def _cost_shown(found: dict[str, float | None]) -> str:
    """Parameters, memory, time."""
    trained, every = (
        "not kept" if number is None else f"{number / 1e6:.2f}"
        for number in (found["trained_parameters"], found["parameters"])
    )
    seconds = f"{found['seconds_per_step']} / {found['cpu_seconds_per_step']}"
    return f"{trained} of {every}, {found['peak_memory_mb']}, {seconds}"


def _shown(found: Sequence[float | None], factor: float, sign: str) -> str:
    """Mean (low to high), as far as they are known."""
    mean, *bounds = (None if v is None else f"{factor * v:{sign}.2f}" for v in found)
    if mean is None:
        return ""
    return mean if None in bounds else f"{mean} ({' to '.join(map(str, bounds))})"


def draw_figure(path: Path, table: Sequence[dict[str, Any]]) -> None:
    """Writes a PNG with a column per task.

    Above the Dice of every arm against the number of labelled subjects, below the validation Dice
    against steps, at the number of labels that the study begins with.
    """
    tasks = [*dict.fromkeys(line["task"] for line in table)]
    figure = Figure(figsize=(5 * len(tasks), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    for column, task in zip(figure.subplots(2, len(tasks), squeeze=False).T, tasks, strict=True):
        lines = [line for line in table if line["task"] == task]
        arms = [*dict.fromkeys(line["arm"] for line in lines)]
        colours = {arm: f"C{number}" for number, arm in enumerate(arms)}
        draw_scores(column[0], lines, colours)
        column[0].set_title(task)
        first = lines[0]["labels"]
        draw_curves(column[1], [line for line in lines if line["labels"] == first], colours)
        column[1].set_title(f"{task}, {first} labelled subjects: each draw", fontsize=10)
        for axes in column:
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8, framealpha=0.5)  # an interval may end behind it
    figure.savefig(path, dpi=110)


def draw_scores(axes: Axes, lines: Sequence[dict[str, Any]], colours: Mapping[str, str]) -> None:
    """Means and intervals of every arm, by number of labels."""
    numbers = sorted(
        {line["labels"] for line in lines},
        key=lambda labels: math.inf if labels == "all" else int(labels),
    )
    for number, (arm, colour) in enumerate(colours.items()):
        shift = 0.06 * (number - (len(colours) - 1) / 2)  # centred on the tick
        own = [line for line in lines if line["arm"] == arm]
        own.sort(key=lambda line: numbers.index(line["labels"]))
        places = [numbers.index(line["labels"]) + shift for line in own]
        means = [100 * line["dice"][0] for line in own]
        ends = [
            [100 * (v if v is not None else line["dice"][0]) for v in line["dice"][1:]]
            for line in own
        ]
        sides = [
            [m - low for m, (low, _) in zip(means, ends, strict=True)],
            [high - m for m, (_, high) in zip(means, ends, strict=True)],
        ]
        axes.errorbar(places, means, sides, marker="o", capsize=3, color=colour, label=arm)
    axes.set_xticks(range(len(numbers)), numbers)
    axes.set_xlim(-0.5, len(numbers) - 0.5)  # also where there is one number alone
    axes.set_xlabel("labelled subjects")
    axes.set_ylabel("Dice (%), 95 % interval")


def draw_curves(axes: Axes, lines: Sequence[dict[str, Any]], colours: Mapping[str, str]) -> None:
    """A line per run."""
    for line in lines:
        for number, points in enumerate(line["curves"]):
            steps, dice = zip(*points, strict=True)
            axes.plot(
                steps,
                [100 * value for value in dice],
                marker=".",
                linewidth=1,
                color=colours[line["arm"]],
                label=line["arm"] if number == 0 else None,
            )
    axes.set_xlabel("steps")
    axes.set_ylabel("validation Dice (%)")


if __name__ == "__main__":
    try:
        cfg, flags = config.parse(
            Config, description=__doc__, flags={"report": "train nothing, write table and figure"}
        )
        main(cfg, **flags)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
