"""A challenge config on synthetic files in its layout: model, batch, step, prediction.

The files hold noise, so nothing is learned; the check shows that the layout is read, and that
channels, classes, spacing and crop fit the network. The initialisation is random: no download.
"""

import csv
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from sammed3d_backbone.recipes.finetune_unetr import LAYER_DECAY, Config, choose_cases
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sammed3d_backbone import config
from sammed3d_backbone.data.crops import CropStream
from sammed3d_backbone.data.datasets import Dataset
from sammed3d_backbone.data.layouts import SPLITS, Layout, read_layout
from sammed3d_backbone.data.preparation import load_image, prepare_cases
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.segmenter import Segmenter, build_network
from sammed3d_backbone.training import optim
from sammed3d_backbone.training.finetuning import make_card
from sammed3d_backbone.training.losses import partial_dice_ce

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes"
CASES = 3
# How the ids of a challenge look, and what stands for the asterisks of its patterns.
LOOKS = {
    "amos": ("amos_{:04d}", ()),
    "amos_mr": ("amos_{:04d}", ()),
    "brats2021": ("BraTS2021_{:05d}", ()),
    "brats2023": ("BraTS-GLI-{:05d}-000", ()),
    "btcv": ("{:04d}", ()),
    "cas2023": ("{:03d}", ()),
    "kits": ("case_{:05d}", ()),
    "sega2023": ("R{}", ("Rider", "R (AAA)")),
    "totalsegmentator": ("s{:04d}", ()),
    "totalsegmentator_organs": ("s{:04d}", ()),
}
FIRST_ID = {"amos_mr": 507}


@dataclass(frozen=True)
class Task:
    """The description of a Decathlon task."""

    name: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]


DECATHLON = {
    "Task01_BrainTumour": Task(
        "BRATS",
        ("FLAIR", "T1w", "t1gd", "T2w"),
        ("edema", "non-enhancing tumor", "enhancing tumour"),
    ),
    "Task02_Heart": Task("LeftAtrium", ("MRI",), ("left atrium",)),
    "Task03_Liver": Task("LIVER", ("CT",), ("liver", "cancer")),
    "Task04_Hippocampus": Task("Hippocampus", ("MRI",), ("Anterior", "Posterior")),
    "Task05_Prostate": Task("PROSTATE", ("T2", "ADC"), ("PZ", "TZ")),
    "Task06_Lung": Task("Lung", ("CT",), ("cancer",)),
    "Task07_Pancreas": Task("Pancreas", ("CT",), ("pancreas", "cancer")),
    "Task08_HepaticVessel": Task("HepaticVessel", ("CT",), ("Vessel", "Tumour")),
    "Task09_Spleen": Task("Spleen", ("CT",), ("spleen",)),
    "Task10_Colon": Task("COLON", ("CT",), ("colon cancer primaries",)),
}


def challenge_configs() -> dict[str, Path]:
    """The configs of challenges: those with a layout or a Decathlon task, by name."""
    found = {}
    for path in sorted((RECIPES / "configs").glob("*.yaml")):
        cfg = config.load(Config, path)
        if cfg.layout is not None or cfg.data in DECATHLON:
            found[path.stem] = path
    return found


def write_files(folder: Path, cfg: Config) -> None:
    """Synthetic cases in the layout that the configuration names."""
    if cfg.layout is None:
        write_decathlon(folder, DECATHLON[cfg.data])
    else:
        write_layout(folder, RECIPES / cfg.layout)


