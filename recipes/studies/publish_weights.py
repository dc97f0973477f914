"""Put the weights of a finished pretraining into the package, with their curve and their sums.

    python recipes/studies/publish_weights.py NAME RUN [RUN ...]

A RUN is a folder that pretrain_promptable.py has filled; several are the stages in their order, and
the last one's weights count. NAME.safetensors and SHA256SUMS go to weights/, configuration and log
of each stage and one curve to results/NAME. The record in
`sammed3d_backbone/loading/registry.py` and the card weights/NAME.md are written by hand.
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
from sammed3d_backbone.loading.hub import sha256_of
from sammed3d_backbone.training.runs import Run

HERE = Path(__file__).parent
WINDOW = 10  # lines of the log that make a point of the curve
PANELS = {  # label -> keys of the log, and what they are
    "Dice": {
        "dice_first": "first click",
        "dice_last": "last click",
        "dice_1": "one click",
        "dice_5": "five clicks",
    },
    "error of hidden patches": {"patch_error": "1: each patch's mean"},
    "places whose nearest is of their object": {"nearest_same": "share"},
}


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
            text = (run / kept).read_text(encoding="utf-8")
            # The weights that a later stage began with, without the folder of this machine's runs.
            write_text(folder / kept, text.replace(f"{run.parent}/", ""))
    logs = [Run(run).records() for run in stages]
    draw_curve(results / "curve.png", *joined(logs))
    return sha256_of(path)


def joined(logs: Sequence[Sequence[dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[int]]:
    """The logs of all stages as one, their steps counted on, and where later stages begin."""
    lines: list[dict[str, Any]] = []
    begins = []
    for log in logs:
        done = lines[-1]["step"] if lines else 0
        begins.append(done)
        lines += [{**line, "step": done + line["step"]} for line in log]
    return lines, begins[1:]


def draw_curve(path: Path, records: Sequence[dict[str, Any]], begins: Sequence[int] = ()) -> None:
    """Writes a PNG: Dice of training steps and of the click protocol, and the other objectives.

    Args:
        path: Of the picture.
        records: Lines of the log.
        begins: Steps after which a later stage began.
    """
    panels = {
        label: keys for label, keys in PANELS.items() if any(k in r for r in records for k in keys)
    }
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, keys) in zip(all_axes, panels.items(), strict=True):
        for key, whose in keys.items():
            trained = [
                (line["step"], line[key]) for line in records if key in line and "loss" in line
            ]
            scored = [
                (line["step"], line[key]) for line in records if key in line and "loss" not in line
            ]
            if trained:
                axes.plot(*_smoothed(trained), alpha=0.7, label=f"training, {whose}")
            if scored:
                axes.plot(*zip(*scored, strict=True), marker="o", label=f"set apart, {whose}")
        for step in begins:
            axes.axvline(step, color="grey", linestyle=":")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _smoothed(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Last steps and means of a few points each."""
    groups = [points[i : i + WINDOW] for i in range(0, len(points), WINDOW)]
    return (
        [group[-1][0] for group in groups],
        [sum(value for _, value in group) / len(group) for group in groups],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("stages", type=Path, nargs="+", metavar="RUN")
    args = parser.parse_args()
    try:
        weights, results = HERE.parents[1] / "weights", HERE / "results" / args.name
        print(main(args.stages, args.name, weights, results))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
