"""Random values that a transformer trains well from, put into a network that is to begin anew."""

from __future__ import annotations

import warnings

import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from torch import nn

from sammed3d_backbone.models.sam import Sam3D


@torch.no_grad()
def start_afresh(network: Sam3D) -> None:
    """Sines and cosines as position table, and Xavier's values in linear layers and the stem.

    The released code begins with a table of zeros, in which tokens do not know their place yet.

    Args:
        network: Promptable.
    """
    encoder = network.image_encoder
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)  # MONAI's call of it
        table = build_sincos_position_embedding(list(encoder.grid), encoder.embed_dim)
    encoder.pos_embed.copy_(table.view_as(encoder.pos_embed))
    stem = encoder.patch_embed.proj
    for module in (stem, *network.modules()):
        if module is stem or isinstance(module, nn.Linear):
            weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
            nn.init.xavier_uniform_(weight.flatten(1))  # a view: the stem is linear in its patch
            nn.init.zeros_(bias)
