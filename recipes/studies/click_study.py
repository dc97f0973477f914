"""What promptable weights do with clicks, on cases that they were not trained on.

    python recipes/studies/click_study.py recipes/studies/click_study.yaml weights=FILE
    python recipes/studies/click_study.py recipes/studies/click_study.yaml weights=FILE --report

Four players of ``clickbench/1``, one after the other: the predictor told the newest click, the
same told all clicks, the same network with random values, and a ball around the first click that
has the mean volume of the class in the training cases. Cases that the weights' own metadata name
are refused. The same command goes on with a run that was stopped; --report only writes table and
figure.

Every click and mask lies in SAMMED3D_RUNS/NAME OF OUT/PLAYER, as `sammed3d clicks` leaves it.
OUT/PLAYER keeps a row per target and click (scores.csv) and what made it (about.json); table.json,
table.md and figure.png in OUT are made of these after every player.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from tqdm import tqdm

from sammed3d_backbone import config, sam
from sammed3d_backbone.clickbench.bench import header_of, run
from sammed3d_backbone.clickbench.cases import ClickCase, ClickSet, read_click_set
from sammed3d_backbone.clickbench.journal import Journal, read_journal, read_times
from sammed3d_backbone.clickbench.presets import rules_of
from sammed3d_backbone.clickbench.protocol import Promptable, Rules
from sammed3d_backbone.data.datasets import read_fold
from sammed3d_backbone.data.folders import find_dataset, read_dataset
from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.data.preparation import load_label
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.statistics import bootstrap_interval
from sammed3d_backbone.files import write_text
from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.loading.checkpoint import content_sha256, read
from sammed3d_backbone.loading.hub import locate
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.provenance import command_line, cores, provenance, strip_directory
from sammed3d_backbone.training.runs import runs_folder

HERE = Path(__file__).parent
PROTOCOL = "clickbench/1"
# One of Okabe and Ito's colours for each player, in the order of the tables.
PLAYERS = {"newest": "#0072B2", "all": "#56B4E9", "untrained": "#999999", "sphere": "#E69F00"}
SHADES = ("#D55E00", "#0072B2")  # of the first and last number of clicks
RATED = ("newest", "all")  # whose opinion of themselves is compared with the truth
DIFFERENCES = (("newest", "untrained"), ("newest", "sphere"), ("all", "newest"))
MEASURES = {"dice": "Dice", "nsd_2mm": "NSD at 2 mm"}
COLUMNS = ("case", "subject", "class", "step", *MEASURES, "predicted_dice")
BINS = 5  # of equal count, in which predicted and true Dice are compared

Row = dict[str, Any]  # a line of scores.csv
Found = list[float | None]  # mean, low, high
# What the results of a player depend on; its objects, each with what it is played on.
Entry = tuple[dict[str, Any], list[tuple[Promptable, ClickSet]]]


@dataclass(frozen=True)
class Config:
    """The study."""

    weights: str | None = None  # file or name of a whole promptable network
    variant: str = "tiny"
    data: str = "headneck_ct"  # folder, or its name below SAMMED3D_DATA
    fold: int = 0  # whose validation cases are played
    cases: int | None = None  # the first so many of them; None: all
    first: Literal["centre", "random"] = "centre"  # where the first click falls
    clicks: tuple[int, ...] = (1, 3, 5, 10)  # numbers of clicks that are reported; the last ends it
    out: str = "results/click_study"  # seen from recipes/
    threads: int = 0  # 0: all cores
    seed: int = 0  # of the random values

    def __post_init__(self) -> None:
        steps = rules_of(PROTOCOL).steps
        if not self.clicks or [*self.clicks] != sorted({*self.clicks} & {*range(1, steps + 1)}):
            raise ValueError(
                f"clicks={[*self.clicks]}; give numbers from 1 to {steps}, the smallest first"
            )


class Ball:
    """Answers with a ball of one volume around the first click, whatever comes after.

    The volume's border cuts it off.
    """

    def __init__(self, volume_mm3: float) -> None:
        self.radius_mm = (3 * volume_mm3 / (4 * math.pi)) ** (1 / 3)

    def set_volume(self, volume: Volume, **_about: object) -> None:
        """Takes the grid; what the image shows does not matter."""
        self._volume = volume

    def reset(self) -> None:
        """Forgets the click."""
        self._mask: NDArray[np.bool_] | None = None

    def click(self, point_vox: Triple, _positive: bool = True) -> None:
        """Puts the ball, at the first click only."""
        if self._mask is None:
            offsets = np.indices(self._volume.shape) - np.reshape(point_vox, (3, 1, 1, 1))
            offsets_mm = np.tensordot(self._volume.affine[:3, :3], offsets, 1)  # (3, X, Y, Z)
            self._mask = np.linalg.norm(offsets_mm, axis=0) <= self.radius_mm

    def predict(self) -> SimpleNamespace:
        """The ball."""
        return SimpleNamespace(mask=self._mask)


def main(cfg: Config, *, report: bool = False) -> None:
    """Plays what has no results yet, then writes table and figure."""
    out = HERE / cfg.out
    if not report:
        torch.set_num_threads(cfg.threads or cores())
        rules = replace(rules_of(PROTOCOL), steps=cfg.clicks[-1])
        players = players_of(cfg, rules)
        due = [name for name, (header, _) in players.items() if not is_done(out / name, header)]
        for name in due:
            header, turns = players[name]
            print(f"{name}: {header['model']}")
            journal = Journal(runs_folder() / Path(cfg.out).name / name, header, rules.steps)
            for model, click_set in turns:
                run(model, rules, click_set, journal, [cfg.first])
            keep(journal.folder, out / name)
            write_report(out, cfg.clicks)
    write_report(out, cfg.clicks)


# --- who plays, and on what ---------------------------------------------------------------------


def players_of(cfg: Config, rules: Rules) -> dict[str, Entry]:
    """Every player, not asked yet.

    Raises:
        ValueError: If there are no weights, or they were trained on a case that is to be scored.
    """
    if cfg.weights is None:
        raise ValueError(
            "weights=null: a random network is played beside trained ones in any case; pass "
            "weights=FILE of recipes/pretrain_promptable.py, or a name"
        )
    scored, bank = sides(cfg)
    _, path = locate(cfg.weights)
    note = refuse_trained(trained_cases(read(path)[1]), scored)
    trained = sam(cfg.variant, weights=cfg.weights)
    spacing_mm = Predictor(trained).spacing_mm
    torch.manual_seed(cfg.seed)
    untrained = sam(
        cfg.variant,
        pretrained=False,
        img_size=trained.img_size,
        point_pos=trained.prompt_encoder.point_pos,
    )
    volumes_mm3 = mean_volumes_mm3(bank)
    shared = header_of(rules, scored, [cfg.first])
    shared["fold"] = cfg.fold

    def networked(network: Sam3D, clicks: Literal["newest", "all"], **about: str) -> Entry:
        header = {
            **shared,
            **about,
            "weights_sha256": content_sha256(network.state_dict()),
            "told": f"{clicks} clicks",
        }
        return header, [(Predictor(network, clicks=clicks, spacing_mm=spacing_mm), scored)]

    name = f"{cfg.variant}, {strip_directory(trained.pretrained_cfg.name)}"
    balls = {
        **shared,
        "model": "ball of the class's mean volume around the first click",
        "volumes_mm3": {name: round(volume, 1) for name, volume in volumes_mm3.items()},
    }
    return {
        "newest": networked(trained, "newest", model=name, trained_on=note),
        "all": networked(trained, "all", model=name, trained_on=note),
        "untrained": networked(
            untrained, "newest", model=f"{cfg.variant}, random values, seed {cfg.seed}"
        ),
        "sphere": (
            balls,
            [(Ball(v), scored.selected(classes=[name])) for name, v in volumes_mm3.items()],
        ),
    }


def sides(cfg: Config) -> tuple[ClickSet, list[ClickCase]]:
    """The cases of the fold that are scored, and those that the balls are measured on."""
    dataset = read_dataset(find_dataset(cfg.data))
    fold = read_fold(dataset, cfg.fold)
    found = read_click_set(cfg.data)
    scored = replace(found, cases=tuple(c for c in found.cases if c.case.id in fold.val))
    return scored.selected(cfg.cases), [c for c in found.cases if c.case.id in fold.train]


def trained_cases(metadata: Mapping[str, str]) -> dict[str, set[str]]:
    """Ids by data set that weights say they were trained on, in all their stages."""
    found: dict[str, set[str]] = {}
    stage = json.loads(metadata.get("training", "{}"))
    while stage:
        for name, ids in stage.get("cases", {}).items():
            found.setdefault(name, set()).update(ids)
        stage = stage.get("before")
    return found


def refuse_trained(trained: Mapping[str, set[str]], scored: ClickSet) -> str:
    """What can be said about weights and cases; an error if they have met.

    Raises:
        ValueError: If the weights were trained on a case; names all of them.
    """
    if not trained:
        return "the weights do not say which cases they were trained on"
    seen = trained.get(scored.name, set())
    if met := sorted(seen & {entry.case.id for entry in scored.cases}):
        raise ValueError(
            f"the weights were trained on {len(met)} of the {len(scored.cases)} cases of "
            f"{scored.name} ({', '.join(met)}); pass fold= with cases that were held out, or "
            "other weights="
        )
    return f"{len(seen)} cases of {scored.name}, none of those that are scored"


def mean_volumes_mm3(cases: Iterable[ClickCase]) -> dict[str, float]:
    """Of every class, over the cases that have it; a class that none has is left out."""
    found: dict[str, list[float]] = {}
    for case in tqdm(cases, desc="mean volumes", unit="case"):
        label = load_label(case.case)
        voxel_mm3 = abs(float(np.linalg.det(label.affine[:3, :3])))
        for value, name in sorted((case.labels or {}).items()):
            if voxels := int((label.array == value).sum()):
                found.setdefault(name, []).append(voxels * voxel_mm3)
    return {name: float(np.mean(volumes)) for name, volumes in found.items()}


# --- results ------------------------------------------------------------------------------------


def is_done(folder: Path, header: Mapping[str, Any]) -> bool:
    """Whether a player's results are there.

    Raises:
        ValueError: If they are of another study; names what differs.
    """
    path = folder / "about.json"
    if not path.is_file():
        return False
    kept, wanted = json.loads(path.read_text(encoding="utf-8"))["header"], dict(header)
    if changed := sorted(k for k in {*kept, *wanted} if kept.get(k) != wanted.get(k)):
        raise ValueError(f"{folder} holds results of other {', '.join(changed)}; pass another out=")
    return True


def keep(journal: Path, folder: Path) -> None:
    """Copies what table and figure are made of; last about.json, which says that all is there."""
    header, lines = read_journal(journal)
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(line for line in lines if "dropped" not in line)
    write_text(folder / "scores.csv", text.getvalue())
    seconds = [line["seconds"]["click"] for line in read_times(journal) if line["seconds"]]
    about = {
        "header": {key: value for key, value in header.items() if key != "format"},
        "dropped": [line for line in lines if "dropped" in line],
        "failures": sum(bool(line.get("failure")) for line in lines),
        "seconds_per_click": round(float(np.mean(seconds)), 3),
        "command": command_line(1),
        "provenance": provenance(HERE),
    }
    write_text(folder / "about.json", json.dumps(about, indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The lines of a scores.csv with numbers in them; NaN where nothing was predicted."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {
                **line,
                "step": int(line["step"]),
                **{name: float(line[name]) for name in MEASURES},
                "predicted_dice": float(line["predicted_dice"] or "nan"),
            }
            for line in csv.DictReader(file)
        ]


def write_report(out: Path, clicks: Sequence[int]) -> None:
    """Writes table and figure of the players that have results.

    Raises:
        FileNotFoundError: If none has.
    """
    done = [name for name in PLAYERS if (out / name / "about.json").is_file()]
    if not done:
        raise FileNotFoundError(f"no results in {out}; leave out --report to make them")
    rows = {name: read_rows(out / name / "scores.csv") for name in done}
    table = make_table(rows, clicks)
    table["about"] = {
        name: json.loads((out / name / "about.json").read_text(encoding="utf-8")) for name in done
    }
    write_text(out / "table.json", json.dumps(table, indent=1) + "\n")
    write_text(out / "table.md", as_markdown(table))
    draw_figure(out / "figure.png", table, rows)


def make_table(rows: Mapping[str, list[Row]], clicks: Sequence[int]) -> dict[str, Any]:
    """All figures: means and differences after every click, classes, opinions."""
    return {
        "clicks": [*clicks],
        "players": {name: curves(of) for name, of in rows.items()},
        "classes": {name: per_class(of, clicks) for name, of in rows.items()},
        "differences": {
            f"{one} - {other}": curves(differences(rows[one], rows[other]))
            for one, other in DIFFERENCES
            if one in rows and other in rows
        },
        "opinions": {name: opinions(rows[name], clicks) for name in RATED if name in rows},
    }


def curves(rows: Sequence[Row]) -> dict[str, Any]:
    """Means after every click; every class counts alike."""
    steps = sorted({row["step"] for row in rows})
    return {
        "targets": len(targets(rows)),
        "subjects": len({row["subject"] for row in rows}),
        **{m: {str(n): interval(after(rows, n), m) for n in steps} for m in MEASURES},
    }


def per_class(rows: Sequence[Row], clicks: Sequence[int]) -> dict[str, Any]:
    """Means of every class after the first and the last reported number of clicks."""
    found = {}
    for name in dict.fromkeys(row["class"] for row in rows):
        own = [row for row in rows if row["class"] == name]
        found[name] = {"targets": len(targets(own))} | {
            m: {str(n): interval(after(own, n), m) for n in (clicks[0], clicks[-1])}
            for m in MEASURES
        }
    return found


def differences(ours: Sequence[Row], theirs: Sequence[Row]) -> list[Row]:
    """Ours minus theirs, target by target and click by click."""
    others = {(row["case"], row["class"], row["step"]): row for row in theirs}
    pairs = [(row, others.get((row["case"], row["class"], row["step"]))) for row in ours]
    return [
        {**row, **{m: row[m] - other[m] for m in MEASURES}}
        for row, other in pairs
        if other is not None
    ]


def opinions(rows: Sequence[Row], clicks: Sequence[int]) -> dict[str, Any]:
    """How the predicted Dice relates to the true one after some numbers of clicks."""
    found = {}
    for n in clicks:
        rated = [row for row in after(rows, n) if math.isfinite(row["predicted_dice"])]
        rated.sort(key=lambda row: row["predicted_dice"])
        predicted = np.array([row["predicted_dice"] for row in rated])
        true = np.array([row["dice"] for row in rated])
        errors = [{**row, "off": row["predicted_dice"] - row["dice"]} for row in rated]
        absolute = [{**row, "off": abs(row["off"])} for row in errors]
        varied = len(rated) > 1 and np.ptp(predicted) > 0 and np.ptp(true) > 0
        found[str(n)] = {
            "targets": len(rated),
            "spearman": round(float(stats.spearmanr(predicted, true)[0]), 5) if varied else None,
            "absolute_error": interval(absolute, "off", classes=False),
            "signed_error": interval(errors, "off", classes=False),
            "bins": [
                {
                    "targets": len(chosen),
                    "predicted": round(float(predicted[chosen].mean()), 5),
                    "true": round(float(true[chosen].mean()), 5),
                }
                for chosen in np.array_split(np.arange(len(rated)), BINS)
                if len(chosen)
            ],
        }
    return found


def after(rows: Iterable[Row], clicks: int) -> list[Row]:
    """The rows of one number of clicks."""
    return [row for row in rows if row["step"] == clicks]


def targets(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """Case and class."""
    return {(row["case"], row["class"]) for row in rows}


def interval(rows: Sequence[Row], column: str, *, classes: bool = True) -> Found:
    """Mean and bounds, drawing subjects; with `classes`, every class counts alike."""
    found = bootstrap_interval(
        [row[column] for row in rows],
        [row["subject"] for row in rows],
        classes=[row["class"] for row in rows] if classes else None,
    )
    return [None if math.isnan(value) else round(value, 5) for value in found]


# --- for people ---------------------------------------------------------------------------------


def as_markdown(table: Mapping[str, Any]) -> str:
    """The tables, and what made them."""
    clicks, abouts = table["clicks"], table["about"]
    header = next(iter(abouts.values()))["header"]
    counts = next(iter(table["players"].values()))
    ends = (clicks[0], clicks[-1])
    lines = [
        f"`{PROTOCOL}` on {header['dataset']}, validation cases of fold {header['fold']}: "
        f"{counts['targets']} targets of {counts['subjects']} subjects, first click: "
        f"{', '.join(header['starts'])}.",
        "Means in %, every class alike, with 95 % intervals over subjects, after so many clicks.",
        "",
        *_head("player", "measure", *(f"after {n}" for n in clicks)),
        *_curve_rows(table["players"], clicks, ""),
        "",
        "## Differences",
        "",
        "Target by target, in points.",
        "",
        *_head("difference", "measure", *(f"after {n}" for n in clicks)),
        *_curve_rows(table["differences"], clicks, "+"),
        "",
        "## Classes",
        "",
        *_head(
            *("class", "targets", "player"),
            *(f"{t} after {n}" for t in MEASURES.values() for n in ends),
        ),
        *_class_rows(table["classes"], ends),
        "",
        "## What the network expects of itself",
        "",
        "Predicted Dice of the window around the newest click against the true Dice of the whole "
        "mask, all targets alike.",
        "Errors are predicted minus true, in points.",
        "",
        *_head("player", "clicks", "targets", "Spearman", "absolute error", "signed error"),
        *_opinion_rows(table["opinions"]),
        "",
        f"In {BINS} groups of equal count, by predicted Dice (predicted: true, in %):",
        "",
        *_head("player", "clicks", *(f"group {n}" for n in range(1, BINS + 1))),
        *_bin_rows(table["opinions"]),
        "",
        "## What made the figures",
    ]
    for name, about in abouts.items():
        made, own = about["provenance"], about["header"]
        lines += [
            f"\n### {name}\n",
            "```text",
            f"model: {own['model']}",
            *(f"{key}: {own[key]}" for key in ("trained_on", "told", "volumes_mm3") if key in own),
            f"targets left out: {len(about['dropped'])}, answers that failed: {about['failures']}",
            f"command: {about['command']}",
            f"made: {made['date']}, commit {made['commit']}, {made['processor']}, accelerator "
            f"{made['accelerator']}, threads {made['threads']}, torch {made['torch']}, "
            f"{about['seconds_per_click']} s per click",
            "```",
        ]
    return "\n".join(lines) + "\n"


def _head(*names: str) -> tuple[str, str]:
    """The first two lines of a table."""
    return f"| {' | '.join(names)} |", "|" + "---|" * len(names)


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _curve_rows(found: Mapping[str, Any], clicks: Sequence[int], sign: str) -> Iterator[str]:
    """Measures after the reported numbers of clicks."""
    for name, of in found.items():
        for measure, title in MEASURES.items():
            yield _row(name, title, *(_shown(of[measure][str(n)], sign) for n in clicks))


def _class_rows(found: Mapping[str, Any], ends: Sequence[int]) -> Iterator[str]:
    """Every class with every player."""
    for name in dict.fromkeys(name for of in found.values() for name in of):
        for player, of in found.items():
            if name in of:
                cells = [_shown(of[name][m][str(n)], "") for m in MEASURES for n in ends]
                yield _row(name, of[name]["targets"], player, *cells)


def _opinion_rows(found: Mapping[str, Any]) -> Iterator[str]:
    """Rank correlation and errors."""
    for player, of in found.items():
        for n, figures in of.items():
            rank = "" if figures["spearman"] is None else f"{figures['spearman']:.2f}"
            errors = _shown(figures["absolute_error"], ""), _shown(figures["signed_error"], "+")
            yield _row(player, n, figures["targets"], rank, *errors)


def _bin_rows(found: Mapping[str, Any]) -> Iterator[str]:
    """The reliability tables."""
    for player, of in found.items():
        for n, figures in of.items():
            cells = [f"{100 * b['predicted']:.1f}: {100 * b['true']:.1f}" for b in figures["bins"]]
            yield _row(player, n, *cells, *[""] * (BINS - len(cells)))


def _shown(found: Found, sign: str) -> str:
    """Mean (low to high) in hundredths, as far as they are known."""
    mean, *bounds = (None if value is None else f"{100 * value:{sign}.1f}" for value in found)
    if mean is None:
        return ""
    return mean if None in bounds else f"{mean} ({' to '.join(map(str, bounds))})"


def draw_figure(path: Path, table: Mapping[str, Any], rows: Mapping[str, list[Row]]) -> None:
    """Writes a PNG: Dice along the clicks, and the predicted against the true Dice."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, of in table["players"].items():
        mean, low, high = 100 * np.array([*of["dice"].values()], dtype=float).T
        steps = [int(n) for n in of["dice"]]
        left.plot(steps, mean, color=PLAYERS[name], marker="o", markersize=3, label=name)
        left.fill_between(steps, low, high, color=PLAYERS[name], alpha=0.2, linewidth=0)
    left.set_xticks(steps)
    left.set_ylim(bottom=0)
    left.set(xlabel="clicks", ylabel="Dice (%)", title="every class alike, 95 % intervals")
    left.legend(fontsize=8)
    draw_opinions(right, rows.get(RATED[0], []), table["opinions"].get(RATED[0], {}))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_opinions(axes: Axes, rows: Sequence[Row], found: Mapping[str, Any]) -> None:
    """A dot per target after the first and last number of clicks; on the line, predicted is true.

    Squares are the groups of equal count.
    """
    for n, colour in zip(dict.fromkeys([*found][:1] + [*found][-1:]), SHADES, strict=False):
        of = after(rows, int(n))
        dots = ([100 * row[key] for row in of] for key in ("predicted_dice", "dice"))
        axes.scatter(*dots, s=9, color=colour, alpha=0.5, linewidth=0)
        means = ([100 * group[key] for group in found[n]["bins"]] for key in ("predicted", "true"))
        axes.plot(*means, color=colour, marker="s", label=f"{n} click{'s' if n != '1' else ''}")
    axes.axline((0, 0), slope=1, color="black", linestyle=":", linewidth=1, label="equal")
    axes.set(xlabel="predicted Dice (%)", ylabel="true Dice (%)")
    axes.set_title(f"{RATED[0]}: what it expects of itself")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    try:
        cfg, flags = config.parse(
            Config, description=__doc__, flags={"report": "play nothing, write table and figure"}
        )
        main(cfg, **flags)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
