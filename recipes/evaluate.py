"""Score a fine-tuned model, or predictions of any tool, and write one page about it.

    python recipes/evaluate.py RUN/last.safetensors hippocampus --fold 0   # a model
    python recipes/evaluate.py PREDICTIONS hippocampus --fold 0            # files CASE.nii.gz
    python recipes/evaluate.py RUN                                         # the page again

Dice, surface Dice and HD95 per class and case, on the grid of the files, into scores.csv,
scores.json and report.html, with the curves and the cost of the run of the model.
Without --fold or --split, all cases of the data set are scored.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sammed3d_backbone import console
from sammed3d_backbone.cli.checks import add_workers, on_device, require_free
from sammed3d_backbone.data.checks import label_problems
from sammed3d_backbone.data.datasets import Case, Dataset, read_fold
from sammed3d_backbone.data.folders import open_dataset
from sammed3d_backbone.data.limits import GRID_TOLERANCE
from sammed3d_backbone.data.preparation import load_image
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.report import About, write_report, write_results
from sammed3d_backbone.evaluation.scores import TOLERANCE_MM, read_scores, score_cases
from sammed3d_backbone.files import inside, locked
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import ByFiles, Segmenter
from sammed3d_backbone.loading.exposure import seen_in_pretraining
from sammed3d_backbone.loading.registry import DEFAULT_WEIGHTS, WEIGHTS, Weights
from sammed3d_backbone.parallel import workers
from sammed3d_backbone.provenance import provenance
from sammed3d_backbone.training.runs import Run

HERE = Path(__file__).parent

Predict = Callable[[Case], Volume]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        help="a model (file, or hf-hub:OWNER/REPO), a folder of predictions, or a run",
    )
    parser.add_argument(
        "data", nargs="?", help="folder of the data set, or its name below SAMMED3D_DATA"
    )
    parser.add_argument("--fold", type=int, help="score its validation cases; all cases without")
    parser.add_argument(
        "--folds", type=int, help="number of random folds if there is no split (default: 5)"
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="score these cases of the published split"
    )
    parser.add_argument("--layout", type=Path, help="YAML file that describes the folder")
    parser.add_argument("--subjects", type=Path, help="JSON file, case -> subject")
    parser.add_argument(
        "--tolerance-mm", type=float, default=TOLERANCE_MM, help="tolerance of surface Dice"
    )
    parser.add_argument(
        "--grid-tolerance",
        type=float,
        default=GRID_TOLERANCE,
        help="between volumes on one grid, as a share of a voxel",
    )
    parser.add_argument(
        "--baseline", type=Path, help="scores.csv of the same cases to compare with"
    )
    parser.add_argument("--out", type=Path, help="default: evaluation/ beside the source")
    parser.add_argument("--force", action="store_true", help="replace an earlier result in --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_workers(parser, meaning="processes that predict and score; -1: all cores")
    args = parser.parse_args()
    unused = [
        f"--{name.replace('_', '-')}"
        for name, value in vars(args).items()
        if name not in ("source", "data", "baseline") and value != parser.get_default(name)
    ]

    def body() -> None:
        if args.data is None and unused:
            raise ValueError(
                f"{' '.join(unused)} without a data set, where the page of {args.source} is only "
                "written again; name the data set, or leave them out"
            )
        print(remake(Path(args.source), args.baseline) if args.data is None else evaluate(args))

    if code := console.run_program(body, "evaluate"):
        sys.exit(code)


def remake(run: Path, baseline: Path | None) -> Path:
    """The page of a run or result again, from the files that it left."""
    results = run / "results" if (run / "results").is_dir() else run
    return write_report(results, Run(results.parent).records(), baseline=baseline)


def evaluate(args: argparse.Namespace) -> Path:
    """Scores the cases and returns the page."""
    for name in ("tolerance_mm", "grid_tolerance"):
        if not 0 <= (value := getattr(args, name)) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}; give a number of 0 or more")
    if args.baseline is not None:
        read_scores(args.baseline)  # before minutes of work
    dataset = open_dataset(args.data, args.layout, args.subjects)
    dataset = replace(dataset, grid_tolerance=args.grid_tolerance)
    ids, split = chosen_cases(args, dataset)
    source = Path(args.source)
    if source.is_dir():
        predict, origin = from_folder(source, ids, dataset)
        default = source.parent / f"{source.name}_evaluation"
    else:
        predict, origin = from_model(args.source, args.device, dataset, ids)
        default = source.parent / "evaluation" if source.is_file() else Path("evaluation")
    out = args.out or default
    outputs = [inside(out / "predictions", name, ".nii.gz") for name in ids]
    inputs = source.iterdir() if source.is_dir() else ()
    require_free((out / "scores.csv", *outputs), [*inputs], force=args.force)
    failed: dict[str, str] = {}
    backend = "loky" if args.backend is None and args.jobs != 1 else args.backend
    with locked(out), workers(backend, args.jobs):
        scores = score_cases(
            predict,
            dataset,
            ids,
            folder=out.resolve() / "predictions",
            failed=failed,
            tolerance_mm=args.tolerance_mm,
        )
        if not scores:
            raise ValueError(f"none of {len(ids)} cases has a score: {min(failed.items())}")
        records = Run(source.parent).records() if source.is_file() else []
        trained: dict[str, Any] = next((line for line in reversed(records) if "loss" in line), {})
        about = About(
            title=f"{source.name} on {dataset.name}, {split.partition(' of ')[0]}",
            command="python recipes/evaluate.py " + shlex.join(sys.argv[1:]),
            dataset={"name": dataset.name, "note": dataset.note, **dataset.about},
            split=split,
            tolerance_mm=args.tolerance_mm,
            provenance=provenance(HERE),
            failed=failed,
            steps=trained.get("step"),
            seconds=trained.get("seconds"),
            cpu_seconds=trained.get("cpu_seconds"),
            **origin,
        )
        summary = write_results(out, scores, dataset, about, records)
    for name, dice in summary["dice"].items():
        print(f"Dice {name}: {dice}")
    print(f"mean Dice {summary['mean_dice']} over {summary['cases']} cases")
    page = write_report(out, baseline=args.baseline) if args.baseline else out / "report.html"
    if failed:
        listed = "".join(f"\n  {case}: {why}" for case, why in failed.items())
        raise ValueError(f"{page} lacks {len(failed)} of {len(ids)} cases:{listed}")
    return page


def chosen_cases(args: argparse.Namespace, dataset: Dataset) -> tuple[list[str], str]:
    """The cases that the command line asks for, and what they are.

    Raises:
        ValueError: If there are none, or what was given excludes one another.
    """
    if args.folds is not None and args.fold is None:
        raise ValueError("--folds without --fold scores all cases; say which fold")
    if args.split is not None:
        ids = [case.id for case in dataset.cases if case.split == args.split]
        if args.fold is not None or not ids:
            raise ValueError(
                f"--split {args.split} has {len(ids)} cases in {dataset.folder}; give a split that "
                "came with the data, and no --fold beside it"
            )
        return ids, f"{args.split} of the split that came with the data"
    if args.fold is not None:
        fold = read_fold(dataset, args.fold, folds=5 if args.folds is None else args.folds)
        return list(fold.val), f"fold {args.fold} of {fold.rule}"
    return [case.id for case in dataset.cases], "all cases"


def from_folder(folder: Path, ids: list[str], dataset: Dataset) -> tuple[Predict, dict[str, Any]]:
    """Predictions of a folder, CASE.nii.gz or CASE.nii, and their description for the report.

    Raises:
        FileNotFoundError: If cases have none; names them.
    """
    paths = {name: folder.resolve() / f"{name}.nii.gz" for name in ids}
    for name, path in paths.items():
        if not path.is_file() and path.with_suffix("").is_file():
            paths[name] = path.with_suffix("")  # .nii
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {missing[0]}.nii.gz, and {len(missing)} of {len(ids)} cases are "
            "missing; predict them, or pass --fold to score its cases only"
        )

    def predict(case: Case) -> Volume:
        volume = Volume.load(paths[case.id])
        if problems := label_problems(paths[case.id], volume, dataset.labels):
            raise ValueError(problems[0])
        return replace(volume, array=volume.array.astype(np.int16))

    return predict, {"model": f"predictions in {folder}"}


def from_model(
    source: str, device: str, dataset: Dataset, ids: list[str]
) -> tuple[Predict, dict[str, Any]]:
    """Predictions of a fine-tuned model, and what its card says.

    Raises:
        ValueError: If its classes are not those of the data set, in the same order.
    """
    segmenter = Segmenter.from_pretrained(source)
    card = segmenter.card
    if dict(card.labels) != dict(dataset.labels):
        raise ValueError(
            f"the model has labels {card.labels}, {dataset.name} has {dict(dataset.labels)}; give "
            "data with the same classes"
        )
    on_device(segmenter.model, device)
    start = card.training.get("start", {})
    own = {*card.training.get("cases", ())} & {*ids}
    is_same = card.training.get("dataset", {}).get("name") == dataset.name
    data_overlap = pretraining_statement(card, dataset.name)
    if own and is_same:
        data_overlap = (
            f"{len(own)} of these {len(ids)} cases are from the model's own training set: their "
            f"scores say nothing about unseen data. {data_overlap}"
        )
    origin = {
        "model": f"{card.network} of {source}",
        "weights": start.get("weights", ""),
        "data_overlap": data_overlap,
        "parameters": start.get("parameters", {}),
        "citations": start.get("citations", ()),
        "config": card.training.get("config", {}),
    }
    return partial(_predicted, ByFiles(segmenter)), origin


def _predicted(model: ByFiles, case: Case) -> Volume:
    return model.segmenter.predict(load_image(case))


def pretraining_statement(card: Card, dataset_name: str) -> str:
    """Whether a data set was in the pretraining data of the weights that a model started from."""
    config = card.training.get("config", {})
    default = DEFAULT_WEIGHTS.get(card.encoder.get("variant", ""), "the first weights")
    name = config.get("weights") or default
    record = WEIGHTS.get(name) or Weights(name=name)
    is_random = not card.encoder or config.get("scratch") or not config.get("pretrained", True)
    return str(seen_in_pretraining(None if is_random else record, dataset_name))


if __name__ == "__main__":
    main()
