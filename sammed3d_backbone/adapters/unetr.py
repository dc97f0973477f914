"""UNETR's decoder on any encoder of the contract.

Maps a volume (B, C, X, Y, Z) to class logits (B, K, X, Y, Z). The blocks are MONAI's;
this file only wires them. Preprocessing, sliding windows and losses happen elsewhere.

Source: Hatamizadeh et al., UNETR: Transformers for 3D Medical Image Segmentation, WACV 2022.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal

from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn

from sammed3d_backbone.adapters.contract import Encoder, require_encoder
from sammed3d_backbone.adapters.network import (
    EncoderNetwork,
    require_classes,
    require_feature_size,
    require_out_indices,
    spread_indices,
)
from sammed3d_backbone.loading.fitting import LoadReport
from sammed3d_backbone.loading.unetr_decoder import fill_unetr, stored_feature_size
from sammed3d_backbone.models.layers import LayerNorm3d


class UNETR(EncoderNetwork):
    """UNETR around an encoder, for `out_channels` classes.

    The encoder becomes part of the network and loses what the decoder does not read: the blocks
    behind the last index and the neck. With S = log2(patch size) stages,
    stage s of the decoder runs at stride 2**s with `feature_size` * 2**s channels: stage 0 reads
    the raw volume, the stages 1 to S - 1 a token map each, and the deepest map starts the way up.

    Args:
        encoder: A module that fulfils `contract.Encoder`, see `check_encoder`.
        out_channels: Number of classes K, background included.
        feature_size: Channels at full resolution; None is that of the decoder in `weights`, or 16.
        out_indices: Block numbers from 0, fine to coarse, one per halving from the volume to the
            tokens (four for patches of 16 voxels, three for 8). None spreads them evenly and ends
            at the last block: 2, 5, 8, 11 of 12, the paper's z3, z6, z9, z12 and the released
            network's global blocks. "monai" takes MONAI's, all but the last one block later.
        norm_maps: Give each map a layer norm of its own: these maps are raw residual streams, whose
            scale grows with depth. MONAI norms the last only.
        norm_name: Norm inside the decoder's blocks, in MONAI's words.
        conv_block: Convolutions after each upsampling of a token map, as in MONAI.
        res_block: Residual decoder blocks, as in MONAI.
        weights: Fill encoder and decoder, all but the last convolution, from one file: weights with
            a decoder, or a fine-tuned UNETR. An encoder of these weights stays as it is. From files
            without a decoder, such as the released ones, the encoder alone is filled. The attribute
            `load_report` says what happened to every tensor.

    Shapes:
        x: (B, C, X, Y, Z), sides equal to the encoder's `img_size`.
        returns: (B, K, X, Y, Z), logits.

    Raises:
        ValueError: If `out_indices` do not fit the encoder, or `out_channels` is not positive.
        CheckpointError: If the decoder in the file has another `feature_size` or patch size.
    """

    def __init__(
        self,
        encoder: Encoder,
        out_channels: int,
        *,
        feature_size: int | None = None,
        out_indices: Sequence[int] | Literal["monai"] | None = None,
        norm_maps: bool = True,
        norm_name: str | tuple[str, dict[str, Any]] = "instance",
        conv_block: bool = True,
        res_block: bool = True,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        require_encoder(encoder)
        require_classes(out_channels)
        if feature_size is None:
            feature_size = 16 if weights is None else stored_feature_size(weights) or 16
        require_feature_size(feature_size)
        stages = encoder.patch_size.bit_length() - 1
        even = spread_indices(encoder, stages)
        if out_indices is None:
            out_indices = even
        elif out_indices == "monai":
            out_indices = [*(index + 1 for index in even[:-1]), even[-1]]
        require_out_indices(encoder, out_indices, stages)
        super().__init__(encoder, out_indices)
        hidden_size = encoder.embed_dim
        widths = [feature_size * 2**stage for stage in range(stages)]
        self.tap_norms = nn.ModuleList(
            LayerNorm3d(hidden_size) if norm_maps else nn.Identity() for _ in out_indices
        )
        blocks: dict[str, Any] = {"kernel_size": 3, "norm_name": norm_name, "res_block": res_block}
        self.stem = UnetrBasicBlock(3, encoder.in_chans, widths[0], stride=1, **blocks)
        self.skips = nn.ModuleList(
            UnetrPrUpBlock(
                3,
                hidden_size,
                widths[stage],
                num_layer=stages - 1 - stage,
                stride=1,
                upsample_kernel_size=2,
                conv_block=conv_block,
                **blocks,
            )
            for stage in range(1, stages)
        )
        self.ups = nn.ModuleList(
            UnetrUpBlock(3, below, width, upsample_kernel_size=2, **blocks)
            for below, width in zip([*widths[1:], hidden_size], widths, strict=True)
        )
        self.out = UnetOutBlock(3, widths[0], out_channels)
        self.load_report: LoadReport | None = None
        if weights is not None:
            self.load_report = fill_unetr(self, weights)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.encoder.forward_intermediates(x, self.out_indices, intermediates_only=True)
        maps = [norm(tap) for norm, tap in zip(self.tap_norms, maps, strict=True)]
        levels = [self._run(self.stem, x)] + [
            self._run(skip, tap) for skip, tap in zip(self.skips, maps[:-1], strict=True)
        ]
        y = maps[-1]
        for up, level in zip(reversed(self.ups), reversed(levels), strict=True):
            y = self._run(up, y, level)
        logits: Tensor = self.out(y)
        return logits


unetr = UNETR  # the public name, as in the registry
