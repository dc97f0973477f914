"""Draw synthetic volumes with their labels, to see what pretraining is given.

    python recipes/studies/preview_synthetic.py OUT.png
    python recipes/studies/preview_synthetic.py OUT.png seed=100 side_vox=64 contrast=[0.4,1]

A row is a volume: three planes through it and the outlines of its structures. The first is that of
the given seed, the next of seed + 1, and so on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import yaml

from sammed3d_backbone import config, console
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.figures import Shown, cases_figure
from sammed3d_backbone.pretraining.synthetic import Synthesis, synthetic_sample


@dataclass(frozen=True)
class Config(Synthesis):
    """The settings of the volumes, and which to draw."""

    seed: int = 0  # seed of the first
    side_vox: int = 64
    volumes: int = 8


def main(out: Path, cfg: Config) -> None:
    """Writes the figure."""
    how = Synthesis(**{field.name: getattr(cfg, field.name) for field in fields(Synthesis)})
    shown = []
    for seed in range(cfg.seed, cfg.seed + cfg.volumes):
        image, labels = (
            Volume(part[0].numpy(), np.eye(4)) for part in synthetic_sample(seed, cfg.side_vox, how)
        )
        shown.append(Shown(f"seed {seed}: {labels.array.max()}", image, labels, labels))
    cases_figure(out, shown, (), lines=())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="fields of Synthesis or Config"
    )
    args = parser.parse_args()
    pairs = (pair.partition("=") for pair in args.settings)
    values = {key: yaml.safe_load(text) for key, _, text in pairs}
    sys.exit(
        console.run_program(
            lambda: main(args.out, config.build(Config, values)), "preview_synthetic"
        )
    )
