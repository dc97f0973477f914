"""nnU-Net, MONAI's SegResNet and the planned recipe on the same cases, for equal CPU seconds.

    export NNUNET_PYTHON=~/nnunet/bin/python  # or --nnunet; see README.md for its environment
    python recipes/studies/peers/peers_study.py recipes/studies/peers/peers_study.yaml
    python recipes/studies/peers/peers_study.py recipes/studies/peers/peers_study.yaml --report

The YAML file holds the fields of `Study`. The same command resumes a study that was stopped: runs
that have results are skipped, and so are finished stages of a run. Everything but table and figure
lies in SAMMED3D_RUNS/<out>, a folder per data set, number of subjects and draw.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sammed3d_backbone.recipes import finetune_unetr
from sammed3d_backbone.recipes.evaluate import from_folder
from sammed3d_backbone.recipes.studies import tables
from sammed3d_backbone.recipes.studies.arms import ArmConfig
from sammed3d_backbone.recipes.studies.peers.conversion import RAW, convert
from sammed3d_backbone.recipes.studies.peers.peers_report import BASELINE, write_report

from sammed3d_backbone import config, console
from sammed3d_backbone.data.datasets import Dataset, Fold, read_fold
from sammed3d_backbone.data.folders import open_dataset
from sammed3d_backbone.evaluation.scores import (
    Score,
    score_cases,
    summarise_scores,
    write_scores,
)
from sammed3d_backbone.files import write_json
from sammed3d_backbone.provenance import provenance
from sammed3d_backbone.training.runs import Run, runs_folder

HERE = Path(__file__).parent
TRAINER = HERE / "nnunet/trainer.py"
# Arm -> what is added to its plan; "segresnet" is not a key of the plan but another network.
RECIPE_ARMS = {"tiny": (), "scratch": ("scratch=true",), "segresnet": ("segresnet",)}
PYTHON_VARIABLE = "NNUNET_PYTHON"
SPENT_SHARE = 0.97  # of the budget: a measurement of a few iterations is not exact
AGREED = 1e-6  # Dice by which our scorer may differ from nnU-Net's
MEASURED = 14  # iterations before a run, from which the number in the budget follows
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Study:
    """A study, as its YAML file states it."""

    out: str  # folder of the results, relative to recipes/studies/results
    # Name -> data, subjects, test_subjects, classes, and nnunet_gb: target of nnU-Net's planner,
    # from which its patch follows.
    tasks: Mapping[str, Mapping[str, Any]]
    # Runs, the most informative first: task, labels (number of subjects, or all), draw, arms.
    grid: Sequence[Mapping[str, Any]]
    budget_cpu_seconds: float = 1800.0
    counted_iterations: int = 1000  # of nnU-Net, below which a data set does not count


@dataclass(frozen=True)
class Planned:
    """One run of a study."""

    task: str
    labels: int | str
    draw: int  # seed of the drawn subjects and of the training; number of the fold
    arm: str

    @property
    def cell(self) -> str:
        """Name of the folder that all arms share."""
        return f"{self.task}_{self.labels}_draw{self.draw}"

    @property
    def name(self) -> str:
        """Name of the run's rows."""
        return f"{self.cell}_{self.arm}"


@dataclass(frozen=True)
class Place:
    """Where a run reads and writes."""

    name: str  # of the folder, below that of all runs
    folder: Path  # of the cell
    arm: Path
    dataset: Dataset
    fold: Fold

    @property
    def test_images(self) -> Path:
        """The scans to predict."""
        return self.folder / RAW / "imagesTs"


def read_study(path: Path) -> Study:
    """The study of a YAML file.

    Raises:
        ValueError: If a key is unknown or missing, or a block names an unknown task or arm.
    """
    study = tables.load(Study, path)
    for run in in_order(study):
        if run.task not in study.tasks or run.arm not in (BASELINE, *RECIPE_ARMS):
            raise ValueError(
                f"{path}: grid has task {run.task} and arm {run.arm}; tasks: {[*study.tasks]}, "
                f"arms: {[BASELINE, *RECIPE_ARMS]}"
            )
    return study