def make_case(channels: int, classes: int, seed: int) -> tuple[Volume, np.ndarray]:
    """A small, turned, anisotropic image and blocks of every class.

    Shapes:
        returns: image (C, X, Y, Z), or (X, Y, Z) of one channel; labels (X, Y, Z).
    """
    rng = np.random.default_rng(seed)
    side = 4 * math.ceil((classes + 1) ** (1 / 3))
    blocks = np.arange((side // 4) ** 3).reshape([side // 4] * 3) % (classes + 1)
    labels = blocks.repeat(4, 0).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    image = rng.normal(100, 30, (channels, side, side, side)) + 20 * labels
    affine = np.array([[0, -2.0, 0, 20], [-2.5, 0, 0, 20], [0, 0, 3.0, -30], [0, 0, 0, 1]])
    return Volume((image if channels > 1 else image[0]).astype(np.float32), affine), labels


def write_layout(folder: Path, path: Path) -> None:
    """Cases of a layout; where a split is published, the last one validates."""
    layout = read_layout(path)
    look, stars = LOOKS[path.stem]
    splits = [*SPLITS[:1] * (CASES - 1), SPLITS[1]]
    names = [look.format(i + FIRST_ID.get(path.stem, 1)) for i in range(CASES)]
    parts = dict(zip(SPLITS, layout.splits or SPLITS, strict=True))
    for i, (name, split) in enumerate(zip(names, splits, strict=True)):
        image, labels = make_case(len(layout.channels), len(layout.classes), seed=i)
        place = {"case": name, "split": parts[split]}
        arrays = image.array if len(layout.images) > 1 else [image.array]
        for pattern, array in zip(layout.images, arrays, strict=True):
            Volume(array, image.affine).save(folder / _fill(pattern, place, stars))
        if "{class}" in layout.label:
            for number, one in enumerate(layout.classes, start=1):
                mask = Volume((labels == number).astype(np.uint8), image.affine)
                mask.save(folder / _fill(layout.label, {**place, "class": one}, stars))
        else:
            stored = np.array([0, *(layout.values or range(1, len(layout.classes) + 1))], np.uint8)
            label = Volume(stored[labels], image.affine)
            label.save(folder / _fill(layout.label, place, stars))
    if layout.split_table is not None:
        with (folder / layout.split_table).open("w", newline="") as file:
            table = csv.writer(file, delimiter=";")
            table.writerow(("image_id", "split"))
            table.writerows(zip(names, splits, strict=True))


def _fill(pattern: str, place: Mapping[str, Any], stars: tuple[str, ...]) -> str:
    """A pattern with its placeholders filled."""
    for star in stars:
        pattern = pattern.replace("*", star, 1)
    return pattern.format(**place)


def write_decathlon(folder: Path, task: Task) -> None:
    """Cases of a Decathlon task: all channels in one file, and a dataset.json."""
    stem = folder.name.partition("_")[2].lower() or "case"
    names = [f"{stem}_{i + 1:03d}.nii.gz" for i in range(2 * CASES)]
    for i, name in enumerate(names):
        image, labels = make_case(len(task.channels), len(task.classes), seed=i)
        image.save(folder / "imagesTr" / name)
        Volume(labels, image.affine).save(folder / "labelsTr" / name)
    description = {
        "name": task.name,
        "licence": "CC-BY-SA 4.0",
        "modality": dict(enumerate(task.channels)),
        "labels": dict(enumerate(("background", *task.classes))),
        "training": [
            {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names
        ],
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def check(path: Path, overrides: Mapping[str, Any]) -> Dataset:
    """Reads a config, builds its network, takes one step and predicts; returns the data set.

    Args:
        path: Path of the config.
        overrides: Other values of its knobs, such as a smaller network.

    Raises:
        ValueError: If anything does not fit.
    """
    cfg = config.load(Config, path, [f"{key}={value}" for key, value in overrides.items()])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / cfg.data
        write_files(folder, cfg)
        cfg = replace(cfg, data=str(folder), folds=CASES)
        dataset, fold = choose_cases(cfg)
        card = make_card(cfg, dataset)
        train = prepare_cases(dataset, fold.train, card.preprocessing, progress=False)
        network = build_network(card)
        crops = CropStream(train, card.preprocessing, samples=cfg.batch, seed=cfg.seed)
        (batch,) = DataLoader(crops, cfg.batch)
        accelerator = Accelerator(mixed_precision=cfg.mixed_precision, cpu=True)
        optimizer = optim.layer_decayed(network, layer_decay=LAYER_DECAY)
        optim.set_lr(optimizer, 1e-3)
        with accelerator.autocast():
            loss = loss_of(network, batch)
        loss.backward()
        optimizer.step()
        held_out = next(case for case in dataset.cases if case.id == fold.val[0])
        image = load_image(held_out)
        with accelerator.autocast():
            predicted = Segmenter(network, card).predict(image)
    if predicted.shape != image.shape or not np.array_equal(predicted.affine, image.affine):
        raise ValueError(f"{path.stem}: the prediction lies on another grid than its image")
    if not math.isfinite(loss.item()):
        raise ValueError(f"{path.stem}: the loss is {loss.item()}")
    return dataset


def loss_of(network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The recipe's loss of a batch."""
    return partial_dice_ce(network(batch["image"]).float(), batch["label"], batch["annotated"])


def layout_of(stem: str) -> Layout:
    """The layout of a challenge."""
    return read_layout(RECIPES / "layouts" / f"{stem}.yaml")
