"""Put the weights of a finished pretraining into the package, with their curve and their sums.

    python recipes/publish_weights.py NAME RUN [RUN ...]

A RUN is a folder that pretrain_promptable.py has filled; several are the stages in their order, and
the last one's weights count. NAME.safetensors and SHA256SUMS go to weights/, configuration and log
of each stage and one curve to recipes/results/NAME. The record in `sammed3d_backbone/pretrained.py`
and the card weights/NAME.md are written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sammed3d_backbone.files import write_text
from sammed3d_backbone.pretrained import sha256_of
from sammed3d_backbone.training.runs import Run

HERE = Path(__file__).parent
WINDOW = 5  # lines of the log that make a point of the curve


def main(stages: Sequence[Path], name: str, weights: Path, results: Path) -> str:
    """Copies what belongs together; returns the hash of the file.

    Raises:
        FileNotFoundError: If a run is not finished.
    """
    for run in stages:
        if not (run / "last.safetensors").is_file():
            raise FileNotFoundError(
                f"{run} holds no last.safetensors; let the pretraining get there"
            )
    path = weights / f"{name}.safetensors"
    path.write_bytes((stages[-1] / "last.safetensors").read_bytes())
    files = sorted(weights.glob("*.safetensors"))
    write_text(weights / "SHA256SUMS", "".join(f"{sha256_of(f)}  {f.name}\n" for f in files))
    for number, run in enumerate(stages, start=1):
        folder = results / f"stage{number}"
        folder.mkdir(parents=True, exist_ok=True)
        for kept in ("config.yaml", "metrics.jsonl"):
            write_text(folder / kept, (run / kept).read_text(encoding="utf-8"))
    draw_curve(results / "curve.png", joined([Run(run).records() for run in stages]))
    return sha256_of(path)


def joined(logs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The logs of all stages as one, their steps counted on."""
    lines: list[dict[str, Any]] = []
    for log in logs:
        done = lines[-1]["step"] if lines else 0
        lines += [{**line, "step": done + line["step"]} for line in log]
    return lines


def draw_curve(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes a PNG: Dice of training steps and of the click protocol, and the error of patches."""
    steps = [line for line in records if "loss" in line]
    scores = [line for line in records if "mean_dice" in line]
    panels = ["Dice"] + ["error of hidden patches"] * ("patch_error" in steps[0])
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, label in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if label == "Dice":
            shown = {"dice_first": "training, first click", "dice_last": "training, last click"}
            for key in sorted(scores[0] if scores else ()):
                if key.startswith("dice_1_"):
                    set_apart = [line[key] for line in scores]
                    axes.plot(
                        [line["step"] for line in scores],
                        set_apart,
                        marker="o",
                        label=f"one click, {key.removeprefix('dice_1_')}, set apart",
                    )
        else:
            shown = {"patch_error": "training"}
        for key, whose in shown.items():
            if key in steps[0]:
                axes.plot(*_smoothed(steps, key), alpha=0.7, label=whose)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _smoothed(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and means over a few lines of the log each."""
    groups = [lines[i : i + WINDOW] for i in range(0, len(lines), WINDOW)]
    return (
        [group[-1]["step"] for group in groups],
        [sum(line[key] for line in group) / len(group) for group in groups],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("stages", type=Path, nargs="+", metavar="RUN")
    args = parser.parse_args()
    try:
        print(main(args.stages, args.name, HERE.parent / "weights", HERE / "results" / args.name))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
