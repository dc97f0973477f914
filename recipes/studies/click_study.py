"""How good are promptable weights after clicks, on cases that they were not trained on?

    python recipes/studies/click_study.py recipes/studies/click_study.yaml weights=FILE
    python recipes/studies/click_study.py recipes/studies/click_study.yaml weights=FILE --report

Four players of ``clickbench/1``, one after the other: the predictor given the newest click, the
same given all clicks, the same network with random initialisation, and a ball around the first
click with the mean volume of the class in the training cases. Cases that the weights' metadata list
as trained on are refused. The same command resumes a study that was stopped; `--report` only
rewrites table and figure. Clicks and masks stay in SAMMED3D_RUNS, as `sammed3d clicks` writes them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sammed3d_backbone.recipes.studies import tables

from sammed3d_backbone import config, console, sam
from sammed3d_backbone.clickbench.bench import header_of, run_benchmark
from sammed3d_backbone.clickbench.cases import ClickSet, read_click_set
from sammed3d_backbone.clickbench.journal import Journal, read_journal, read_times
from sammed3d_backbone.clickbench.presets import rules_of
from sammed3d_backbone.clickbench.protocol import ClickRules, PromptableModel
from sammed3d_backbone.data.datasets import LabelledCase, read_fold
from sammed3d_backbone.data.folders import open_dataset
from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.data.preparation import load_label
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import locked, write_text
from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.loading.calibration import DiceCalibration
from sammed3d_backbone.loading.checkpoint import content_sha256, read
from sammed3d_backbone.loading.hub import locate
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.provenance import command_line, cores, provenance, strip_directory
from sammed3d_backbone.training.runs import runs_folder

HERE = Path(__file__).parent
PROTOCOL = "clickbench/1"
# One of Okabe and Ito's colours for each player, in the order of the tables.
PLAYERS = {"newest": "#0072B2", "all": "#56B4E9", "untrained": "#999999", "sphere": "#E69F00"}
SHADES = ("#D55E00", "#0072B2")  # first and last number of clicks
RATED = ("newest", "all")  # players whose predicted Dice is compared with the true one
DIFFERENCES = (
    ("newest", "untrained"),
    ("newest", "sphere"),
    ("all", "sphere"),
    ("all", "newest"),
)
MEASURES = {"dice": "Dice", "nsd_2mm": "NSD at 2 mm"}
COLUMNS = ("case", "subject", "class", "step", *MEASURES, "predicted_dice")
TARGET = ("case", "class", "step")  # key by which two players are paired
BINS = 5  # groups of equal count in which predicted and true Dice are compared

# Header of a player's journal, and its models with the cases of each.
Entry = tuple[dict[str, Any], list[tuple[PromptableModel, ClickSet]]]


@dataclass(frozen=True)
class Config:
    """The study."""

    weights: str | None = None  # file or name of a whole promptable network
    variant: str = "tiny"
    data: str = "headneck_ct"  # folder, or its name below SAMMED3D_DATA
    fold: int = 0  # its validation cases are played
    cases: int | None = None  # the first so many of them; None: all
    first: Literal["centre", "random"] = "centre"  # where the first click falls
    players: tuple[str, ...] = ("newest", "all", "untrained", "sphere")  # which of them play
    clicks: tuple[int, ...] = (1, 3, 5, 10)  # numbers of clicks that are reported; the last ends it
    calibrated: bool = True  # predicted Dice; False: the confidence, to fit a calibration to
    out: str = "click_study"  # folder of the results, relative to recipes/studies/results
    threads: int = 0  # 0: all cores
    seed: int = 0  # seed of the random initialisation

    def __post_init__(self) -> None:
        steps = rules_of(PROTOCOL).steps
        if not self.clicks or [*self.clicks] != sorted({*self.clicks} & {*range(1, steps + 1)}):
            raise ValueError(
                f"clicks={[*self.clicks]}; give numbers from 1 to {steps}, the smallest first"
            )


class Ball:
    """Predicts a ball of one volume around the first click, whatever comes after.

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
    out = HERE / "results" / cfg.out
    if not report:
        torch.set_num_threads(cfg.threads or cores())
        rules = replace(rules_of(PROTOCOL), steps=cfg.clicks[-1])
        players = players_of(cfg, rules)
        due = [
            name
            for name, (header, _) in players.items()
            if not tables.is_done(out, name, tables.digest(header))
        ]
        for name in due:
            header, turns = players[name]
            print(f"{name}: {header['model']}")
            folder = runs_folder() / Path(cfg.out).name / name
            with locked(folder):
                journal = Journal(folder, header, rules.steps)
                for model, click_set in turns:
                    if failed := run_benchmark(model, rules, click_set, journal, [cfg.first]):
                        raise ValueError(f"{name} could not play all cases: {failed}")
            row = row_of(name, header, journal.folder)
            tables.add(out, row, scores=scores_of(journal.folder))
            write_report(out, cfg.clicks)
    write_report(out, cfg.clicks)


