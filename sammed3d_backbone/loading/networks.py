"""The encoder inside a network, filled from the file that also fills the network's decoder."""

import dataclasses
import os
from collections.abc import Collection
from typing import Any

from torch import nn

from sammed3d_backbone.loading.checkpoint import OTHER_PARTS, CheckpointError, abbreviated
from sammed3d_backbone.loading.factory import encoder
from sammed3d_backbone.loading.fitting import Change, LoadReport
from sammed3d_backbone.loading.opening import OpenedWeights, variant_for
from sammed3d_backbone.models.image_encoder import ImageEncoder3D


def filled_encoder(
    network: nn.Module, opened: OpenedWeights, weights: str | os.PathLike[str]
) -> ImageEncoder3D:
    """The encoder of a network, with the given weights.

    One that was loaded from the same weights already stays as it is, whatever was done to it since.

    Raises:
        ValueError: If the network's encoder is not one of this package.
        CheckpointError: If the file does not fit the encoder.
    """
    parts: Any = network
    own: Any = getattr(parts.encoder, "encoder", parts.encoder)  # a SharedEncoder holds one
    if not isinstance(own, ImageEncoder3D):
        raise ValueError(
            f"weights={weights}: the encoder is a {type(own).__name__}, and weights fill those of "
            "encoder(...); leave out weights="
        )
    record = own.pretrained_cfg
    if record is None or record.name != opened.record.name:
        _fill_encoder(own, weights)
    return own


def _fill_encoder(own: ImageEncoder3D, weights: str | os.PathLike[str]) -> None:
    """Loads weights into an encoder that exists; what it lacks was pruned by its network."""
    variant = variant_for(weights)
    filled = encoder(
        variant,
        weights=weights,
        in_chans=own.in_chans,
        img_size=own.img_size,
        patch_size=own.patch_size,
        rel_pos=own.rel_pos,
        channel_gains=own.channel_gains,
    )
    state, wanted = filled.state_dict(), own.state_dict()
    wrong = [
        name for name, t in wanted.items() if name not in state or state[name].shape != t.shape
    ]
    if wrong:
        raise CheckpointError(
            f"{weights} does not fit the encoder of the network in {abbreviated(wrong)}; build it "
            f"on encoder({variant!r}, weights=...)"
        )
    own.load_state_dict({name: state[name] for name in wanted})
    own.pretrained_cfg, own.load_report = filled.pretrained_cfg, filled.load_report


def joined_report(
    network: nn.Module, own: ImageEncoder3D, decoder: LoadReport, used: Collection[str] = ()
) -> LoadReport:
    """The report of a whole network, by its own names; what was pruned is not used.

    Args:
        network: The network.
        own: Its encoder, with the report of its own loading.
        decoder: The report of the other parts.
        used: Names of the file's tensors that they were filled from.
    """
    report: LoadReport = own.load_report
    prefix = "encoder." if network.get_submodule("encoder") is own else "encoder.encoder."
    parts = {_part(name) for name in own.state_dict()}

    def renamed(changes: tuple[Change, ...]) -> tuple[Change, ...]:
        return tuple(dataclasses.replace(c, name=f"{prefix}{c.name}") for c in changes)

    return dataclasses.replace(
        report,
        matched=(
            *(f"{prefix}{name}" for name in report.matched if _part(name) in parts),
            *decoder.matched,
        ),
        missing=(*(f"{prefix}{name}" for name in report.missing), *decoder.missing),
        unused=(
            *(f"{prefix}{name}" for name in report.matched if _part(name) not in parts),
            *(name for name in report.unused if name.startswith(OTHER_PARTS) and name not in used),
        ),
        reshaped=renamed(report.reshaped),
        adapted=(*renamed(report.adapted), *decoder.adapted),
    )


def _part(name: str) -> str:
    """The block or layer of the encoder that a tensor belongs to; trained parts may lie in it."""
    return ".".join(name.split(".")[:2])
