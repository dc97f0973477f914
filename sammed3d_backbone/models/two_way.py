"""The two-way transformer: prompt tokens read the image, and the image reads them back.

Input: image tokens, their position code and prompt tokens. Output: both after two layers.
Letters used here: P prompts, M prompt tokens, N image tokens, F width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sammed3d_backbone.models.layers import MLPBlock

DEPTH = 2  # layers; their number is part of the released parameter names
CROSS_REDUCTION = 2  # width F over the inner width of attention between tokens and image


class PromptAttention(nn.Module):
    """Multi-head attention between two sets of tokens, at a reduced inner width.

    Shapes:
        q: (P, M, F). k, v: (P, N, F).
        returns: (P, M, F).
    """

    def __init__(self, embed_dim: int, num_heads: int, reduction: int = 1) -> None:
        super().__init__()
        inner_dim = embed_dim // reduction
        if inner_dim % num_heads:
            raise ValueError(
                f"an inner width of {inner_dim} does not split into {num_heads} heads; "
                f"make embed_dim a multiple of {reduction * num_heads}"
            )
        self.num_heads = num_heads
        self.q_proj = nn.Linear(embed_dim, inner_dim)
        self.k_proj = nn.Linear(embed_dim, inner_dim)
        self.v_proj = nn.Linear(embed_dim, inner_dim)
        self.out_proj = nn.Linear(inner_dim, embed_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (P, A, M or N, C)
            for projected in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out_proj(mixed)
        return out


class TwoWayLayer(nn.Module):
    """One layer: among prompt tokens, from image to tokens, MLP, and from tokens to image.

    Shapes:
        tokens, token_pos: (P, M, F). image: (P, N, F). image_pos: (1 or P, N, F).
        returns: tokens and image, shaped as they came.
    """

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, *, is_first: bool) -> None:
        super().__init__()
        self.self_attn = PromptAttention(embed_dim, num_heads)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.cross_attn_token_to_image = PromptAttention(embed_dim, num_heads, CROSS_REDUCTION)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = MLPBlock(embed_dim, mlp_dim, activation=nn.ReLU)
        self.norm3 = nn.LayerNorm(embed_dim)
        self.norm4 = nn.LayerNorm(embed_dim)
        self.cross_attn_image_to_token = PromptAttention(embed_dim, num_heads, CROSS_REDUCTION)
        self.is_first = is_first

    def forward(
        self, tokens: Tensor, image: Tensor, token_pos: Tensor, image_pos: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.is_first:
            # Faithful: the first layer replaces its tokens, with neither residual nor positions;
            # pinned by `test_the_first_layer_replaces_its_tokens`.
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_pos
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        placed_image = image + image_pos
        read = self.cross_attn_token_to_image(tokens + token_pos, placed_image, image)
        tokens = self.norm2(tokens + read)
        tokens = self.norm3(tokens + self.mlp(tokens))
        update = self.cross_attn_image_to_token(placed_image, tokens + token_pos, tokens)
        return tokens, self.norm4(image + update)


class TwoWayTransformer(nn.Module):
    """The layers and a last reading of the image.

    Shapes:
        image: (P, F, x, y, z). image_pos: (1 or P, F, x, y, z). tokens: (P, M, F).
        returns: tokens (P, M, F) and the image (P, F, x, y, z).

    Source:
        github.com/uni-medical/SAM-Med3D, segment_anything/modeling/mask_decoder3D.py at f3de1fa.
    """

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayLayer(embed_dim, num_heads, mlp_dim, is_first=i == 0) for i in range(DEPTH)
        )
        self.final_attn_token_to_image = PromptAttention(embed_dim, num_heads, CROSS_REDUCTION)
        self.norm_final_attn = nn.LayerNorm(embed_dim)

    def forward(self, image: Tensor, image_pos: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        grid = image.shape[2:]
        image, image_pos = (x.flatten(2).transpose(1, 2) for x in (image, image_pos))  # (P, N, F)
        token_pos = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pos, image_pos)
        read = self.final_attn_token_to_image(tokens + token_pos, image + image_pos, image)
        tokens = self.norm_final_attn(tokens + read)
        return tokens, image.transpose(1, 2).unflatten(2, grid)