# --- players and cases -------------------------------------------------------------------------


def players_of(cfg: Config, rules: ClickRules) -> dict[str, Entry]:
    """Every player and the header of its journal, before anything is played.

    Raises:
        ValueError: If there are no weights, or they were trained on a case that is to be scored.
    """
    if cfg.weights is None:
        raise ValueError(
            "weights=null: a random initialisation is among the players anyway; pass weights=FILE "
            "of recipes/pretrain_promptable.py, or a name"
        )
    scored, bank = sides(cfg)
    _, path = locate(cfg.weights)
    note = refuse_trained(trained_cases(read(path)[1]), scored)
    trained = sam(cfg.variant, weights=cfg.weights)
    if not cfg.calibrated:
        trained.pretrained_cfg = replace(trained.pretrained_cfg, dice_calibration=DiceCalibration())
    preprocessing = Predictor(trained).preprocessing
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
            "clicks": clicks,
        }
        return header, [(Predictor(network, clicks=clicks, preprocessing=preprocessing), scored)]

    name = f"{cfg.variant}, {strip_directory(trained.pretrained_cfg.name)}"
    balls = {
        **shared,
        "model": "ball of the class's mean volume around the first click",
        "volumes_mm3": {name: round(volume, 1) for name, volume in volumes_mm3.items()},
    }
    players = {
        "newest": networked(trained, "newest", model=name, trained_on=note),
        "all": networked(trained, "all", model=name, trained_on=note),
        "untrained": networked(
            untrained, "newest", model=f"{cfg.variant}, random initialisation, seed {cfg.seed}"
        ),
        "sphere": (
            balls,
            [(Ball(v), scored.selected(classes=[name])) for name, v in volumes_mm3.items()],
        ),
    }
    if unknown := sorted({*cfg.players} - {*players}):
        raise ValueError(f"players={unknown}: choose among {', '.join(players)}")
    return {name: entry for name, entry in players.items() if name in cfg.players}


def sides(cfg: Config) -> tuple[ClickSet, list[LabelledCase]]:
    """The cases of the fold that are scored, and those that the balls are measured on."""
    dataset = open_dataset(cfg.data)
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
    """A statement about the overlap of training and scored cases.

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


def mean_volumes_mm3(cases: Iterable[LabelledCase]) -> dict[str, float]:
    """Mean volume of every class over the cases that have it; classes that none has are absent."""
    found: dict[str, list[float]] = {}
    for case in console.progress_bar(cases, desc="mean volumes", unit="case"):
        label = load_label(case.case)
        voxel_mm3 = abs(float(np.linalg.det(label.affine[:3, :3])))
        for value, name in sorted((case.labels or {}).items()):
            if voxels := int((label.array == value).sum()):
                found.setdefault(name, []).append(voxels * voxel_mm3)
    return {name: float(np.mean(volumes)) for name, volumes in found.items()}


# --- results ------------------------------------------------------------------------------------


def row_of(player: str, header: Mapping[str, Any], journal: Path) -> dict[str, Any]:
    """A player's row of runs.csv."""
    _, lines = read_journal(journal)
    seconds = [line["seconds"]["click"] for line in read_times(journal) if line["seconds"]]
    keys = ("model", "weights_sha256", "clicks", "trained_on", "dataset", "dataset_sha256", "fold")
    volumes = header.get("volumes_mm3")
    return {
        "run": player,
        "config": tables.digest(header),
        **{key: header.get(key) for key in keys},
        "first_click": ", ".join(header["starts"]),
        "volumes_mm3": volumes and json.dumps(volumes),
        "dropped": sum("dropped" in line for line in lines),
        "failures": sum(bool(line.get("failure")) for line in lines),
        "seconds_per_click": round(float(np.mean(seconds)), 3),
        "command": command_line(1),
        **tables.made(provenance(HERE)),
    }


