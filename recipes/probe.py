"""What frozen encoders know, block by block: random, trained from scratch and pretrained ones.

    python recipes/probe.py recipes/configs/probe/hippocampus.yaml
    python recipes/probe.py recipes/configs/probe/hippocampus.yaml weights=FILE

Simple classifiers (evaluation/probes.py) learn from voxels of the subjects whose labels a run of
finetune_unetr.py was trained on, and name voxels of its validation subjects; the run's own encoder
is the one trained from scratch. So no encoder has seen a label that its probe does not have, nor
a subject that it is asked about. `placed` is the random one with sines and cosines as position
table: what place alone tells. Encoders whose scores are there are skipped, unless their weights
have changed; table.json, table.md and figure.png in OUT are written after each.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from nibabel.affines import apply_affine
from sammed3d_backbone.recipes import finetune_unetr
from tqdm import tqdm

from sammed3d_backbone import config, encoder
from sammed3d_backbone.adapters.contract import Encoder
from sammed3d_backbone.data.datasets import Case, Dataset
from sammed3d_backbone.data.preparation import annotated_classes, load_image, load_label
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.evaluation.probes import PROBES, Voxels, probe
from sammed3d_backbone.evaluation.statistics import Interval, bootstrap_interval
from sammed3d_backbone.evaluation.voxel_features import draw_voxels, features_at
from sammed3d_backbone.files import write_text
from sammed3d_backbone.loading.exposure import seen_in_pretraining
from sammed3d_backbone.loading.registry import Weights
from sammed3d_backbone.pretraining.init import give_places
from sammed3d_backbone.provenance import cores, provenance, strip_directory
from sammed3d_backbone.training.runs import runs_folder

HERE = Path(__file__).parent
BASELINE = "random"
# One of Okabe and Ito's colours for each encoder, in the order of the legend.
COLOURS = {BASELINE: "#999999", "placed": "#009E73", "scratch": "#E69F00", "pretrained": "#0072B2"}


@dataclass(frozen=True)
class Config:
    """The knobs."""

    run: str  # of finetune_unetr.py with scratch=true, below SAMMED3D_RUNS
    weights: str | None = None  # file or name of the pretrained encoder; None: without it
    per_class: int = 100  # voxels of every class and case
    out: str = "results/probe"  # seen from recipes/
    threads: int = 0  # of the encoder; 0: all cores. OMP_NUM_THREADS rules the probes
    seed: int = 0  # of the random encoder and of the voxels


def main(cfg: Config) -> None:
    """Probes the encoders that have no scores yet, then writes table and figure.

    Raises:
        FileNotFoundError: If the run is not there or has not ended.
        ValueError: If the run did not begin at random.
    """
    torch.set_num_threads(cfg.threads or cores())
    model = runs_folder() / cfg.run / "last.safetensors"
    if not model.is_file():
        raise FileNotFoundError(f"no trained model at {model}; let the run end, or pass run=NAME")
    trained = config.load(finetune_unetr.Config, model.with_name("config.yaml"))
    if not trained.scratch:
        raise ValueError(f"run {cfg.run} began at trained weights; pass one with scratch=true")
    dataset, fold = finetune_unetr.choose_cases(trained)
    card = finetune_unetr.make_card(trained, dataset)
    torch.manual_seed(cfg.seed)
    # All before the first is probed, so that a wrong file costs no work.
    networks = {BASELINE: encoder(pretrained=False, **card.encoder).eval()}
    networks["placed"] = copy.deepcopy(networks[BASELINE])
    give_places(networks["placed"])
    for name, weights in {"scratch": model, "pretrained": cfg.weights}.items():
        if weights is not None:
            networks[name] = encoder(weights=weights, **card.encoder).eval()
    cases = {case.id: case for case in dataset.cases}
    sides = {
        side: [cases[name] for name in ids]
        for side, ids in (("bank", fold.train), ("asked", fold.val))
    }
    about = {
        "run": cfg.run,
        "dataset": dataset.name,
        "classes": [card.labels[0], *dataset.classes],
        **{side: sorted({case.subject for case in of}) for side, of in sides.items()},
        "per_class": cfg.per_class,
        "seed": cfg.seed,
    }
    out = HERE / cfg.out
    table = opened_table(out / "table.json", about)
    for name, network in networks.items():
        record = network.pretrained_cfg
        sha256 = None if record is None else record.sha256
        kept = table["encoders"].get(name)
        if kept is not None and kept["sha256"] == sha256:
            continue
        started = time.process_time()
        bank, asked = (
            voxels_of(network, of, dataset, card.preprocessing, cfg, desc=f"{name}, {side}")
            for side, of in sides.items()
        )
        bar = tqdm(bank, desc=f"{name}, probes", unit="block")
        table["encoders"][name] = {
            "sha256": sha256,
            "contamination": contamination(record if name == "pretrained" else None, dataset.name),
            "blocks": [scores_of(bank[block], asked[block], about["classes"]) for block in bar],
            "cpu_seconds": round(time.process_time() - started, 1),
            **provenance(HERE),
        }
        # As the legend has them, whichever was probed first.
        table["encoders"] = {k: table["encoders"][k] for k in COLOURS if k in table["encoders"]}
        write_report(out, table)
    write_report(out, table)


def opened_table(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What was measured before on the same voxels, or an empty table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return table if table.get("about") == about else {"about": about, "encoders": {}}


def contamination(record: Weights | None, dataset: str) -> str:
    """Whether weights saw the data set before, without the place of their file."""
    if record is not None:
        record = replace(record, name=strip_directory(record.name))
    return str(seen_in_pretraining(record, dataset))


def voxels_of(
    network: Encoder,
    cases: Sequence[Case],
    dataset: Dataset,
    preprocessing: Preprocessing,
    cfg: Config,
    *,
    desc: str,
) -> dict[int, Voxels]:
    """Drawn voxels of all cases after each block; the same voxels whatever the encoder.

    They are drawn on the grids of the label files, where no padding passes for background.
    """
    rng = np.random.default_rng(cfg.seed)
    blocks = range(network.depth)
    features: dict[int, list[np.ndarray]] = {block: [] for block in blocks}
    values, subjects = [], []
    for case in tqdm(cases, desc=desc, unit="case"):
        image, geometry = preprocessing.image(load_image(case))
        label = load_label(case)
        annotated = annotated_classes(case, dataset).tolist()
        # Where an organ was not looked for, what is called background may be that organ.
        known = [v for v, is_known in enumerate(annotated) if is_known and (v or all(annotated))]
        drawn = draw_voxels(label.array, known, cfg.per_class, rng)
        places = apply_affine(np.linalg.inv(geometry.affine) @ label.affine, drawn)
        for block, found in features_at(network, image, places, blocks).items():
            features[block].append(found.numpy())
        values.append(label.array[tuple(drawn.T)])
        subjects.append(np.repeat(case.subject, len(drawn)))
    sides = np.concatenate(values), np.concatenate(subjects)
    return {block: Voxels(np.concatenate(parts), *sides) for block, parts in features.items()}


def scores_of(bank: Voxels, asked: Voxels, classes: Sequence[str]) -> dict[str, Any]:
    """Balanced accuracy and mean Dice of every probe, with their bounds, and of every subject."""
    found = {kind: probe(kind, bank, asked, classes) for kind in PROBES}
    return {
        kind: {
            "balanced_accuracy": rounded(scores.balanced_accuracy),
            "mean_dice": rounded(scores.mean_dice),
            "by_subject": {subject: round(v, 4) for subject, v in scores.by_subject.items()},
        }
        for kind, scores in found.items()
    }


def rounded(interval: Interval) -> list[float | None]:
    """For a file to be read."""
    return [None if math.isnan(value) else round(value, 5) for value in interval]


def write_report(out: Path, table: dict[str, Any]) -> None:
    """Writes the scores, the tables for people and the figure."""
    write_text(out / "table.json", json.dumps(table) + "\n")
    write_text(out / "table.md", as_markdown(table))
    draw_figure(out / "figure.png", table)


def as_markdown(table: dict[str, Any]) -> str:
    """Two tables with a line per encoder and block: accuracies, and gains over random."""
    about, encoders = table["about"], table["encoders"]
    accuracies = {
        name: [
            {kind: scores["balanced_accuracy"] for kind, scores in block.items()}
            for block in entry["blocks"]
        ]
        for name, entry in encoders.items()
    }
    lines = [
        f"Balanced accuracy in %, with 95 % intervals over {len(about['asked'])} subjects of "
        f"{about['dataset']};",
        f"bank: the voxels of {len(about['bank'])} other subjects, {about['per_class']} per class "
        f"and case. Chance is {chance(table):.1f}.",
        "",
        *(f"- {name}: {entry['contamination']}" for name, entry in encoders.items()),
        "",
        *_rows(accuracies, ""),
        "",
        "Gain over the random encoder after the same block, paired by subject, in points:",
        "",
        *_rows({name: gains(table, name) for name in encoders if name != BASELINE}, "+"),
    ]
    return "\n".join(lines) + "\n"


def gains(table: dict[str, Any], name: str) -> list[dict[str, list[float | None]]]:
    """What an encoder has over the random one, per block and probe, paired by subject."""
    ours, theirs = (table["encoders"][of]["blocks"] for of in (name, BASELINE))
    return [
        {kind: rounded(bootstrap_interval(paired(block[kind], other[kind]))) for kind in block}
        for block, other in zip(ours, theirs, strict=False)  # pruned ones have fewer blocks
    ]


def paired(ours: dict[str, Any], theirs: dict[str, Any]) -> list[float]:
    """Differences subject by subject."""
    return [value - theirs["by_subject"][s] for s, value in ours["by_subject"].items()]


def _rows(found: dict[str, list[dict[str, list[float | None]]]], sign: str) -> Iterator[str]:
    """A table of intervals."""
    yield f"| encoder | block | {' | '.join(PROBES)} |"
    yield f"|---|---|{'---|' * len(PROBES)}"
    for name, blocks in found.items():
        for number, block in enumerate(blocks):
            cells = (_shown(block[kind], sign) for kind in PROBES)
            yield f"| {name} | {number} | {' | '.join(cells)} |"


def chance(table: dict[str, Any]) -> float:
    """Balanced accuracy of a guess, in %."""
    return 100 / len(table["about"]["classes"])


def _shown(found: Sequence[float | None], sign: str) -> str:
    """Mean (low to high), as far as they are known."""
    mean, *bounds = (None if v is None else f"{100 * v:{sign}.1f}" for v in found)
    return str(mean) if None in bounds else f"{mean} ({' to '.join(map(str, bounds))})"


def draw_figure(path: Path, table: dict[str, Any]) -> None:
    """Writes a PNG: balanced accuracy along the blocks, a panel per probe, a line per encoder."""
    about = table["about"]
    figure = Figure(figsize=(4 * len(PROBES), 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{about['dataset']}: {len(about['bank'])} labelled subjects in the bank, "
        f"{len(about['asked'])} others asked about",
        fontsize=11,
    )
    panels = figure.subplots(1, len(PROBES), sharey=True)
    for axes, kind in zip(panels, PROBES, strict=True):
        for name, entry in table["encoders"].items():
            found = [scores[kind]["balanced_accuracy"] for scores in entry["blocks"]]
            mean, low, high = 100 * np.array(found, dtype=float).T
            blocks = range(len(mean))
            axes.plot(blocks, mean, color=COLOURS[name], marker="o", markersize=3, label=name)
            axes.fill_between(blocks, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)
        axes.axhline(chance(table), color="black", linestyle=":", linewidth=1, label="chance")
        axes.set_title(kind)
        axes.set_xlabel("after block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("balanced accuracy (%), 95 % interval")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    try:
        cfg, _ = config.parse(Config, description=__doc__)
        main(cfg)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
