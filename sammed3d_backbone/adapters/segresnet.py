"""A decoder like MONAI's SegResNetDS, with deep supervision, on any encoder of the contract.

Maps a volume (B, C, X, Y, Z) to class logits (B, K, X, Y, Z), while training a list of
them, each at half the resolution of the one before. The blocks are MONAI's; losses are elsewhere.

Source: Myronenko, 3D MRI brain tumor segmentation using autoencoder regularization, BrainLes 2018.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from monai.networks.blocks.upsample import UpSample
from monai.networks.nets.segresnet_ds import SegResBlock
from torch import Tensor, nn

from sammed3d_backbone.adapters.contract import Encoder
from sammed3d_backbone.adapters.network import require_classes
from sammed3d_backbone.adapters.pyramid import STRIDES, Kind, PyramidNetwork


class SegResNet(PyramidNetwork):
    """SegResNetDS's decoder around an encoder, for `out_channels` classes.

    Args:
        encoder: A module that fulfils `contract.Encoder`; it becomes part of the network.
        out_channels: Number of classes K, background included.
        kind: Kind of pyramid, see `PyramidNetwork`.
        feature_size: Also the decoder's channels at full resolution.
        out_indices: Block numbers, see `PyramidNetwork`.
        dsdepth: Resolutions that give logits while training, full resolution first; 1 for no deep
            supervision.
        norm_name: Norm of pyramid and decoder, in MONAI's words.

    Shapes:
        x: (B, C, X, Y, Z), sides equal to the encoder's `img_size`.
        returns: (B, K, X, Y, Z), logits; in training with `dsdepth` above 1 a list of them, whose
            entry i is (B, K, X / 2**i, Y / 2**i, Z / 2**i).

    Raises:
        ValueError: If a number is out of range, or `kind` or `out_indices` do not fit.
    """

    def __init__(
        self,
        encoder: Encoder,
        out_channels: int,
        kind: Kind = "conv_stem",
        *,
        feature_size: int = 16,
        out_indices: Sequence[int] | None = None,
        dsdepth: int = 4,
        norm_name: str | tuple[str, dict[str, Any]] = ("instance", {"affine": True}),
    ) -> None:
        require_classes(out_channels)
        if not 1 <= dsdepth <= len(STRIDES):
            raise ValueError(f"dsdepth={dsdepth}; give 1 (full resolution only) to {len(STRIDES)}")
        super().__init__(
            encoder,
            kind,
            feature_size=feature_size,
            out_indices=out_indices,
            full_resolution=True,
            norm_name=norm_name,
        )
        widths = self.out_channels
        self.ups = nn.ModuleList(
            UpSample(3, below, width, scale_factor=2, kernel_size=3, mode="deconv", bias=False)
            for width, below in pairwise(widths)
        )
        self.blocks = nn.ModuleList(SegResBlock(3, width, norm=norm_name) for width in widths[:-1])
        self.heads = nn.ModuleList(
            nn.Conv3d(width, out_channels, kernel_size=1) for width in widths[:dsdepth]
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        *skips, y = self.pyramid(x)
        stages = zip(self.ups, self.blocks, skips, strict=True)
        decoded = []
        for up, block, skip in reversed(list(stages)):
            y = self._run(block, skip + _grown(self._run(up, y), skip))
            decoded.append(y)
        heads = self.heads if self.training else self.heads[:1]
        outputs = [head(y) for head, y in zip(heads, reversed(decoded), strict=False)]
        return outputs if len(outputs) > 1 else outputs[0]


segresnet = SegResNet  # the public name, as in the registry


def _grown(y: Tensor, skip: Tensor) -> Tensor:
    """A doubled grid on its skip's: one cell larger where that is odd, the last one repeated."""
    missing = [b - a for a, b in zip(reversed(y.shape[2:]), reversed(skip.shape[2:]), strict=True)]
    return F.pad(y, [side for n in missing for side in (0, n)], mode="replicate")
