"""Train the decoder of a UNETR on a frozen, pretrained encoder, by dense labels of many sources.

    python recipes/pretrain_decoder.py recipes/configs/pretrain/decoder.yaml

Real label maps come as scanned, in a changed contrast, and rendered in random contrasts; synthetic
volumes have labels without classes, whose boundaries are learned. The same command resumes an
interrupted run. Everything is written to SAMMED3D_RUNS/<name>: `last.safetensors`, the weights file
with the decoder in it (`unetr(encoder(...), weights=FILE)`), and curve.png, renewed at every
validation.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, PositiveInt
from sammed3d_backbone.recipes.pretrain_promptable import (
    Pretraining,
    augmentation,
    begin,
    open_sources,
    train,
    trained_before,
)
from torch import Tensor, nn

from sammed3d_backbone import config, console, encoder, unetr
from sammed3d_backbone.adapters.unetr import UNETR
from sammed3d_backbone.evaluation.metrics import dice_per_class
from sammed3d_backbone.loading import checkpoint
from sammed3d_backbone.loading.checkpoint import read, write
from sammed3d_backbone.loading.hub import locate
from sammed3d_backbone.loading.opening import variant_for
from sammed3d_backbone.loading.registry import (
    PretrainingSet,
    UnetrDecoder,
    from_metadata,
    to_metadata,
)
from sammed3d_backbone.loading.unetr_decoder import LAST
from sammed3d_backbone.pretraining.decoder_loss import AXES, decoder_loss
from sammed3d_backbone.pretraining.object_crops import Curriculum, ObjectStream
from sammed3d_backbone.provenance import library_versions, settings_of_card
from sammed3d_backbone.training import engine, optim
from sammed3d_backbone.training.freezing import set_frozen

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Config(Pretraining):
    """Arguments of the recipe."""

    weights: str = "tiny"  # whose encoder is frozen
    img_size: int | None = None  # side of the crops in voxels; None: the weights'
    feature_size: PositiveInt = 8  # channels of the decoder at full resolution
    rendered: Fraction = 0.0  # share of real crops that are rendered from their labels
    foreground_weight: Positive = 1.0  # weight of a labelled voxel in the cross-entropy
    boundary_weight: Positive = 1.0  # weight relative to the classes


def main(cfg: Config) -> dict[str, float]:
    """Trains or resumes; returns the scores of the last validation."""
    accelerator, schedule, run = begin(cfg)

    # The network, of which only the decoder is trained
    torch.manual_seed(cfg.seed)
    backbone = encoder(variant_for(cfg.weights), weights=cfg.weights, img_size=cfg.img_size)
    side_vox, classes = backbone.img_size[0], len(cfg.dense_classes)
    network = unetr(backbone, 1 + classes + AXES, feature_size=cfg.feature_size)
    set_frozen(network.encoder, True)
    network = network.to(memory_format=torch.channels_last_3d)  # convolutions are faster so
    optimizer = optim.layer_decayed(network, weight_decay=cfg.weight_decay)
    accelerator.print(optim.describe(network, optimizer, cfg.lr))
    means = engine.Means(accelerator)

    # Crops
    training, apart, seen = open_sources(cfg, trained_before(cfg.weights))
    per_step = cfg.batch * cfg.accumulate * accelerator.num_processes
    curriculum = Curriculum(cfg.smallest_vox, cfg.structures, 0)
    stream = ObjectStream(
        training,
        cfg.shares,
        side_vox,
        curriculum,
        objects=1,
        steps=1,
        samples=cfg.steps * per_step,
        seed=(cfg.seed, 0),
        augment=augmentation(cfg.flips),
        classes=classes,
        contrast_share=cfg.random_contrast,
        rendered_share=cfg.rendered,
    )
    scored = {
        name: ObjectStream(
            apart,
            [1.0] * len(apart),
            side_vox,
            curriculum,
            objects=1,
            steps=1,
            samples=cfg.val_crops,
            seed=(cfg.seed, 1),
            classes=classes,
            rendered_share=share,
        )
        for name, share in (("scanned", 0.0), ("rendered", 1.0))
    }

    def step(model: nn.Module, batch: engine.Batch) -> Tensor:
        loss, figures = decoder_loss(
            model(batch["image"]),
            batch,
            foreground_weight=cfg.foreground_weight,
            boundary_weight=cfg.boundary_weight,
        )
        means.note(figures)
        return loss

    return train(
        cfg,
        accelerator,
        schedule,
        run,
        network,
        optimizer,
        stream,
        step,
        means,
        lambda averaged: validate(accelerator, averaged, scored, cfg.dense_classes),
        lambda path, averaged, crops: save_weights(path, averaged, cfg, seen, crops),
    )


def validate(
    accelerator: Accelerator,
    network: nn.Module,
    scored: Mapping[str, ObjectStream],
    classes: tuple[str, ...],
) -> dict[str, float]:
    """Mean Dice of the annotated classes on held-out crops, as scanned and rendered."""
    network.eval()
    scores: dict[str, float] = {}
    for way, crops in scored.items():
        rows = []
        for number in range(len(crops)):
            crop = {key: value.to(accelerator.device) for key, value in crops[number].items()}
            known = torch.cat([crop["known"].new_ones(1), crop["known"]])
            with accelerator.autocast(), torch.no_grad():
                logits = network(crop["image"][None])[0, : len(known)]
            found = torch.where(known[logits.argmax(0)], logits.argmax(0), 0)
            rows.append(dice_per_class(found, crop["classes"], len(known), known))
        dice = np.array(rows)
        means = {
            name.partition("|")[0]: float(np.nanmean(column))
            for name, column in zip(classes, dice.T, strict=True)
            if not np.isnan(column).all()
        }
        scores[f"dice_{way}"] = float(np.mean([*means.values()])) if means else math.nan
        scores |= {f"dice_{way}_{name}": value for name, value in means.items()}
    return {"mean_dice": scores["dice_scanned"], **scores}


def save_weights(
    path: Path, network: UNETR, cfg: Config, seen: Mapping[str, list[str]], crops: int
) -> None:
    """Writes the weights that the encoder came from, with the decoder and a record of it."""
    listed, source = locate(cfg.weights)
    tensors, metadata = read(source)
    record = from_metadata(listed, metadata)
    sets = {entry.name: entry for entry in record.pretraining or ()}
    added = (PretrainingSet(name, (1,)) for name in seen if name not in sets)
    decoder = UnetrDecoder(
        cfg.feature_size, network.encoder.patch_size, network.out_indices, cfg.dense_classes
    )
    record = dataclasses.replace(
        record,
        name=cfg.name,
        filename=path.name,
        sha256=None,
        unetr=decoder,
        pretraining=(*sets.values(), *added),
        status=f"{record.status}, its decoder by recipes/pretrain_decoder.py on {crops} crops",
    )
    training = {
        "config": settings_of_card(dataclasses.asdict(cfg)),
        "cases": seen,
        "crops": crops,
        "versions": library_versions(),
    }
    own = {
        f"{checkpoint.UNETR}{name}": tensor.half()
        for name, tensor in network.state_dict().items()
        if not name.startswith(("encoder.", LAST))
    }
    kept = {
        name: tensor for name, tensor in tensors.items() if not name.startswith(checkpoint.UNETR)
    }
    entries = {key: metadata[key] for key in ("training",) if key in metadata}
    entries |= {"unetr_training": json.dumps(training), **to_metadata(record)}
    write(path, {**kept, **own}, entries, overwrite=True)


if __name__ == "__main__":
    cfg, _ = config.parse(Config, description=__doc__)
    sys.exit(console.run_program(lambda: main(cfg), "pretrain_decoder"))
