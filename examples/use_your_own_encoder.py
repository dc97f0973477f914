"""Another encoder under every decoder: here MONAI's ViT, given the contract's names.

python examples/use_your_own_encoder.py   (MONAI's ViT needs einops)
"""

import torch
from monai.networks.nets import ViT

from sammed3d_backbone.adapters.contract import check_encoder
from sammed3d_backbone.adapters.registry import ADAPTERS, adapter


class MonaiViT(ViT):
    """MONAI's vision transformer with what adapters.contract.Encoder asks for."""

    patch_size = 8
    embed_dim = out_chans = 48  # it has no neck: the final map is as wide as the tokens

    def __init__(self, in_chans=1, img_size=(32, 32, 32)):
        super().__init__(in_chans, img_size, 8, 48, mlp_dim=96, num_layers=6, num_heads=4)
        self.in_chans, self.img_size = in_chans, img_size
        for block in self.blocks:  # built for cross-attention, which this network has not
            block.cross_attn = block.norm_cross_attn = torch.nn.Identity()

    @property
    def depth(self):
        return len(self.blocks)

    def forward_intermediates(self, x, indices=None, *, intermediates_only=False):
        final, hidden = self(x)
        chosen = range(self.depth) if indices is None else indices
        maps = [self._to_map(hidden[i]) for i in chosen]
        return maps if intermediates_only else (self._to_map(final), maps)

    def prune_intermediate_layers(self, indices=None, *, prune_norm=False):
        del self.blocks[max(indices) + 1 :]
        if prune_norm:
            self.norm = torch.nn.Identity()
        return list(indices)

    def set_grad_checkpointing(self, enable=True):
        assert not enable, "MONAI's ViT has no gradient checkpointing; train it without"

    def no_weight_decay(self):
        return {"patch_embedding.position_embeddings"}

    def group_matcher(self, coarse=False):
        blocks = r"^blocks" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99,))]
        return {"stem": r"^patch_embedding", "blocks": blocks}

    def _to_map(self, tokens):
        return tokens.mT.unflatten(-1, [n // 8 for n in self.img_size])  # (B, E, x, y, z)


if __name__ == "__main__":
    check_encoder(MonaiViT())
    for name in ADAPTERS:
        logits = adapter(name)(MonaiViT(), out_channels=2).eval()(torch.randn(1, 1, 32, 32, 32))
        print(f"{name}: logits {tuple(logits.shape)}")