def scores_of(journal: Path) -> pd.DataFrame:
    """A row per target and click."""
    _, lines = read_journal(journal)
    rows = [line for line in lines if "dropped" not in line]
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def write_report(out: Path, clicks: Sequence[int]) -> None:
    """Writes table.md and figure.png from runs.csv and scores.csv.

    Raises:
        FileNotFoundError: If there are no results.
    """
    runs = tables.read(out, "runs")
    if runs.empty:
        raise FileNotFoundError(f"no results in {out}; leave out --report to make them")
    rows = tables.read(out, "scores")
    players = dict([*rows.groupby("run", sort=False)])
    differences = {
        f"{one} - {other}": tables.paired(players[one], players[other], TARGET, [*MEASURES])
        for one, other in DIFFERENCES
        if {one, other} <= {*players}
    }
    rated = {
        name: predicted(players[name], clicks)
        for name in RATED
        if name in players and players[name]["predicted_dice"].notna().any()
    }
    targets = len(rows.drop_duplicates(["case", "class"]))
    text = (
        f"`{PROTOCOL}` on {runs['dataset'].iloc[0]}, validation cases of fold "
        f"{runs['fold'].iloc[0]}: {targets} targets of {rows['subject'].nunique()} subjects, first "
        f"click: {runs['first_click'].iloc[0]}. Means in %, every class with the same weight, with "
        "95 % intervals over subjects.\n\n"
        + tables.markdown(click_table("player", players, clicks))
        + "\n## Differences\n\nTarget by target, in points.\n\n"
        + tables.markdown(click_table("difference", differences, clicks, "+"))
        + "\n## Classes\n\n"
        + tables.markdown(class_table(players, (clicks[0], clicks[-1])))
        + "\n## Predicted Dice\n\nPredicted Dice against the true one, all targets "
        "with the same weight. Errors are predicted "
        f"minus true, in points. Groups: {BINS} of equal count by predicted Dice (predicted: true, "
        "in %); the error of groups is the mean absolute difference of the two.\n\n"
        + tables.markdown(pd.concat([pd.DataFrame(), *(shown[0] for shown in rated.values())]))
        + "\n## What made the figures\n\n"
        + tables.markdown(runs.drop(columns="config"))
    )
    write_text(out / "table.md", text)
    draw_figure(out / "figure.png", players, rated)


def click_table(
    title: str, of: Mapping[str, pd.DataFrame], clicks: Sequence[int], sign: str = ""
) -> pd.DataFrame:
    """Measures after the reported numbers of clicks."""
    lines = []
    for name, own in of.items():
        for measure, label in MEASURES.items():
            line = {title: name, "measure": label}
            for n in clicks:
                found = tables.interval(own[own["step"] == n], measure)
                line[f"after {n}"] = tables.shown(found, 1, sign)
            lines.append(line)
    return pd.DataFrame(lines)


def class_table(players: Mapping[str, pd.DataFrame], clicks: Sequence[int]) -> pd.DataFrame:
    """Measures of every class with every player, after the first and last number of clicks."""
    lines = []
    every = pd.concat(players.values())
    for (name, player), own in every.groupby(["class", "run"], sort=False):
        line = {"class": name, "targets": str(own["case"].nunique()), "player": player}
        for measure, label in MEASURES.items():
            for n in clicks:
                found = tables.interval(own[own["step"] == n], measure)
                line[f"{label} after {n}"] = tables.shown(found)
        lines.append(line)
    order = every["class"].unique().tolist()
    return pd.DataFrame(lines).sort_values("class", key=lambda c: c.map(order.index), kind="stable")


