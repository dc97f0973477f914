"""Light heads: class logits from the last block's tokens alone.

Maps a volume (B, C, X, Y, Z) to class logits (B, K, X, Y, Z). A decoder with
convolutions on the raw volume reaches much without any encoder; these heads see tokens only, so
what they reach is the encoder's. Letters: P patch size, E token width, W `feature_size`.
"""

from itertools import pairwise

from torch import Tensor, nn

from sammed3d_backbone.adapters.contract import Encoder, require_encoder
from sammed3d_backbone.adapters.network import EncoderNetwork, require_classes, require_feature_size
from sammed3d_backbone.models.layers import LayerNorm3d


class HeadNetwork(EncoderNetwork):
    """An encoder's last map, normalised, and a head.

    Shapes:
        x: (B, C, X, Y, Z), sides equal to the encoder's `img_size`.
        returns: (B, K, X, Y, Z), logits.
    """

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__(encoder, [encoder.depth - 1])
        self.norm = LayerNorm3d(encoder.embed_dim)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        (tokens,) = self.encoder.forward_intermediates(x, self.out_indices, intermediates_only=True)
        return self._run(self.head, self.norm(tokens))


def linear_head(encoder: Encoder, out_channels: int) -> HeadNetwork:
    """Logits of each token by one linear layer, interpolated to the voxels.

    Raises:
        ValueError: If `out_channels` is not positive.
    """
    require_encoder(encoder)
    require_classes(out_channels)
    logits = nn.Conv3d(encoder.embed_dim, out_channels, kernel_size=1)
    voxels = nn.Upsample(scale_factor=encoder.patch_size, mode="trilinear", align_corners=False)
    return HeadNetwork(encoder, nn.Sequential(logits, voxels))


def expanding_head(encoder: Encoder, out_channels: int, *, feature_size: int = 16) -> HeadNetwork:
    """Logits of a token's P³ voxels by transposed convolutions that do not read its neighbours.

    Args:
        encoder: A module that fulfils `contract.Encoder`, see `check_encoder`.
        out_channels: Number of classes K, background included.
        feature_size: Channels W at full resolution; each halving of the resolution doubles them.

    Raises:
        ValueError: If `out_channels` is not positive.

    Source: the patch decoder of Wald et al., Primus: enforcing attention usage for 3D medical
        image segmentation, 2025.
    """
    require_encoder(encoder)
    require_classes(out_channels)
    require_feature_size(feature_size)
    stages = encoder.patch_size.bit_length() - 1
    widths = [encoder.embed_dim, *(feature_size * 2**stage for stage in reversed(range(stages)))]
    layers: list[nn.Module] = []
    for below, width in pairwise(widths):
        layers += [nn.ConvTranspose3d(below, width, 2, stride=2), LayerNorm3d(width), nn.GELU()]
    return HeadNetwork(encoder, nn.Sequential(*layers, nn.Conv3d(feature_size, out_channels, 1)))
