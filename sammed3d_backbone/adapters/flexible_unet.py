"""MONAI's FlexibleUNet on any encoder of the contract.

Maps a volume (B, C, X, Y, Z) to class logits (B, K, X, Y, Z). `flexible_unet` puts
MONAI's decoder around an encoder; `register_backbones` registers backbones with MONAI, so that its
own `FlexibleUNet(backbone="sammed3d-conv_stem", ...)`, for instance in a bundle, builds one.
"""

from collections.abc import Callable, Sequence
from typing import Any

from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE, SegmentationHead, UNetDecoder
from torch import Tensor

from sammed3d_backbone.adapters.contract import Encoder
from sammed3d_backbone.adapters.network import require_classes
from sammed3d_backbone.adapters.pyramid import (
    KINDS,
    STRIDES,
    Kind,
    Pyramid,
    PyramidNetwork,
    pyramid,
)

# In place of a missing neighbour cell MONAI repeats the last one, so odd token grids fit as well.
DECODER: dict[str, Any] = {
    "act": ("relu", {"inplace": True}),
    "dropout": 0.0,
    "bias": False,
    "upsample": "deconv",
    "pre_conv": "default",
    "interp_mode": "nearest",
    "align_corners": None,
    "is_pad": True,
}


class FlexibleUNet(PyramidNetwork):
    """MONAI's FlexibleUNet around an encoder, for `out_channels` classes.

    MONAI's own takes batch norm and nearest-neighbour upsampling by default; with batches of one
    or two volumes, instance norm and transposed convolutions are the better start.

    Args:
        encoder: A module that fulfils `contract.Encoder`; it becomes part of the network.
        out_channels: Number of classes K, background included.
        kind: Kind of pyramid, see `PyramidNetwork`.
        feature_size: Also the decoder's channels at full resolution.
        out_indices: Block numbers, see `PyramidNetwork`.
        norm_name: Norm of pyramid and decoder, in MONAI's words.

    Shapes:
        x: (B, C, X, Y, Z), sides equal to the encoder's `img_size`.
        returns: (B, K, X, Y, Z), logits.

    Raises:
        ValueError: If `out_channels` is not positive, or `kind` or `out_indices` do not fit.
    """

    def __init__(
        self,
        encoder: Encoder,
        out_channels: int,
        kind: Kind = "conv_stem",
        *,
        feature_size: int = 16,
        out_indices: Sequence[int] | None = None,
        norm_name: str | tuple[str, dict[str, Any]] = "instance",
    ) -> None:
        require_classes(out_channels)
        super().__init__(
            encoder,
            kind,
            feature_size=feature_size,
            out_indices=out_indices,
            full_resolution=False,
            norm_name=norm_name,
        )
        self.decoder = UNetDecoder(
            3,
            encoder_channels=(encoder.in_chans, *self.out_channels),
            decoder_channels=decoder_channels(feature_size),
            norm=norm_name,
            **DECODER,
        )
        self.segmentation_head = SegmentationHead(3, feature_size, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        *skips, y = self.pyramid(x)
        for block, skip in zip(self.decoder.blocks, [*reversed(skips), None], strict=True):
            y = self._run(block, y, skip)
        logits: Tensor = self.segmentation_head(y)
        return logits


flexible_unet = FlexibleUNet  # the public name, as in the registry


def register_backbones(
    make_encoder: Callable[[int, bool], Encoder],
    *,
    prefix: str = "sammed3d",
    feature_size: int = 16,
) -> dict[Kind, str]:
    """Gives MONAI's FlexibleUNet a backbone for each kind of pyramid; registering again replaces.

    MONAI writes the arguments of every network it builds into the registered parameters, so each
    registration brings dictionaries of its own, and nothing is read from them but the kind.

    Args:
        make_encoder: Builds an encoder, given the number of input channels and `pretrained`.
        prefix: Prefix of the registered names.
        feature_size: Channels of the pyramids per voxel of stride.

    Returns:
        The name of each kind. The decoder of `flexible_unet` is
        `FlexibleUNet(..., decoder_channels=decoder_channels(16), norm="instance",
        upsample="deconv", spatial_dims=3)`.
    """

    def build(kind: Kind, spatial_dims: int, in_channels: int, pretrained: bool) -> Pyramid:
        if spatial_dims != 3:
            raise ValueError(f"spatial_dims={spatial_dims}; the encoder is 3-D, pass 3")
        encoder = make_encoder(in_channels, pretrained)
        return pyramid(encoder, kind, feature_size=feature_size)

    names = {kind: f"{prefix}-{kind}" for kind in KINDS}
    for kind, name in names.items():
        FLEXUNET_BACKBONE.register_dict[name] = {
            "type": build,
            "feature_number": len(STRIDES),
            "feature_channel": [feature_size * stride for stride in STRIDES],
            "parameter": {
                "kind": kind,
                "spatial_dims": 3,
                "in_channels": None,
                "pretrained": None,
            },
        }
    return names


def decoder_channels(feature_size: int) -> tuple[int, ...]:
    """Channels of the decoder's blocks, coarse to fine, in MONAI's order."""
    return tuple(feature_size * stride // 2 for stride in reversed(STRIDES))