def predicted(
    rows: pd.DataFrame, clicks: Sequence[int]
) -> tuple[pd.DataFrame, dict[int, pd.DataFrame]]:
    """How predicted Dice relates to the true one: the table, and the groups of equal count.

    The last line of the table is about all reported numbers of clicks together.
    """
    lines, groups = [], {}
    known = rows[rows["step"].isin(clicks)].dropna(subset="predicted_dice")
    known = known.sort_values("predicted_dice", kind="stable")
    for n in (*clicks, None):
        own = known if n is None else known[known["step"] == n]
        off = own["predicted_dice"] - own["dice"]
        varied = own["predicted_dice"].nunique() > 1 and own["dice"].nunique() > 1
        rank = own["predicted_dice"].corr(own["dice"], method="spearman") if varied else None
        absolute, signed = (
            tables.interval(own.assign(off=each), "off", classes=False) for each in (off.abs(), off)
        )
        parts = [part for part in np.array_split(np.arange(len(own)), BINS) if len(part)]
        columns = ["predicted_dice", "dice"]
        means = pd.DataFrame([own[columns].iloc[part].mean() for part in parts], columns=columns)
        if n is not None:
            groups[n] = means
        apart = (means["predicted_dice"] - means["dice"]).abs().mean()
        lines.append(
            {
                "player": own["run"].iloc[0] if len(own) else "",
                "clicks": "together" if n is None else str(n),
                "masks": str(len(own)),
                "Spearman": "" if rank is None else f"{rank:.2f}",
                "absolute error": tables.shown(absolute),
                "signed error": tables.shown(signed, 1, "+"),
                "error of groups": f"{100 * apart:.1f}",
            }
            | {
                f"group {i + 1}": f"{100 * group['predicted_dice']:.1f}: {100 * group['dice']:.1f}"
                for i, group in means.iterrows()
            }
        )
    return pd.DataFrame(lines), groups


def draw_figure(
    path: Path,
    players: Mapping[str, pd.DataFrame],
    rated: Mapping[str, tuple[pd.DataFrame, dict[int, pd.DataFrame]]],
) -> None:
    """Writes a PNG: Dice along the clicks, and predicted against true Dice.

    On the right a dot is a target after the first or last number of clicks, a square a group.
    """
    figure = tables.new_figure(10, 4.4)
    left, right = figure.subplots(1, 2)
    for name, own in players.items():
        found = {n: tables.interval(rows, "dice") for n, rows in own.groupby("step")}
        mean, low, high = 100 * np.array([*found.values()]).T
        left.plot([*found], mean, "o-", color=PLAYERS[name], markersize=3, label=name)
        left.fill_between([*found], low, high, color=PLAYERS[name], alpha=0.2, linewidth=0)
    left.set_xticks([*found])
    left.set_ylim(bottom=0)
    left.set(xlabel="clicks", ylabel="Dice (%)", title="every class the same weight, 95 %")
    shown = next(iter(rated), "")
    own, groups = players.get(shown), rated[shown][1] if rated else {}
    for n, colour in zip(dict.fromkeys([*groups][:1] + [*groups][-1:]), SHADES, strict=False):
        dots = 100 * own.loc[own["step"] == n, ["predicted_dice", "dice"]]
        right.scatter(dots["predicted_dice"], dots["dice"], 9, colour, alpha=0.5, linewidth=0)
        means = 100 * groups[n]
        label = f"{n} click{'s'[: n > 1]}"
        right.plot(means["predicted_dice"], means["dice"], "s-", color=colour, label=label)
    right.axline((0, 0), slope=1, color="black", linestyle=":", linewidth=1, label="equal")
    right.set(xlabel="predicted Dice (%)", ylabel="true Dice (%)", title=f"{shown}: calibration")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    cfg, flags = config.parse(
        Config, description=__doc__, flags={"report": "play nothing, write table and figure"}
    )
    sys.exit(console.run_program(lambda: main(cfg, **flags), "click_study"))
