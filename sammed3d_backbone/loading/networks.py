"""A network of encoder and decoder filled from one file, all but what belongs to the classes."""

import dataclasses
import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from sammed3d_backbone.loading.checkpoint import OTHER_PARTS, CheckpointError, abbreviated
from sammed3d_backbone.loading.factory import encoder
from sammed3d_backbone.loading.fitting import Change, LoadReport, Shape, fit
from sammed3d_backbone.loading.opening import MODEL_ENCODER, OpenedWeights, variant_in
from sammed3d_backbone.models.image_encoder import ImageEncoder3D

logger = logging.getLogger(__name__)


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
        _fill_encoder(own, variant_in(opened), weights)
    return own


def fill_decoder(
    network: nn.Module,
    own: ImageEncoder3D,
    opened: OpenedWeights,
    stored: Mapping[str, Tensor],
    *,
    kind: str,
    kernels: tuple[str, ...],
    fresh: tuple[str, ...],
    used: tuple[str, ...] = (),
) -> LoadReport:
    """Fills a network beside `own`, its filled encoder; the report is that of the whole network.

    `stored` has the names of the network, and is empty if the file holds no `kind`. The `kernels`
    read the volume and follow the encoder's rule for input channels. Names that begin with one of
    `fresh` belong to the classes and stay as they are; `used` are the beginnings of names in the
    file that `stored` was computed from.
    """
    shapes = decoder_shapes(network, fresh)
    missing = tuple(name for name in network.state_dict() if name.startswith(fresh))
    if not stored:
        logger.warning("%s holds no %s: the encoder alone is pretrained", opened.record.name, kind)
        return _joined(network, own, LoadReport(missing=(*shapes, *missing)), ())
    state, report = fit(
        {name: tensor for name, tensor in stored.items() if name in shapes},
        shapes,
        channel_kernels=kernels,
        channel_gains=None if own.in_chans == 1 else own.channel_gains,
        source=str(opened.path),
    )
    network.load_state_dict(state, strict=False)  # `fit` has checked that these are all
    names = {name for name in opened.tensors if name in shapes or name.startswith(used)}
    return _joined(network, own, dataclasses.replace(report, missing=missing), names)


def decoder_shapes(network: nn.Module, fresh: tuple[str, ...]) -> dict[str, Shape]:
    """Shapes of the tensors beside the encoder whose names do not begin with one of `fresh`."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in network.state_dict().items()
        if not name.startswith((MODEL_ENCODER, *fresh))
    }


def _fill_encoder(own: ImageEncoder3D, variant: str, weights: str | os.PathLike[str]) -> None:
    """Loads weights into an encoder that exists; what it lacks was pruned by its network."""
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


def _joined(
    network: nn.Module, own: ImageEncoder3D, decoder: LoadReport, used: Collection[str]
) -> LoadReport:
    """The reports of encoder and decoder as one, by the network's names; the pruned is not used."""
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
