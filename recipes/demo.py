"""The main job in one command: fine-tune a UNETR, score it, draw it. This is `make demo`.

It starts from the weights that install with the package, does the same from random values, and says
what the weights brought; with weights of your own choice there is no second run.

    python recipes/demo.py                          # an average brain that installs with nilearn
    python recipes/demo.py data=FOLDER              # your Decathlon, nnU-Net raw or BIDS folder
    python recipes/demo.py data=FOLDER layout=layouts/kits.yaml      # any other folder
    python recipes/demo.py data=FOLDER weights=turbo    # on the released encoder, from the Hub

Everything else is recipes/configs/demo.yaml; any of its keys can be given as key=value too.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from sammed3d_backbone.recipes import finetune_unetr
from sammed3d_backbone.recipes.prepare_demo_data import write_demo_data

from sammed3d_backbone import config
from sammed3d_backbone.data.folders import find_dataset, read_dataset
from sammed3d_backbone.data.layouts import read_layout
from sammed3d_backbone.evaluation.report import write_report
from sammed3d_backbone.loading.checkpoint import read
from sammed3d_backbone.loading.factory import variant_of
from sammed3d_backbone.loading.registry import WEIGHTS
from sammed3d_backbone.training.runs import Run, runs_folder

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


def configure(given: dict[str, str]) -> finetune_unetr.Config:
    """The demo's configuration with what was asked for; writes the demo's data if they are needed.

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
        layout = read_layout(CONFIG.parents[1] / given["layout"]) if "layout" in given else None
        dataset = read_dataset(find_dataset(given["data"], layout), layout)
        is_ct = any(channel.upper() == "CT" for channel in dataset.channels)
        own = {
            "name": f"demo_{dataset.name}",
            "intensity": "ct" if is_ct else "zscore_positive",
            "flip_axes": "[]",  # what the labels mean is not known here
        }
        given = {**own, **given}
    if "weights" in given:
        name = given.get("name", "demo") + "_" + Path(given["weights"]).stem
        # a crop of 64 voxels keeps the large variant within a laptop's reach
        fitting = {"variant": variant_for(given["weights"]), "crop_vox": "64"}
        given = {"intensity": "zscore_positive", **fitting, **given, "name": name}
    return config.load(finetune_unetr.Config, CONFIG, [f"{k}={v}" for k, v in given.items()])


def variant_for(weights: str) -> str:
    """The variant that weights are of: by the table, by a local file's tensors, else vit_b."""
    record = WEIGHTS.get(weights)
    found = record.variant if record else None
    if Path(weights).is_file():
        found = variant_of(read(Path(weights))[0])
    return found or "vit_b"


def compare(cfg: finetune_unetr.Config, summary: dict[str, Any]) -> str:
    """Does the same from random values; puts the difference into the page and into one line.

    Args:
        cfg: Of a finished run from trained weights.
        summary: Its scores.
    """
    twin = replace(cfg, name=f"{cfg.name}_scratch", scratch=True, weights=None)
    ours, theirs = summary["mean_dice"], finetune_unetr.main(twin)["mean_dice"]
    run, other = (runs_folder() / each.name for each in (cfg, twin))
    page = write_report(
        run / "results", Run(run).records(), baseline=other / "results" / "scores.csv"
    )
    return (
        f"mean Dice after {cfg.steps} steps: {ours:.3f} from the weights of {cfg.variant}, "
        f"{theirs:.3f} from random values; the weights brought {ours - theirs:+.3f} here. One run "
        f"each: the README has the study. Page with both: {page}"
    )


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    pairs = [pair.partition("=") for pair in parser.parse_args().overrides]
    if lost := [key for key, equals, _ in pairs if not equals]:
        parser.error(f"{lost[0]!r} is not of the form key=value")
    given = {key: value for key, _, value in pairs}
    try:
        cfg = configure(given)
        summary = finetune_unetr.main(cfg)
        if "weights" not in given and not cfg.scratch and summary["mean_dice"] is not None:
            print(compare(cfg, summary))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
