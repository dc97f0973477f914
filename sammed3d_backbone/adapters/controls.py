"""A control for studies: an encoder that returns zeros shows what a decoder reaches on its own.

It fulfils the contract, so that it runs in the same network, loop and scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sammed3d_backbone.adapters.contract import Encoder


class ZeroedEncoder(nn.Module):
    """Returns maps of zeros in place of an encoder's.

    It has no parameters; its sizes are those of the replaced encoder.
    """

    def __init__(self, replaced: Encoder) -> None:
        super().__init__()
        self.in_chans = replaced.in_chans
        self.img_size = replaced.img_size
        self.patch_size = replaced.patch_size
        self.embed_dim = replaced.embed_dim
        self.out_chans = replaced.out_chans
        self.depth = replaced.depth

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Zeros (B, E, x, y, z), one map per index; first (B, F, x, y, z) unless left out."""
        grid = [n // self.patch_size for n in x.shape[2:]]
        chosen = range(self.depth) if indices is None else indices
        maps = [x.new_zeros(len(x), self.embed_dim, *grid) for _ in chosen]
        if intermediates_only:
            return maps
        return x.new_zeros(len(x), self.out_chans, *grid), maps

    def prune_intermediate_layers(
        self,
        indices: Sequence[int] | None = None,
        *,
        prune_norm: bool = False,  # noqa: ARG002 (the contract's)
    ) -> list[int]:
        """There is nothing to drop."""
        return list(indices or ())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """There is nothing to recompute."""

    def no_weight_decay(self) -> set[str]:
        """There are no parameters."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """There are no parameters."""
        return {}
