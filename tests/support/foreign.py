"""A third party's encoder: a strided convolution and a few residual convolutions."""

import torch
from torch import nn


class ConvEncoder(nn.Module):
    """Fulfils the contract without being a transformer or of this package."""

    def __init__(self, patch_size=8, embed_dim=12, in_chans=1, img_size=16, depth=6):
        super().__init__()
        self.patch_size, self.embed_dim, self.in_chans = patch_size, embed_dim, in_chans
        self.img_size = (img_size,) * 3
        self.out_chans = 5
        self.stem = nn.Conv3d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(
            nn.Conv3d(embed_dim, embed_dim, 3, padding=1) for _ in range(depth)
        )
        self.final = nn.Conv3d(embed_dim, self.out_chans, 1)

    @property
    def depth(self):
        return len(self.blocks)

    def forward_intermediates(self, x, indices=None, *, intermediates_only=False):
        wanted = range(self.depth) if indices is None else indices
        x = self.stem(x)
        maps = []
        for i, block in enumerate(self.blocks):
            x = x + torch.tanh(block(x))
            if i in wanted:
                maps.append(x)
        return maps if intermediates_only else (self.final(x), maps)

    def prune_intermediate_layers(self, indices=None, *, prune_norm=False):
        self.blocks = self.blocks[: max(indices) + 1]
        if prune_norm:
            del self.final
        return list(indices)

    def set_grad_checkpointing(self, enable=True):
        pass

    def no_weight_decay(self):
        return {"stem.bias"}

    def group_matcher(self, coarse=False):
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None)]}
