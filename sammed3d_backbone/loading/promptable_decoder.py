"""Encoder and mask decoder of a network with class prompts, out of one file.

The file is one of promptable weights, or a fine-tuned network of the same kind. Without a mask
decoder in it, the encoder alone is filled. The prompts belong to the classes, so they are made new,
near those of the file.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sammed3d_backbone.loading.checkpoint import OTHER_PARTS
from sammed3d_backbone.loading.factory import sam_of
from sammed3d_backbone.loading.fitting import LoadReport
from sammed3d_backbone.loading.networks import fill_decoder, filled_encoder
from sammed3d_backbone.loading.opening import CARD_KEY, OpenedWeights, open_weights, variant_in

OF_CLASSES = ("prompts", "bias")
KERNEL = "high_resolution.stem.0.weight"  # reads the volume
FREQUENCIES = "pe_layer.positional_encoding_gaussian_matrix"


def fill_class_prompts(network: nn.Module, weights: str | os.PathLike[str]) -> LoadReport:
    """Fills a `ClassPrompts`; the report is that of the whole network.

    An encoder that was loaded from the same weights already stays as it is. The convolution of the
    mask decoder that reads the volume follows the encoder's rule for input channels.

    Args:
        network: A `ClassPrompts`.
        weights: As for `encoder`.

    Raises:
        ValueError: If the network's encoder is not one of this package.
        CheckpointError: If the file does not fit the network.
    """
    opened = open_weights(weights)
    own = filled_encoder(network, opened, weights)
    stored, prompt = _of_model(opened) or _of_promptable(opened) or ({}, None)
    report = fill_decoder(
        network,
        own,
        opened,
        stored,
        kind="mask decoder",
        kernels=(KERNEL,),
        fresh=OF_CLASSES,
        used=("prompt_encoder.",),
    )
    if prompt is not None:
        with torch.no_grad():
            network.get_parameter("prompts").add_(prompt)
    return report


def _of_model(opened: OpenedWeights) -> tuple[Mapping[str, Tensor], Tensor] | None:
    """The tensors of a fine-tuned network and its mean prompt; None for other files."""
    if json.loads(opened.metadata.get(CARD_KEY, "{}")).get("network") != "class_prompts":
        return None
    return opened.tensors, opened.tensors["prompts"].float().mean(0)


def _of_promptable(opened: OpenedWeights) -> tuple[Mapping[str, Tensor], Tensor] | None:
    """The tensors of promptable weights by the names of `ClassPrompts`, and a click's embedding.

    None for files without prompt encoder and mask decoder.
    """
    if not any(name.startswith(OTHER_PARTS) for name in opened.tensors):
        return None
    promptable = sam_of(opened, variant_in(opened))
    code: Any = promptable.prompt_encoder
    tensors = dict(promptable.mask_decoder.state_dict(prefix="mask_decoder."))
    tensors["position_code.positional_encoding_gaussian_matrix"] = code.get_buffer(FREQUENCIES)
    with torch.no_grad():
        # As clicks without an earlier mask: a mask of zeros, which embeds alike everywhere.
        dense = code(masks=torch.zeros(1, 1, *code.mask_size))[1]
        tensors["dense_prompt"] = dense[:, :, :1, :1, :1]
        click = torch.cat([code.point_embeddings[1].weight, code.not_a_point_embed.weight])
    return tensors, click
