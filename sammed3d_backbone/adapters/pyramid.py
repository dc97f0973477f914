"""Feature maps at strides 2, 4, 8 and 16 voxels from an encoder that has one token grid.

Maps a volume (B, C, X, Y, Z) to feature maps from fine to coarse, with declared strides and
channels, which is what convolutional decoders ask of an encoder. Letters: P patch size, W
`feature_size`; the map at stride s has W * s channels. No classes, no losses.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch.nn.functional as F
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock
from torch import Tensor, nn

from sammed3d_backbone.adapters.contract import Encoder, require_encoder
from sammed3d_backbone.adapters.network import (
    EncoderNetwork,
    require_feature_size,
    require_out_indices,
    spread_indices,
)
from sammed3d_backbone.models.layers import LayerNorm3d

Kind = Literal["simple", "multi_level", "conv_stem"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STRIDES = (2, 4, 8, 16)  # voxels


class PyramidNetwork(EncoderNetwork):
    """An encoder and its maps at strides 2, 4, 8 and 16, for networks that decode them.

    The encoder becomes part of the network and loses what is not read: the blocks behind the last
    index, and the neck.

    Args:
        encoder: A module that fulfils `contract.Encoder`, see `check_encoder`.
        kind: "simple" makes all maps from the last block's. "multi_level" makes each from a block
            of its own, the finest from the earliest. "conv_stem" is "simple" plus a convolution
            branch on the raw volume, added to every map finer than the tokens. The branch is
            initialised to zero, so training begins at "simple".
        feature_size: Channels W per voxel of stride.
        out_indices: Block numbers from 0, fine to coarse: four for "multi_level", one otherwise;
            None spreads them evenly and ends at the last block.
        full_resolution: Put a map at stride 1 before the others: convolutions on the raw volume.
        norm_name: Norm inside the convolution blocks, in MONAI's words.

    Attributes:
        strides: Voxels per cell of each map, fine to coarse.
        out_channels: Channels of each map.

    Raises:
        ValueError: If the kind is unknown, or `out_indices` do not fit kind and encoder.

    Source: "simple" follows Li et al., Exploring plain vision transformer backbones for object
        detection, ECCV 2022.
    """

    def __init__(
        self,
        encoder: Encoder,
        kind: Kind = "simple",
        *,
        feature_size: int = 16,
        out_indices: Sequence[int] | None = None,
        full_resolution: bool = False,
        norm_name: str | tuple[str, dict[str, Any]] = "instance",
    ) -> None:
        require_encoder(encoder)
        require_feature_size(feature_size)
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
        count = len(STRIDES) if kind == "multi_level" else 1
        out_indices = spread_indices(encoder, count) if out_indices is None else out_indices
        require_out_indices(encoder, out_indices, count)
        super().__init__(encoder, out_indices)
        self.strides = (1, *STRIDES) if full_resolution else STRIDES
        self.out_channels = tuple(feature_size * stride for stride in self.strides)
        self.full_resolution = full_resolution
        blocks: dict[str, Any] = {"kernel_size": 3, "norm_name": norm_name, "res_block": True}
        # The maps are raw residual streams, whose scale grows with depth.
        self.tap_norms = nn.ModuleList(LayerNorm3d(encoder.embed_dim) for _ in out_indices)
        widths = {stride: feature_size * stride for stride in STRIDES}
        self.levels = nn.ModuleList(
            _level(encoder.embed_dim, width, encoder.patch_size / stride, blocks)
            for stride, width in widths.items()
        )
        finer = [width for stride, width in widths.items() if stride < encoder.patch_size]
        grafts = finer if kind == "conv_stem" else []
        self.stem: nn.Module | None = None
        if grafts or full_resolution:
            self.stem = UnetrBasicBlock(3, encoder.in_chans, feature_size, stride=1, **blocks)
        self.branch = nn.ModuleList(
            UnetrBasicBlock(3, width // 2, width, stride=2, **blocks) for width in grafts
        )
        self.joins = nn.ModuleList(_zero_conv(width) for width in grafts)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """The maps.

        Shapes:
            x: (B, C, X, Y, Z), sides equal to the encoder's `img_size`.
            returns: (B, W * s, X / s, Y / s, Z / s) for each stride s; where a token grid is odd,
                halves of it are rounded down.
        """
        taps = self.encoder.forward_intermediates(x, self.out_indices, intermediates_only=True)
        tokens = [norm(tap) for norm, tap in zip(self.tap_norms, taps, strict=True)]
        if len(tokens) == 1:
            tokens *= len(self.levels)
        maps = [self._run(level, m) for level, m in zip(self.levels, tokens, strict=True)]
        if self.stem is None:
            return maps
        full = fine = self._run(self.stem, x)
        for i, (stage, join) in enumerate(zip(self.branch, self.joins, strict=True)):
            fine = self._run(stage, fine)
            maps[i] = maps[i] + join(fine)
        return [full, *maps] if self.full_resolution else maps


class Pyramid(PyramidNetwork):
    """The maps themselves, for any decoder.

    Shapes:
        x: (B, C, X, Y, Z), sides equal to the encoder's `img_size`.
        returns: see `PyramidNetwork.pyramid`.
    """

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.pyramid(x)


pyramid = Pyramid  # the public name


class Halve(nn.Module):
    """A grid of half the cells, rounded down, in which no cell of an odd grid is left out.

    Shapes:
        x: (B, C, x, y, z).
        returns: (B, C, x // 2, y // 2, z // 2), but at least one cell.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        missing = [2 * max(n // 2, 1) + 1 - n for n in reversed(x.shape[2:])]  # 0 where n is odd
        out: Tensor = self.conv(F.pad(x, [side for n in missing for side in (0, n)]))
        return out


def _level(embed_dim: int, width: int, scale: float, blocks: dict[str, Any]) -> nn.Module:
    """The layers from tokens to a map on `scale` times their grid; `scale` is a power of two."""
    if scale > 1:
        doublings = int(scale).bit_length() - 1
        return UnetrPrUpBlock(
            3,
            embed_dim,
            width,
            num_layer=doublings - 1,
            stride=1,
            upsample_kernel_size=2,
            conv_block=True,
            **blocks,
        )
    halvings = int(1 / scale).bit_length() - 1
    project = nn.Conv3d(embed_dim, width, kernel_size=1)
    return nn.Sequential(project, *(Halve(width) for _ in range(halvings)))


def _zero_conv(width: int) -> nn.Conv3d:
    """A convolution initialised to zero."""
    conv = nn.Conv3d(width, width, kernel_size=1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one
    return conv
