"""Random initialisation for training the promptable network by clicks.

With torch's default initialisation, the mask does not depend on the click for hundreds of training
steps, because the signal of the click fades on its way through the decoder. `init_weights`
preserves that signal, and `warm_up_decoder` trains the decoder to predict a ball around each click.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from torch import Tensor, nn

from sammed3d_backbone.models.image_encoder import ImageEncoder3D
from sammed3d_backbone.models.sam import Encoding, Sam3D
from sammed3d_backbone.models.two_way import PromptAttention
from sammed3d_backbone.training.optim import set_lr, warmup_cosine

# Chosen by how soon a decoder on random embeddings predicted a ball around a click.
GAIN = 1.7  # gain of the query and key projections
QUIET = 0.25  # scale of image embeddings relative to their position code
WARMUP = 20  # the learning rate rises during one part in this many of the steps


@torch.no_grad()
def init_sincos_pos_embed(encoder: ImageEncoder3D) -> None:
    """Fills the position table with sines and cosines."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)  # MONAI's call of it
        table = build_sincos_position_embedding(list(encoder.grid), encoder.embed_dim)
    encoder.pos_embed.copy_(table.view_as(encoder.pos_embed))


@torch.no_grad()
def init_weights(network: Sam3D) -> None:
    """Initialises all parts of the network.

    - The position table of the encoder holds sines and cosines; the released code starts from
      zeros, which carry no positions.
    - Linear layers and the stem get Xavier's uniform initialisation.
    - The contribution of high-resolution maps to a click starts at zero.
    - In the cross-attention of prompts and image, queries and keys start from one projection, the
      output projection as the transpose of the value projection, and image embeddings and click
      labels are small against the position codes: a click attends to its own position, and that
      position to the click. This helps with point_pos="aligned" only; "swapped" gives a click and
      its token different codes.
    """
    encoder, decoder = network.image_encoder, network.mask_decoder
    init_sincos_pos_embed(encoder)
    stem = encoder.patch_embed.proj
    for module in (stem, *network.modules()):
        if module is stem or isinstance(module, nn.Linear):
            weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
            nn.init.xavier_uniform_(weight.flatten(1))  # a view: the stem is linear in its patch
            nn.init.zeros_(bias)
    for module in decoder.modules():
        if isinstance(module, PromptAttention):
            nn.init.orthogonal_(module.q_proj.weight, gain=GAIN)
            module.k_proj.load_state_dict(module.q_proj.state_dict())
            nn.init.orthogonal_(module.v_proj.weight)
            module.out_proj.weight.copy_(module.v_proj.weight.T)
    neck = encoder.neck if isinstance(encoder.neck, nn.Sequential) else ()
    for norm in (*neck[-1:], *(layer.norm4 for layer in decoder.transformer.layers)):
        nn.init.constant_(norm.get_parameter("weight"), QUIET)
    if decoder.high_resolution is not None:
        nn.init.zeros_(decoder.high_resolution.to_point.get_parameter("weight"))
    for kind in network.prompt_encoder.point_embeddings:
        nn.init.normal_(kind.get_parameter("weight"), std=0.02)


def warm_up_decoder(network: Sam3D, steps: int, *, objects: int = 12, lr: float = 3e-3) -> float:
    """Trains prompt encoder and mask decoder to predict a ball around each click, without images.

    The targets are balls with a click at the centre; random numbers replace the image embedding.

    Args:
        network: A promptable network after `init_weights`.
        steps: Optimiser steps, 1 or more.
        objects: Number P of balls in a step.
        lr: Highest learning rate; it falls to 0 along a cosine.

    Returns:
        The soft Dice of the balls in the last step.
    """
    balls = _Balls(network)
    parts = nn.ModuleList([network.prompt_encoder, network.mask_decoder])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=lr)
    dice_loss = DiceLoss(sigmoid=True)
    soft_dice = 0.0
    for step in range(steps):
        points, truth = balls.draw(objects)
        encoding = balls.random_encoding()
        clicks = torch.ones(objects, 1, dtype=torch.long)
        logits = network.decode(encoding, (points.unsqueeze(1), clicks))
        weight = (1 / truth.mean() - 1) ** 0.7  # see `balance` of Interaction
        not_dice = dice_loss(logits, truth)
        wrong = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=weight)
        optimizer.zero_grad()
        (not_dice + wrong).backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        set_lr(optimizer, lr * warmup_cosine(step, steps, steps // WARMUP))
        optimizer.step()
        soft_dice = 1 - float(not_dice.detach())
    optimizer.zero_grad()
    return soft_dice


class _Balls:
    """Balls of a fifth of the crop's side in radius, on the grid of the decoder's masks."""

    def __init__(self, network: Sam3D) -> None:
        encoder = network.image_encoder
        self.sides = network.img_size
        self.radius = min(self.sides) / 5
        self.embedding_shape = (1, encoder.out_chans, *encoder.grid)
        self.maps = network.mask_decoder.high_resolution
        axes = [
            (torch.arange(4 * tokens) + 0.5) * side / (4 * tokens) - 0.5  # middles, in voxels
            for tokens, side in zip(encoder.grid, self.sides, strict=True)
        ]
        self.places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)

    def random_encoding(self) -> Encoding:
        """Random numbers in place of an encoded image."""
        embedding = QUIET * torch.randn(self.embedding_shape)
        if self.maps is None:
            return Encoding(embedding)
        with torch.no_grad():
            return Encoding(embedding, self.maps(torch.randn(1, 1, *self.sides), embedding))

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Centres in voxels, (P, 3), and masks on the decoder's grid, (P, 1, x, y, z)."""
        middles = torch.stack([torch.randint(side, (number,)) for side in self.sides], dim=-1)
        squares = (self.places - middles.view(-1, 1, 1, 1, 3)).square().sum(-1)
        return middles, (squares < self.radius**2).unsqueeze(1).float()