def in_order(study: Study) -> Iterator[Planned]:
    """All runs in the order of the file."""
    for block in study.grid:
        for arm in block["arms"]:
            yield Planned(block["task"], block["labels"], block["draw"], arm)


def main(study: Study, *, nnunet: str | None = None, report: bool = False) -> None:
    """Makes the runs that are missing, then table and figure."""
    out = HERE.parent / "results" / study.out
    for run in () if report else in_order(study):
        digest = tables.digest(settings_of(run, study))
        if not tables.is_done(out, run.name, digest):
            place = prepare(run, study)
            of_arm = run_nnunet if run.arm == BASELINE else run_recipe
            row, scores = of_arm(run, study, place, nnunet)
            about = {
                **{key: getattr(run, key) for key in ("task", "draw", "arm")},
                "labels": str(run.labels),
                "settings": json.dumps(settings_of(run, study)),
                "config": digest,
                "budget": study.budget_cpu_seconds,
                "split": f"{len(place.fold.train)} cases to train, {len(place.fold.val)} to test",
            }
            row = {"run": run.name, **about, **row, **tables.made(provenance(HERE))}
            tables.add(out, row, scores=scores)
            write_report(out, study.budget_cpu_seconds, study.counted_iterations)
    write_report(out, study.budget_cpu_seconds, study.counted_iterations)


def settings_of(run: Planned, study: Study) -> dict[str, Any]:
    """What a run's results depend on."""
    given = {**study.tasks[run.task], "budget": study.budget_cpu_seconds}
    if run.arm != BASELINE:
        given.pop("nnunet_gb")
    return given


def iterations_in(budget: float, step_cpu_seconds: float) -> int:
    """The iterations that a budget has time for, with a reserve."""
    return max(1, math.floor(SPENT_SHARE * budget / step_cpu_seconds))


def prepare(run: Planned, study: Study) -> Place:
    """Converts the cases of a run, unless another arm has done so."""
    name = f"{Path(study.out).name}/{run.cell}"
    folder = runs_folder() / name
    if not (folder / "all/dataset.json").is_file():
        given = {"name": name, "data": run.task, **study.tasks[run.task]}
        classes, _ = given.pop("classes", ()), given.pop("nnunet_gb")
        number = None if run.labels == "all" else run.labels
        given |= {"fold": run.draw, "seed": run.draw, "num_subjects": number}
        cfg = config.build(ArmConfig, given)
        convert(*finetune_unetr.choose_cases(cfg, cfg.draw), folder, classes)
    dataset = open_dataset(str(folder / "all"))
    arm = folder / run.arm
    arm.mkdir(exist_ok=True)
    return Place(name, folder.resolve(), arm.resolve(), dataset, read_fold(dataset, 0))


# --- arms ---------------------------------------------------------------------------------------


