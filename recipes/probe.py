"""Probe frozen encoders block by block: random, trained from scratch and pretrained ones.

    python recipes/probe.py recipes/configs/probe/hippocampus.yaml
    python recipes/probe.py recipes/configs/probe/hippocampus.yaml weights=FILE

Simple classifiers (evaluation/probes.py) learn from voxels of the subjects whose labels a run of
finetune_unetr.py was trained on, and classify voxels of its validation subjects; the run's own
encoder is the one trained from scratch. So no encoder has seen a label that its probe does not
have, nor a validation subject. `placed` is the random one with sines and cosines as position table:
it shows what position alone gives. Encoders that have scores already are skipped, unless their
weights have changed. OUT gets runs.csv (a row per encoder), blocks.csv (intervals), scores.csv (a
row per subject), table.md and figure.png after each.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import MaxNLocator
from nibabel.affines import apply_affine
from sammed3d_backbone.recipes import finetune_unetr
from sammed3d_backbone.recipes.studies import tables

from sammed3d_backbone import config, console, encoder
from sammed3d_backbone.adapters.contract import Encoder
from sammed3d_backbone.data.datasets import Case, Dataset
from sammed3d_backbone.data.preparation import annotated_classes, load_image, load_label
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.evaluation.probes import PROBES, Voxels, probe
from sammed3d_backbone.evaluation.statistics import Interval, bootstrap_interval
from sammed3d_backbone.evaluation.voxel_features import draw_voxels, sampled
from sammed3d_backbone.files import write_text
from sammed3d_backbone.inference.features import token_maps
from sammed3d_backbone.loading.exposure import seen_in_pretraining
from sammed3d_backbone.loading.registry import Weights
from sammed3d_backbone.pretraining.init import init_sincos_pos_embed
from sammed3d_backbone.provenance import cores, provenance, strip_directory
from sammed3d_backbone.training.finetuning import make_card
from sammed3d_backbone.training.runs import runs_folder

HERE = Path(__file__).parent
BASELINE = "random"
# One of Okabe and Ito's colours for each encoder, in the order of the legend.
COLOURS = {BASELINE: "#999999", "placed": "#009E73", "scratch": "#E69F00", "pretrained": "#0072B2"}


@dataclass(frozen=True)
class Config:
    """The knobs."""

    run: str  # name of a run of finetune_unetr.py with scratch=true, below SAMMED3D_RUNS
    weights: str | None = None  # file or name of the pretrained encoder; None: without it
    per_class: int = 100  # voxels of every class and case
    out: str = "studies/results/probe"  # folder of the results, relative to recipes/
    threads: int = 0  # threads of the encoder; 0: all cores. OMP_NUM_THREADS sets those of probes
    seed: int = 0  # seed of the random encoder and of the drawn voxels


def main(cfg: Config) -> None:
    """Probes the encoders that have no scores yet, then writes table and figure.

    Raises:
        FileNotFoundError: If the run is not there or has not ended.
        ValueError: If the run did not start from random initialisation.
    """
    torch.set_num_threads(cfg.threads or cores())
    model = runs_folder() / cfg.run / "last.safetensors"
    if not model.is_file():
        raise FileNotFoundError(f"no trained model at {model}; let the run end, or pass run=NAME")
    trained = config.load(finetune_unetr.Config, model.with_name("config.yaml"))
    if not trained.scratch:
        raise ValueError(f"run {cfg.run} started from trained weights; pass one with scratch=true")
    dataset, fold = finetune_unetr.choose_cases(trained)
    card = make_card(trained, dataset)
    torch.manual_seed(cfg.seed)
    # All before the first is probed, so that a wrong file costs no work.
    networks = {BASELINE: encoder(pretrained=False, **card.encoder).eval()}
    networks["placed"] = copy.deepcopy(networks[BASELINE])
    init_sincos_pos_embed(networks["placed"])
    for name, weights in {"scratch": model, "pretrained": cfg.weights}.items():
        if weights is not None:
            networks[name] = encoder(weights=weights, **card.encoder).eval()
    cases = {case.id: case for case in dataset.cases}
    sides = {
        side: [cases[name] for name in ids]
        for side, ids in (("bank", fold.train), ("asked", fold.val))
    }
    out = HERE / cfg.out
    classes = [card.labels[0], *dataset.classes]
    voxels = {
        "trained_run": cfg.run,
        "dataset": dataset.name,
        "classes": len(classes),
        **{side: len({case.subject for case in of}) for side, of in sides.items()},
        "per_class": cfg.per_class,
        "seed": cfg.seed,
    }
    for name, network in networks.items():
        record = network.pretrained_cfg
        sha256 = "none" if record is None else str(record.sha256)
        known = tables.digest({**voxels, "sha256": sha256})
        kept = tables.read(out, "runs").set_index("run")
        if name in kept.index and kept.loc[name, "config"] == known:
            continue
        started = time.process_time()
        bank, asked = (
            voxels_of(network, of, dataset, card.preprocessing, cfg, desc=f"{name}, {side}")
            for side, of in sides.items()
        )
        blocks, scores = scores_of(bank, asked, classes, desc=f"{name}, probes")
        row = {
            "run": name,
            "config": known,
            "sha256": sha256,
            "seen": data_overlap(record if name == "pretrained" else None, dataset.name),
            **voxels,
            "cpu_seconds": round(time.process_time() - started, 1),
            **tables.made(provenance(HERE)),
        }
        tables.add(out, row, blocks=blocks, scores=scores)
        write_report(out)
    write_report(out)


def data_overlap(record: Weights | None, dataset: str) -> str:
    """Whether weights were trained on the data set, without the folder of their file."""
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
    for case in console.progress_bar(cases, desc=desc, unit="case"):
        found = token_maps(network, load_image(case), preprocessing, blocks=blocks)
        label = load_label(case)
        annotated = annotated_classes(case, dataset).tolist()
        # Where an organ is not annotated, a voxel of background may be that organ.
        known = [v for v, is_known in enumerate(annotated) if is_known and (v or all(annotated))]
        drawn = draw_voxels(label.array, known, cfg.per_class, rng)
        places = torch.from_numpy(apply_affine(np.linalg.inv(found.affine) @ label.affine, drawn))
        for block in blocks:
            features[block].append(sampled(found.maps[f"block_{block}"], places).numpy())
        values.append(label.array[tuple(drawn.T)])
        subjects.append(np.repeat(case.subject, len(drawn)))
    sides = np.concatenate(values), np.concatenate(subjects)
    return {block: Voxels(np.concatenate(parts), *sides) for block, parts in features.items()}


def scores_of(
    bank: Mapping[int, Voxels], asked: Mapping[int, Voxels], classes: Sequence[str], desc: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Balanced accuracy of every block and probe, and the same of every subject."""
    blocks, scores = [], []
    for block in console.progress_bar(bank, desc=desc, unit="block"):
        for kind in PROBES:
            found = probe(kind, bank[block], asked[block], classes)
            key = {"block": block, "probe": kind}
            bounds = found.balanced_accuracy._asdict()
            blocks.append(key | {name: round(value, 5) for name, value in bounds.items()})
            scores += [
                key | {"subject": subject, "accuracy": round(value, 4)}
                for subject, value in found.by_subject.items()
            ]
    return pd.DataFrame(blocks), pd.DataFrame(scores)


