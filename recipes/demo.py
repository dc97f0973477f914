"""The main job in one command: fine-tune a UNETR, score it, draw it. This is `make demo`.

It starts from the weights that install with the package. Beside it, on the other cores, runs the
same from random initialisation, so that the last lines can say what the weights brought; with
weights of your own choice there is no second run.

    python recipes/demo.py                          # an average brain that installs with nilearn
    python recipes/demo.py data=FOLDER              # your Decathlon, nnU-Net raw or BIDS folder
    python recipes/demo.py data=FOLDER layout=layouts/kits.yaml      # any other folder
    python recipes/demo.py data=FOLDER weights=turbo    # on the released encoder, from the Hub

Everything else is recipes/configs/demo.yaml; any of its keys can be given as key=value too.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sammed3d_backbone.recipes import finetune_unetr
from sammed3d_backbone.recipes.prepare_demo_data import write_demo_data

from sammed3d_backbone import config, console
from sammed3d_backbone.data.folders import open_dataset
from sammed3d_backbone.data.preparation import load_image, load_label
from sammed3d_backbone.evaluation.figures import Shown, cases_figure
from sammed3d_backbone.evaluation.report import write_report
from sammed3d_backbone.loading.opening import variant_for
from sammed3d_backbone.provenance import cores
from sammed3d_backbone.training.runs import Run, runs_folder

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


def configure(given: dict[str, str]) -> finetune_unetr.Config:
    """The demo's configuration with the given values; writes the demo's data if they are needed.

    Args:
        given: key -> value from the command line.
    """
    if "data" not in given:
        folder = runs_folder() / "demo_data"
        if not (folder / "dataset.json").is_file():
            print(f"writing the demo's data to {folder}")
            write_demo_data(folder)
        given = {"data": str(folder), **given}
    else:
        layout = CONFIG.parents[1] / given["layout"] if "layout" in given else None
        dataset = open_dataset(given["data"], layout)
        own = {
            "name": f"demo_{dataset.name}",
            "intensity": "null",  # as the weights expect, by the modality of the data
            "flip_axes": "[]",  # whether a mirror image keeps its labels is not known here
        }
        given = {**own, **given}
    if "weights" in given:
        name = given.get("name", "demo") + "_" + Path(given["weights"]).stem
        # A crop of 64 voxels keeps the large variant within a laptop's reach.
        fitting = {"variant": variant_for(given["weights"]), "crop_vox": "64"}
        given = {"intensity": "null", **fitting, **given, "name": name}
    return config.load(finetune_unetr.Config, CONFIG, [f"{k}={v}" for k, v in given.items()])


def draw_training_cases(cfg: finetune_unetr.Config) -> Path:
    """Draws up to two training cases with their labels; a wrong orientation is seen here first.

    Returns:
        The PNG file.
    """
    dataset, fold = finetune_unetr.choose_cases(cfg)
    shown = []
    for case in [case for case in dataset.cases if case.id in fold.train][:2]:
        label = load_label(case)
        shown.append(Shown(f"to learn from: {case.id}", load_image(case), label, label))
    path = runs_folder() / f"{cfg.name}_data.png"
    cases_figure(path, shown, dataset.classes, lines=("labels",))
    return path


def start_twin(cfg: finetune_unetr.Config) -> BaseProcess:
    """Starts the same training from random initialisation in a process of its own."""
    twin = replace(cfg, name=f"{cfg.name}_scratch", scratch=True, weights=None)
    log = runs_folder() / f"{twin.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"beside it, the same from random initialisation; its output goes to {log}")
    # Spawned, since threads of a forked torch may hang.
    process = get_context("spawn").Process(target=train_quietly, args=(twin, log))
    process.start()
    return process


def train_quietly(cfg: finetune_unetr.Config, log: Path) -> None:
    """Trains with everything that is printed in a file."""
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
        finetune_unetr.main(cfg)


def compare(cfg: finetune_unetr.Config, ours: float) -> str:
    """Adds the run from random initialisation to the page; returns the comparison in one line.

    Args:
        cfg: Configuration of the run from pretrained weights.
        ours: Its mean Dice.
    """
    run, twin = runs_folder() / cfg.name, runs_folder() / f"{cfg.name}_scratch"
    scores = twin / "results" / "scores.json"
    if not scores.is_file():
        raise ValueError(f"the second run failed; see {twin}.txt")
    theirs = json.loads(scores.read_text(encoding="utf-8"))["mean_dice"]
    page = write_report(
        run / "results", Run(run).records(), baseline=twin / "results" / "scores.csv"
    )
    return (
        f"mean Dice after {cfg.steps} steps: {ours:.3f} from the weights of {cfg.variant}, "
        f"{theirs:.3f} from random initialisation ({ours - theirs:+.3f}). Page with both: {page}"
    )


def explain(cfg: finetune_unetr.Config, summary: dict[str, Any]) -> str:
    """A text about what was shown and what to try next."""
    run = runs_folder() / cfg.name
    return f"""
What you saw: a UNETR learned {" and ".join(summary["dice"])} from the training cases in
{cfg.steps} steps, and labelled {summary["cases"]} held-out case(s): Dice is the overlap with the
reference, 1 is perfect. {run / "results/figure.png"} shows the slices side by side.
One short run on few cases says little about what pretraining brings; recipes/studies has figures.

What to try next:
  make demo DATA=FOLDER                        the same on your own images and labels
  sammed3d predict {run / "last.safetensors"} SCAN.nii.gz LABELS.nii.gz
  python recipes/finetune_unetr.py recipes/configs/own.yaml name=mine data=FOLDER --dry-run"""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    pairs = [pair.partition("=") for pair in parser.parse_args().overrides]
    if lost := [key for key, equals, _ in pairs if not equals]:
        parser.error(f"{lost[0]!r} is not of the form key=value")
    given = {key: value for key, _, value in pairs}
    sys.exit(console.run_program(lambda: run_demo(given), "demo"))


def run_demo(given: dict[str, str]) -> None:
    """Trains, beside a twin from random initialisation unless weights are given, and explains.

    Args:
        given: key -> value from the command line.
    """
    twin = None
    try:
        cfg = configure(given)
        if "weights" not in given and not cfg.scratch:
            cfg = replace(cfg, threads=cfg.threads or max(1, cores() // 2))
            twin = start_twin(cfg)
        print(f"the data: {draw_training_cases(cfg)}")
        summary = finetune_unetr.main(cfg)
        if twin is not None:
            twin.join()
            if summary["mean_dice"] is not None:
                print(compare(cfg, summary["mean_dice"]))
        print(explain(cfg, summary))
    finally:
        if twin is not None:
            twin.terminate()  # it has ended, unless something failed


if __name__ == "__main__":
    main()
