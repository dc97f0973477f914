"""Bottlenecks with a spatial convolution behind the blocks of an encoder that stays frozen.

Every block is followed by a narrow residual branch, the only trainable part, in which tokens also
see their neighbours on the grid.

Source: Houlsby et al., Parameter-efficient transfer learning for NLP, ICML 2019; with a depthwise
3-D convolution inside as in Gong et al., 3DSAM-adapter, Medical Image Analysis 98, 2024.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Adds the output of a narrow convolution to the tokens; zero at initialisation.

    Shapes:
        x: (B, x, y, z, E).
        returns: the same.
    """

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.down = nn.Linear(embed_dim, width)
        self.conv = nn.Conv3d(width, width, kernel_size=3, padding=1, groups=width)
        self.up = nn.Linear(width, embed_dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.down(self.norm(x)).movedim(4, 1)  # (B, W, x, y, z)
        mixed = F.gelu(self.conv(narrow)).movedim(1, 4)  # (B, x, y, z, W)
        out: Tensor = x + self.up(mixed)
        return out


def add_bottlenecks(encoder: nn.Module, *, width: int) -> None:
    """Adds a trainable bottleneck behind each block and freezes the encoder.

    Each has about 2 * E * `width` parameters, and its tensors are called
    ``blocks.<i>.bottleneck.*``; all others keep their names.

    Args:
        encoder: Changed in place; its ``blocks`` take and return (B, x, y, z, E).
        width: Channels inside.

    Raises:
        ValueError: If the width is not positive, or the encoder has no blocks.
    """
    if width < 1:
        raise ValueError(f"width={width}: expected the channels of a bottleneck, 1 or more")
    blocks, embed_dim = getattr(encoder, "blocks", None), getattr(encoder, "embed_dim", None)
    if not isinstance(blocks, nn.ModuleList) or not isinstance(embed_dim, int):
        raise ValueError(
            f"{type(encoder).__name__} has no `blocks` and `embed_dim` to put bottlenecks behind; "
            "pass an encoder of this package, before anything is put around it"
        )
    encoder.requires_grad_(False)
    for block in blocks:
        block.add_module("bottleneck", Bottleneck(embed_dim, width))
        # A hook, since a module around the block would rename its tensors.
        block.register_forward_hook(_through_bottleneck)


def _through_bottleneck(block: nn.Module, _: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
    """The forward hook of a block: passes its output through the bottleneck."""
    out: Tensor = block.get_submodule("bottleneck")(tokens)
    return out
