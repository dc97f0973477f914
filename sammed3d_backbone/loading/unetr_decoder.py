"""Encoder and decoder of a UNETR out of one file, all but the last convolution.

The file is a weights file with a decoder (`checkpoint.UNETR`) or a fine-tuned UNETR. Without a
decoder in it, the encoder alone is filled. The last convolution belongs to the classes of its
training and stays as it was initialised.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sammed3d_backbone.loading.checkpoint import UNETR, CheckpointError, abbreviated
from sammed3d_backbone.loading.fitting import LoadReport, part_of
from sammed3d_backbone.loading.networks import decoder_shapes, fill_decoder, filled_encoder
from sammed3d_backbone.loading.opening import CARD_KEY, MODEL_ENCODER, OpenedWeights, open_weights
from sammed3d_backbone.models.image_encoder import ImageEncoder3D

LAST = "out."  # the convolution of the classes
# The kernels that read the volume: of the block at full resolution and of its shortcut.
KERNELS = ("stem.layer.conv1.conv.weight", "stem.layer.conv3.conv.weight")


def fill_unetr(network: nn.Module, weights: str | os.PathLike[str]) -> LoadReport:
    """Fills encoder and decoder of a UNETR; the report is that of the whole network.

    An encoder that was loaded from the same weights already stays as it is, whatever was done to it
    since. The decoder's first convolutions follow the encoder's rule for input channels.

    Args:
        network: A `UNETR`.
        weights: As for `encoder`.

    Raises:
        ValueError: If the network's encoder is not one of this package.
        CheckpointError: If the file does not fit the network.
    """
    opened = open_weights(weights)
    own = filled_encoder(network, opened, weights)
    stored = _decoder_of(opened)
    if stored:
        _require_same_decoder(network, own, opened, stored)
    return fill_decoder(
        network, own, opened, stored, kind="decoder of a UNETR", kernels=KERNELS, fresh=(LAST,)
    )


def stored_feature_size(weights: str | os.PathLike[str]) -> int | None:
    """The `feature_size` of the decoder in a file; None if it holds none."""
    kernel = _decoder_of(open_weights(weights)).get(KERNELS[0])
    return None if kernel is None else kernel.shape[0]


def _decoder_of(opened: OpenedWeights) -> dict[str, Tensor]:
    """The decoder's tensors by the names that a UNETR gives them, without the last convolution."""
    if CARD_KEY in opened.metadata:
        if json.loads(opened.metadata[CARD_KEY]).get("network") != "unetr":
            return {}
        mine = {k: v for k, v in opened.tensors.items() if not k.startswith(MODEL_ENCODER)}
    else:
        mine = part_of(opened.tensors, UNETR)
    return {name: tensor for name, tensor in mine.items() if not name.startswith(LAST)}


def _require_same_decoder(
    network: nn.Module,
    own: ImageEncoder3D,
    opened: OpenedWeights,
    stored: Mapping[str, Tensor],
) -> None:
    """Refuses another decoder than the stored one, and names the fitting argument."""
    source, shapes = opened.record.name, decoder_shapes(network, (LAST,))
    stages = len({name.split(".")[1] for name in stored if name.startswith("ups.")})
    found = {
        "feature_size": (shapes[KERNELS[0]][0], stored[KERNELS[0]].shape[0]),
        "patch_size": (own.patch_size, 2**stages),
    }
    if opened.record.unetr is not None:
        parts: Any = network
        found["out_indices"] = (parts.out_indices, tuple(opened.record.unetr.out_indices))
    for key, (mine, theirs) in found.items():
        if mine != theirs:
            raise CheckpointError(
                f"the UNETR decoder in {source} has {key}={theirs}, the network {mine}; give "
                f"{key}={theirs}, or load the encoder alone: transfer=encoder in a recipe, "
                "encoder(weights=...) and no weights= for unetr in code"
            )
    if shapes.keys() != stored.keys():
        differing = sorted(shapes.keys() ^ stored.keys())
        raise CheckpointError(
            f"the UNETR decoder in {source} was built with other options: {abbreviated(differing)} "
            "are in one of the two only; build the network with the defaults of unetr"
        )