def write_report(out: Path) -> None:
    """Writes table.md and figure.png from the CSV files, encoders in the order of the legend."""
    runs = tables.read(out, "runs").set_index("run")
    names = [name for name in COLOURS if name in runs.index]
    blocks = tables.read(out, "blocks")
    about = runs.iloc[0]
    intervals = {
        name: own.assign(shown=[tables.shown(Interval(*v)) for v in bounds_of(own).tolist()])
        for name, own in blocks.groupby("run")
    }
    scores = tables.read(out, "scores")
    baseline = scores[scores["run"] == BASELINE]
    gains = {
        name: gain_of(scores[scores["run"] == name], baseline) for name in names if name != BASELINE
    }
    text = (
        f"Balanced accuracy in %, with 95 % intervals over {about['asked']} subjects of "
        f"{about['dataset']}; bank: the voxels of {about['bank']} other subjects, "
        f"{about['per_class']} per class and case. Chance is {100 / about['classes']:.1f}.\n\n"
        + "".join(f"- {name}: {runs.loc[name, 'seen']}\n" for name in names)
        + "\n"
        + tables.markdown(wide([intervals[name].assign(run=name) for name in names]))
        + "\nGain over the random encoder after the same block, paired by subject, in points:\n\n"
        + (tables.markdown(wide([*gains.values()])) if gains else "")
    )
    write_text(out / "table.md", text)
    draw_figure(out / "figure.png", about, {name: intervals[name] for name in names})


def gain_of(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """The gain over the random encoder, per block and probe, paired by subject."""
    pairs = tables.paired(ours, theirs, ["block", "probe", "subject"], ["accuracy"])
    lines = []
    for (name, block, kind), own in pairs.groupby(["run", "block", "probe"], sort=False):
        gain = tables.shown(bootstrap_interval(own["accuracy"].to_list()), 1, "+")
        lines.append({"run": name, "block": block, "probe": kind, "shown": gain})
    return pd.DataFrame(lines)


def wide(rows: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """A line per encoder and block, a column per probe."""
    table = pd.concat(rows).rename(columns={"run": "encoder"})
    table["encoder"] = pd.Categorical(table["encoder"], [*COLOURS])
    table = table.pivot_table(
        index=["encoder", "block"], columns="probe", values="shown", aggfunc="first", observed=True
    )
    return table.reset_index().astype(str)


def bounds_of(blocks: pd.DataFrame) -> np.ndarray:
    """Mean, low and high of every row."""
    return blocks[["mean", "low", "high"]].to_numpy(dtype=float)


def draw_figure(path: Path, about: pd.Series, intervals: Mapping[str, pd.DataFrame]) -> None:
    """Writes a PNG: balanced accuracy along the blocks, a panel per probe, a line per encoder."""
    figure = tables.new_figure(4 * len(PROBES), 4)
    figure.suptitle(
        f"{about['dataset']}: {about['bank']} labelled subjects in the bank, "
        f"{about['asked']} others to classify",
        fontsize=11,
    )
    panels = figure.subplots(1, len(PROBES), sharey=True)
    for axes, kind in zip(panels, PROBES, strict=True):
        for name, blocks in intervals.items():
            own = blocks[blocks["probe"] == kind]
            mean, low, high = 100 * bounds_of(own).T
            axes.plot(own["block"], mean, "o-", color=COLOURS[name], markersize=3, label=name)
            axes.fill_between(own["block"], low, high, color=COLOURS[name], alpha=0.2, linewidth=0)
        axes.axhline(100 / about["classes"], color="black", ls=":", linewidth=1, label="chance")
        axes.set(title=kind, xlabel="after block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("balanced accuracy (%), 95 % interval")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    cfg, _ = config.parse(Config, description=__doc__)
    sys.exit(console.run_program(lambda: main(cfg), "probe"))
