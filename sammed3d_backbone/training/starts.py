"""Random values that a transformer trains well from, put into a network that is to begin anew."""

from __future__ import annotations

import warnings

import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from torch import nn

from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.models.two_way import PromptAttention


@torch.no_grad()
def start_afresh(network: Sam3D) -> None:
    """Sines and cosines as position table, Xavier's values in linear layers and the stem.

    The released code begins with a table of zeros, in which tokens do not know their place yet.
    Where prompts and image read each other, queries and keys begin with one projection, so that
    from the first step on a click attends to what carries its own position code. That helps with
    consistent positions only: released ones give a click and its place different codes.

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
    for name, module in network.mask_decoder.named_modules():
        if isinstance(module, PromptAttention) and not name.endswith("self_attn"):
            nn.init.orthogonal_(module.q_proj.weight)
            module.k_proj.load_state_dict(module.q_proj.state_dict())
