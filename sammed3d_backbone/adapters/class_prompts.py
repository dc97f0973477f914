"""The promptable network's mask decoder with a learned prompt for every class.

Maps a volume (B, C, X, Y, Z) to class logits (B, K, X, Y, Z). In place of a click the mask decoder
reads a token that is trained for the class, so that all but these tokens may come from promptable
weights, the released ones included. Letters: F width of the neck's map, (x, y, z) image tokens.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sammed3d_backbone.adapters.contract import Encoder, require_encoder
from sammed3d_backbone.adapters.network import EncoderNetwork, require_classes
from sammed3d_backbone.loading.fitting import LoadReport
from sammed3d_backbone.loading.promptable_decoder import fill_class_prompts
from sammed3d_backbone.loading.variants import variant as variant_sizes
from sammed3d_backbone.models.high_resolution import HighResolution
from sammed3d_backbone.models.mask_decoder import MaskDecoder3D
from sammed3d_backbone.models.prompt_encoder import FourierCode, image_token_code

PROMPT_STD = 0.5  # of a prompt's random part; embeddings of clicks have a deviation of about 1


class ClassPrompts(EncoderNetwork):
    """An encoder and a mask decoder that is prompted with one learned token per class.

    Each class but the background gets logits from the mask decoder as an object with a click would,
    on a grid of four values per token and axis, interpolated to the voxels. The background's logit
    is zero. Time and memory of the decoder grow with the number of classes.

    Args:
        encoder: A module that fulfils `contract.Encoder`, with its neck.
        out_channels: Number of classes K, background included.
        variant: Name in `list_variants()` whose mask decoder is built.
        weights: Fill encoder and mask decoder from one file: promptable weights, or a fine-tuned
            network of this kind. The prompts start near the embedding of a click inside an object,
            or near the mean prompt of the fine-tuned classes. An encoder of these weights stays as
            it is. From a file without a mask decoder the encoder alone is filled. The attribute
            `load_report` says what happened to every tensor.

    Shapes:
        x: (B, C, X, Y, Z), sides equal to the encoder's `img_size`.
        returns: (B, K, X, Y, Z), logits.

    Raises:
        ValueError: If there are fewer than two classes, or the encoder lost its neck.
        CheckpointError: If the mask decoder in the file has other sizes.

    Source: prompts that are learned in place of clicks are from AutoSAM (Shaharabany et al., 2023),
        a prompt per class from SurgicalSAM (Yue et al., AAAI 2024); the form here is our own.
    """

    def __init__(
        self,
        encoder: Encoder,
        out_channels: int,
        *,
        variant: str = "tiny",
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        require_encoder(encoder)
        require_classes(out_channels, least=2)
        if isinstance(getattr(encoder, "neck", None), nn.Identity):
            raise ValueError(
                "the encoder has lost its neck in another network, and class_prompts reads the "
                "neck's map; build it with encoder(...) from weights of a promptable network"
            )
        super().__init__(encoder, [encoder.depth - 1], keep_neck=True)
        width, sizes = encoder.out_chans, variant_sizes(variant).decoder
        maps = HighResolution(encoder.in_chans, width, encoder.patch_size)
        self.mask_decoder = MaskDecoder3D(
            embed_dim=width,
            num_heads=sizes.num_heads,
            mlp_dim=sizes.mlp_dim,
            iou_head_hidden_dim=sizes.iou_head_hidden_dim,
            high_resolution=maps if sizes.high_resolution else None,
        )
        self.mask_decoder.keep_single_mask()
        self.position_code = FourierCode(width, sizes.point_pos)
        # The token of a class, and the one that ends every set of prompts.
        self.prompts = nn.Parameter(PROMPT_STD * torch.randn(out_channels - 1, 2, width))
        self.dense_prompt = nn.Parameter(torch.zeros(1, width, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels - 1))
        self.load_report: LoadReport | None = None
        if weights is not None:
            self.load_report = fill_class_prompts(self, weights)

    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay."""
        return super().no_weight_decay() | {"prompts", "dense_prompt"}

    def forward(self, x: Tensor) -> Tensor:
        embedding, _ = self.encoder.forward_intermediates(x, self.out_indices)
        masks = self._run(self._masks, x, embedding)
        logits = F.pad(masks, (0, 0, 0, 0, 0, 0, 1, 0))  # the background's logit is 0
        return F.interpolate(logits, size=x.shape[2:], mode="trilinear", align_corners=False)

    def _masks(self, volume: Tensor, embedding: Tensor) -> Tensor:
        """Logits (B, K - 1, 4 x, 4 y, 4 z) of the classes."""
        high_resolution: Any = self.mask_decoder.high_resolution
        maps = () if high_resolution is None else high_resolution(volume, embedding)
        classes = len(self.prompts)
        x, y, z = embedding.shape[2:]
        masks, _ = self.mask_decoder(
            embedding.unsqueeze(1).expand(-1, classes, -1, -1, -1, -1).flatten(0, 1),
            image_token_code(self.position_code, (x, y, z)),
            self.prompts.expand(volume.shape[0], -1, -1, -1).flatten(0, 1),
            self.dense_prompt.expand(1, -1, x, y, z),
            maps=maps,
        )
        by_class: Tensor = masks.view(volume.shape[0], classes, *masks.shape[2:])
        return by_class + self.bias.view(-1, 1, 1, 1)


class_prompts = ClassPrompts  # the public name, as in the registry
