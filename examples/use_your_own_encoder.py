"""Another encoder under the same UNETR decoder: here MONAI's ViT, given the contract's names.

python examples/use_your_own_encoder.py   (MONAI's ViT needs einops)
"""

import torch
from monai.networks.nets import ViT

from sammed3d_backbone.adapters.contract import check_encoder
from sammed3d_backbone.adapters.unetr import unetr


class MonaiViT(ViT):
    """MONAI's vision transformer with what adapters.contract.Encoder asks for."""

    in_chans, img_size, patch_size, embed_dim = 1, (32, 32, 32), 8, 48
    out_chans = embed_dim  # it has no neck: the final map is as wide as the tokens

    def __init__(self):
        super().__init__(1, 32, 8, hidden_size=48, mlp_dim=96, num_layers=6, num_heads=4)
        for block in self.blocks:  # built for cross-attention, which this network has not
            block.norm_cross_attn = torch.nn.Identity()

    @property
    def depth(self):
        return len(self.blocks)

    def forward_intermediates(self, x, indices=None, *, intermediates_only=False):
        final, hidden = self(x)
        maps = [self._to_map(tokens) for tokens in hidden]
        maps = maps if indices is None else [maps[i] for i in indices]
        return maps if intermediates_only else (self._to_map(final), maps)

    def prune_intermediate_layers(self, indices=None, *, prune_norm=False):
        del self.blocks[max(indices) + 1 :]
        if prune_norm:
            self.norm = torch.nn.Identity()
        return list(indices)

    def set_grad_checkpointing(self, enable=True):
        if enable:
            raise ValueError("MONAI's ViT has no gradient checkpointing; train it without")

    def no_weight_decay(self):
        return {"patch_embedding.position_embeddings"}

    def group_matcher(self, coarse=False):
        blocks = r"^blocks" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99,))]
        return {"stem": r"^patch_embedding", "blocks": blocks}

    def _to_map(self, tokens):
        return tokens.mT.unflatten(-1, (4, 4, 4))  # (B, E, x, y, z)


vit = MonaiViT()
check_encoder(vit)
network = unetr(vit, out_channels=2)
print("logits", tuple(network(torch.randn(1, 1, 32, 32, 32)).shape))
