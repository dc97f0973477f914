"""From an image embedding and prompts to mask logits at a quarter of the token's side.

Comes in: the neck's map, its position code and embedded prompts; goes out: logits (P, 1, 4 x, 4 y,
4 z) and a quality per mask. Letters: P prompts, M prompt tokens, F width, (x, y, z) image tokens.
"""

import torch
from torch import Tensor, nn

from sammed3d_backbone.models.layers import MLP, LayerNorm3d
from sammed3d_backbone.models.two_way import TwoWayTransformer

MASK_TOKENS = 4  # one for the single mask, three for its alternatives


class MaskDecoder3D(nn.Module):
    """Predicts masks of prompts, with the released network's parameter names and call.

    Training of the released weights used mask 0 only: nothing ever taught the alternatives 1 to 3
    (`multimask_output=True`) or the quality. They are computed as the reference computes them and
    mean nothing with those weights.

    Args:
        embed_dim: Width F of image embedding and prompts.
        num_heads: Attention heads.
        mlp_dim: Hidden width of the transformer's MLPs.
        iou_head_hidden_dim: Hidden width of the quality head.

    Shapes:
        image_embeddings: (1 or P, F, x, y, z); one image serves all prompts without a copy.
        image_pe: (1 or P, F, x, y, z).
        sparse_prompt_embeddings: (P, M, F), M may be 0.
        dense_prompt_embeddings: (1 or P, F, x, y, z).
        returns: logits (P, K, 4 x, 4 y, 4 z) and quality (P, K); K is 1, or 3 alternatives.

    Raises:
        ValueError: If the number of images or dense prompts is neither 1 nor that of the prompts.

    Source:
        github.com/uni-medical/SAM-Med3D, segment_anything/modeling/mask_decoder3D.py at f3de1fa.
    """

    def __init__(
        self, *, embed_dim: int, num_heads: int, mlp_dim: int, iou_head_hidden_dim: int
    ) -> None:
        super().__init__()
        if embed_dim % 8:
            raise ValueError(f"embed_dim={embed_dim} is not a multiple of 8; upscaling divides it")
        self.transformer = TwoWayTransformer(embed_dim, num_heads, mlp_dim)
        self.iou_token = nn.Embedding(1, embed_dim)
        self.mask_tokens = nn.Embedding(MASK_TOKENS, embed_dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose3d(embed_dim, embed_dim // 4, kernel_size=2, stride=2),
            LayerNorm3d(embed_dim // 4),
            nn.GELU(),
            nn.ConvTranspose3d(embed_dim // 4, embed_dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(embed_dim, embed_dim, embed_dim // 8) for _ in range(MASK_TOKENS)
        )
        self.iou_prediction_head = MLP(embed_dim, iou_head_hidden_dim, MASK_TOKENS)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool = False,
    ) -> tuple[Tensor, Tensor]:
        prompts = len(sparse_prompt_embeddings)
        for name, given in (("images", image_embeddings), ("dense", dense_prompt_embeddings)):
            if len(given) not in (1, prompts):
                raise ValueError(
                    f"{len(given)} {name} embeddings for {prompts} sets of points; give one for "
                    "all of them, or one each"
                )
        image = (image_embeddings + dense_prompt_embeddings).expand(prompts, -1, -1, -1, -1)
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1 + 4, F)
        tokens = torch.cat([own.expand(prompts, -1, -1), sparse_prompt_embeddings], dim=1)
        tokens, image = self.transformer(image, image_pe, tokens)
        upscaled = self.output_upscaling(image)  # (P, F / 8, 4 x, 4 y, 4 z)
        chosen = range(1, MASK_TOKENS) if multimask_output else range(1)
        # The mask tokens stand behind the quality token.
        kernels = [self.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in chosen]
        logits = torch.einsum("pkf,pfxyz->pkxyz", torch.stack(kernels, dim=1), upscaled)
        quality: Tensor = self.iou_prediction_head(tokens[:, 0])
        return logits, quality[:, list(chosen)]
