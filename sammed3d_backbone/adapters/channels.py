"""Several input channels with an encoder that was pretrained on one.

The encoder processes each channel separately, and the maps are merged. This costs C times the
encoder's time and activations, and accepts volumes that lack some channels. The cheap alternatives
are in `encoder`: `in_chans=C` repeats the first layer's kernel over the channels, evenly or with
`channel_gains=`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sammed3d_backbone.adapters.contract import Encoder
from sammed3d_backbone.adapters.network import groups_under_encoder


class ChannelMerge(nn.Module):
    """Merges the maps of several channels; at initialisation it is their mean.

    A matrix per channel, C * E * E parameters; missing channels get weight 0, the others more.

    Shapes:
        maps: (B * C, E, x, y, z).
        present: (B, C), true for channels that are there.
        returns: (B, E, x, y, z).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv3d(channels * width, width, kernel_size=1, bias=False)
        mean = torch.eye(width).repeat(1, channels) / channels  # (E, C * E)
        self.mix.weight = nn.Parameter(mean.view_as(self.mix.weight))

    def forward(self, maps: Tensor, present: Tensor) -> Tensor:
        share = present * (present.shape[1] / present.sum(1, keepdim=True))  # (B, C)
        by_channel = maps.unflatten(0, present.shape)  # (B, C, E, x, y, z)
        by_channel = by_channel * share[:, :, None, None, None, None].to(maps.dtype)
        out: Tensor = self.mix(by_channel.flatten(1, 2))
        return out


class SharedEncoder(nn.Module):
    """An encoder of one channel that takes several: one after another, maps merged.

    It fulfils the contract. A channel that is zero everywhere counts as missing, so a scan that
    was not made is stacked as zeros; a volume that is zero in all channels has none missing. If all
    is frozen, the merge is the mean of the channels that are there.

    Args:
        encoder: Fulfils `contract.Encoder` with in_chans=1; it becomes part of this module.
        channels: Number of input channels C.

    Shapes:
        x: (B, C, X, Y, Z).

    Raises:
        ValueError: If the encoder takes several channels already, or `channels` is not positive.
    """

    def __init__(self, encoder: Encoder, channels: int) -> None:
        super().__init__()
        if encoder.in_chans != 1 or channels < 1:
            raise ValueError(
                f"channels={channels} for an encoder with in_chans={encoder.in_chans}; give 1 or "
                "more channels, and an encoder that is built with in_chans=1"
            )
        self.encoder = encoder
        self.in_chans = channels
        self.img_size = encoder.img_size
        self.patch_size = encoder.patch_size
        self.embed_dim = encoder.embed_dim
        self.out_chans = encoder.out_chans
        self.merges = nn.ModuleDict(
            {str(i): ChannelMerge(channels, encoder.embed_dim) for i in range(encoder.depth)}
        )
        self.final_merge: nn.Module | None = ChannelMerge(channels, encoder.out_chans)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.encoder.depth

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> Any:  # noqa: ANN401 (a list with intermediates_only=True)
        """Merged maps: the final one (B, F, x, y, z) unless left out, and (B, E, x, y, z) each."""
        wanted = range(self.depth) if indices is None else indices
        if lost := [i for i in wanted if str(i) not in self.merges]:
            raise ValueError(
                f"blocks {lost} are not merged here, or no longer since a network took the encoder "
                f"over; read some of {', '.join(self.merges)}"
            )
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"input of shape {tuple(x.shape)} is not (B, {self.in_chans}, X, Y, Z); stack the "
                "channels, zeros for one that is missing"
            )
        present = x.flatten(2).any(2)  # (B, C)
        present = present | ~present.any(1, keepdim=True)
        alone = x.flatten(0, 1)[:, None]  # (B * C, 1, X, Y, Z)
        merges = [self.merges[str(i)] for i in sorted(wanted)]
        if intermediates_only:
            maps = self.encoder.forward_intermediates(alone, wanted, intermediates_only=True)
            return [merge(tap, present) for merge, tap in zip(merges, maps, strict=True)]
        final, maps = self.encoder.forward_intermediates(alone, wanted)
        assert self.final_merge is not None  # the encoder has refused otherwise
        merged = [merge(tap, present) for merge, tap in zip(merges, maps, strict=True)]
        return self.final_merge(final, present), merged

    def prune_intermediate_layers(
        self, indices: Sequence[int] | None = None, *, prune_norm: bool = False
    ) -> list[int]:
        """Drops from the encoder what is not read, and the merges of all other blocks."""
        kept = self.encoder.prune_intermediate_layers(indices, prune_norm=prune_norm)
        self.merges = nn.ModuleDict({str(i): self.merges[str(i)] for i in kept})
        if prune_norm:
            self.final_merge = None
        return kept

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The encoder's depth groups under this name; merges follow them."""
        return groups_under_encoder(self.encoder, coarse)