def run_nnunet(
    run: Planned, study: Study, place: Place, python: str | None
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Plans, trains and predicts with nnU-Net; its row and scores.

    Raises:
        ValueError: If its Python is not given, or its own evaluation differs from ours.
    """
    python = python or os.environ.get(PYTHON_VARIABLE)
    if not python:
        raise ValueError(
            f"no Python that has nnU-Net; set {PYTHON_VARIABLE} or pass --nnunet, see "
            f"{HERE / 'README.md'}"
        )
    env = {
        "nnUNet_raw": str(place.folder / "raw"),
        "nnUNet_preprocessed": str(place.arm / "preprocessed"),
        "nnUNet_results": str(place.arm / "results"),
        "nnUNet_extTrainer": str(TRAINER.parent),
    }

    def ask(*words: object) -> dict[str, Any]:
        return execute([python, TRAINER, *words], place.arm / "log.txt", env)

    def train() -> dict[str, Any]:
        shutil.rmtree(place.arm / "results", ignore_errors=True)  # one that was stopped
        return ask("train", steps, run.draw)

    plan = once(place.arm / "plan.json", lambda: ask("plan", study.tasks[run.task]["nnunet_gb"]))
    cost = once(place.arm / "measured.json", lambda: ask("measure", MEASURED))
    steps = iterations_in(study.budget_cpu_seconds, cost["step_cpu_seconds"])
    trained = once(place.arm / "trained.json", train)
    predictions = place.arm / "predictions"
    words = ("predict", place.test_images, predictions)
    predicted = once(place.arm / "predicted.json", lambda: ask(*words))
    scores = scored(predictions, place)
    dice = summarise_scores(scores, [*place.dataset.targets])["mean_dice"]
    compare(scores, ask("evaluate", place.folder / RAW / "labelsTs", predictions), place.dataset)
    row = {
        "iterations": trained["iterations"],
        "cpu_seconds": trained["cpu_seconds"],
        "parameters": trained["parameters"],
        "plan": f"patch {plan['patch_size']}, batch {plan['batch_size']}",
        "start": "nnU-Net: random initialisation",
        "seen": "No pretraining.",
    }
    end = [(trained["cpu_seconds"], dice)]
    return row | _costs(cost, trained, predicted, end), write(scores, place)


def run_recipe(
    run: Planned, study: Study, place: Place, _: str | None
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Plans, trains and predicts with our recipe; its row and scores."""
    extra = RECIPE_ARMS[run.arm]
    log = place.arm / "log.txt"
    name = f"{place.name}/{run.arm}/run"
    keys = (f"name={name}", f"data={place.folder / 'all'}", f"seed={run.draw}", "cpu=true")
    given = (*keys, "threads=1", *extra)
    own = [sys.executable, HERE / "recipe_arm.py"]
    sammed3d = Path(sys.executable).with_name("sammed3d")

    def plan(path: Path, *words: object) -> dict[str, Any]:
        fixed = ("--jobs", 1, "--memory", "8GB", "--precision", "no", "--force")
        return execute([sammed3d, "plan", place.folder / RAW, "--out", path, *fixed, *words], log)

    def train() -> dict[str, Any]:
        other = "segresnet" in extra
        return execute([*own, "train"] if other else [sammed3d, "train"], log, tail=[final, *given])

    draft, final = place.folder / "draft.yaml", place.arm / "plan.yaml"  # one for all arms
    once(place.folder / "draft.json", lambda: plan(draft))
    measure = [*own, "measure", draft, MEASURED, *given]
    cost = once(place.arm / "measured.json", lambda: execute(measure, log))
    steps = iterations_in(study.budget_cpu_seconds, cost["step_cpu_seconds"])
    once(place.arm / "plan.json", lambda: plan(final, "--steps", steps))
    trained = once(place.arm / "trained.json", train)
    predictions = place.arm / "predictions"
    model = runs_folder() / name / "last.safetensors"
    predict = [*own, "predict", model.resolve(), place.test_images, predictions]
    predicted = once(place.arm / "predicted.json", lambda: execute(predict, log))
    scores = scored(predictions, place)
    about = json.loads((runs_folder() / name / "results/scores.json").read_text(encoding="utf-8"))
    cfg = about["config"]
    row = {
        "iterations": about["steps"],
        "cpu_seconds": about["cpu_seconds"],
        "parameters": about["parameters"]["all"],
        "plan": f"crop {cfg['crop_vox']} at {cfg['spacing_mm']} mm, batch {cfg['batch']}, "
        f"lr {cfg['lr']}",
        "start": "; ".join(about["weights"].splitlines()),
        "seen": about["data_overlap"] or "No pretraining.",
    }
    curve = curve_of(Run(runs_folder() / name).records())
    return row | _costs(cost, trained, predicted, curve), write(scores, place)


def _costs(
    measured: Mapping[str, Any],
    trained: Mapping[str, Any],
    predicted: Mapping[str, Any],
    curve: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """The columns that all arms have from their stages."""
    return {
        "measured_step_cpu_seconds": measured["step_cpu_seconds"],
        "command_cpu_seconds": trained["command"]["cpu_seconds"],
        "peak_memory_mb": trained["command"]["peak_memory_mb"],
        "case_cpu_seconds": predicted["cpu_seconds"] / predicted["cases"],
        "curve": " ".join(f"{seconds:.0f}:{dice:.6g}" for seconds, dice in curve),
        "command": trained["command"]["line"],
    }


def curve_of(records: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """CPU seconds of training and validation Dice, from the log of a run of the recipe."""
    clocks = [(line["step"], line["cpu_seconds"]) for line in records if "cpu_seconds" in line]
    steps, seconds = zip((0, 0.0), *clocks, strict=True)
    found = [line for line in records if line.get("mean_dice") is not None]
    return [(float(np.interp(x["step"], steps, seconds)), x["mean_dice"]) for x in found]


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a stage, from its file if it was finished before."""
    if not path.is_file():
        write_json(path, make())
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def execute(
    command: Sequence[object],
    log: Path,
    env: Mapping[str, str] | None = None,
    tail: Sequence[object] = (),
) -> dict[str, Any]:
    """Runs a command on one thread; the JSON of its last line, and `command`: what it cost.

    The cost is user and system time of the process and of its workers, and the largest memory that
    one of them held.

    Raises:
        RuntimeError: If the command fails.
    """
    words = [*map(str, [*command, *tail])]
    with log.open("a+", encoding="utf-8") as output:
        start = output.seek(0, os.SEEK_END)
        errors = log.with_suffix(".err").open("a", encoding="utf-8")
        with errors:
            process = subprocess.Popen(
                words, stdout=output, stderr=errors, env={**os.environ, **ONE_THREAD, **(env or {})}
            )
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(
                f"{shlex.join(words)} ended with {process.returncode}; see {errors.name}"
            )
        output.seek(start)
        lines = output.read().splitlines() or [""]
    cost = {
        "line": shlex.join(words),
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_memory_mb": round(used.ru_maxrss / 1000),
    }
    return {**(json.loads(lines[-1]) if lines[-1].startswith("{") else {}), "command": cost}


# --- scores -------------------------------------------------------------------------------------


def scored(predictions: Path, place: Place) -> list[Score]:
    """Scores of a folder of predictions, the same for every arm."""
    ids = [*place.fold.val]
    return score_cases(
        from_folder(predictions, ids, place.dataset)[0], place.dataset, ids, progress=False
    )


def compare(scores: Sequence[Score], theirs: Mapping[str, Any], dataset: Dataset) -> None:
    """Checks that nnU-Net's own evaluation gives the same Dice.

    Raises:
        ValueError: If it does not.
    """
    numbers = {name: str(value) for value, name in dataset.labels.items()}
    for score in scores:
        other = theirs[f"{score.case}.nii.gz"][numbers[score.name]]
        other, ours = math.nan if other is None else other, score["dice"]
        if math.isnan(other) != math.isnan(ours) or abs(other - ours) > AGREED:
            raise ValueError(
                f"Dice of {score.name} in {score.case} is {ours}, by nnU-Net's evaluation {other}"
            )


def write(scores: Sequence[Score], place: Place) -> pd.DataFrame:
    """The rows of scores.csv."""
    write_scores(place.arm, scores, [*place.dataset.targets], {})
    return pd.read_csv(place.arm / "scores.csv", dtype=tables.TEXT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="YAML file with the fields of Study")
    parser.add_argument("--nnunet", help=f"Python that has nnU-Net (default: {PYTHON_VARIABLE})")
    parser.add_argument("--report", action="store_true", help="rewrite table and figure only")
    args = parser.parse_args()
    sys.exit(
        console.run_program(
            lambda: main(read_study(args.study), nnunet=args.nnunet, report=args.report),
            "peers_study",
        )
    )
