"""The mask decoder: mask logits at a quarter of the token's side from embedded image and prompts.

Input: the neck's map, its position code and embedded prompts. Output: logits (P, 1, 4 x, 4 y, 4 z)
and a predicted quality per mask. Letters: P prompts, M prompt tokens, F width, (x, y, z) image
tokens.

Upsampling runs on tokens with channels last: a transposed convolution whose stride equals its
kernel is one matrix product, and only the logits are sorted into a volume at the end. On a CPU that
takes half the time of convolutions on volumes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sammed3d_backbone.models.attention import Grid
from sammed3d_backbone.models.high_resolution import HighResolution
from sammed3d_backbone.models.layers import MLP, LayerNorm3d
from sammed3d_backbone.models.prompt_encoder import Points
from sammed3d_backbone.models.two_way import TwoWayTransformer

MASK_TOKENS = 4  # one for the single mask, three for its alternatives


class MaskDecoder3D(nn.Module):
    """Predicts masks of prompts, with the released network's parameter names and call.

    The released weights were trained with mask 0 only: the alternatives 1 to 3
    (`multimask_output=True`) and the quality head were never trained. They are computed as in the
    reference and are meaningless with those weights.

    Args:
        embed_dim: Width F of image embedding and prompts.
        num_heads: Attention heads.
        mlp_dim: Hidden width of the transformer's MLPs.
        iou_head_hidden_dim: Hidden width of the quality head.
        high_resolution: Maps of the image that are added where the decoder upsamples; None for the
            released form, which reads the embedding only.

    Shapes:
        image_embeddings: (1 or P, F, x, y, z); one image serves all prompts without a copy.
        image_pe: (1 or P, F, x, y, z).
        sparse_prompt_embeddings: (P, M, F), M may be 0.
        dense_prompt_embeddings: (1 or P, F, x, y, z).
        maps: those of `high_resolution` for B images, each of which has P / B consecutive prompts.
        returns: logits (P, K, 4 x, 4 y, 4 z) and quality (P, K); K is 1, or 3 alternatives.

    Raises:
        ValueError: If the number of images or dense prompts is neither 1 nor that of the prompts.

    Source:
        github.com/uni-medical/SAM-Med3D, segment_anything/modeling/mask_decoder3D.py at f3de1fa.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        iou_head_hidden_dim: int,
        high_resolution: HighResolution | None = None,
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
        self.iou_prediction_head: nn.Module = MLP(embed_dim, iou_head_hidden_dim, MASK_TOKENS)
        self.high_resolution = high_resolution

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool = False,
        maps: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        if (self.high_resolution is None) != (not maps):
            raise ValueError(
                f"{len(maps)} maps for a mask decoder with high_resolution="
                f"{self.high_resolution is not None}; decode what `Sam3D.encode` returned"
            )
        prompts = sparse_prompt_embeddings.shape[0]  # `len` would fix it in an export
        for name, given in (("images", image_embeddings), ("dense", dense_prompt_embeddings)):
            if given.shape[0] not in (1, prompts):
                raise ValueError(
                    f"{given.shape[0]} {name} embeddings for {prompts} sets of points; give one "
                    "for all of them, or one each"
                )
        image = (image_embeddings + dense_prompt_embeddings).expand(prompts, -1, -1, -1, -1)
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1 + 4, F)
        tokens = torch.cat([own.expand(prompts, -1, -1), sparse_prompt_embeddings], dim=1)
        tokens, image = self.transformer(image, image_pe, tokens)
        upscaled = self._upscaled(image.movedim(1, 4), maps)  # (P, x, y, z, 8, 8, F / 8)
        chosen = range(1, MASK_TOKENS) if multimask_output else range(1)
        # The mask tokens stand behind the quality token.
        kernels = torch.stack(
            [self.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in chosen], dim=-1
        )  # (P, F / 8, K)
        logits = torch.bmm(upscaled.flatten(1, 5), kernels).unflatten(1, upscaled.shape[1:6])
        quality: Tensor = self.iou_prediction_head(tokens[:, 0])
        return sorted_into_volume(logits), quality[:, list(chosen)]

    def keep_single_mask(self) -> None:
        """Drops what only alternatives, the predicted quality and clicks read.

        Then every parameter gets a gradient from the single mask; the quality is meaningless.
        """
        self.output_hypernetworks_mlps = self.output_hypernetworks_mlps[:1]
        self.iou_prediction_head = nn.Identity()
        if self.high_resolution is not None:
            self.high_resolution.to_point = nn.Identity()

    def at_points(self, maps: tuple[Tensor, ...], points: Points, img_size: Grid) -> Tensor:
        """The share of the high-resolution maps in the embedded clicks, which is added to them.

        Shapes:
            points: voxel indices (P, N, 3) and labels (P, N); -1, no point, gets nothing.
            returns: (P, N + 1, F), with zeros for the token that ends every set of points.
        """
        if self.high_resolution is None:
            raise ValueError("this mask decoder was built without high_resolution; give no maps")
        places, labels = points
        added: Tensor = self.high_resolution.at_points(maps, places.to(maps[0].device), img_size)
        is_point = (labels != -1).to(added.device).unsqueeze(-1)
        return F.pad(added * is_point, (0, 0, 0, 1))

    def _upscaled(self, tokens: Tensor, maps: tuple[Tensor, ...]) -> Tensor:
        """The image tokens after `output_upscaling`, with the high-resolution maps added.

        Shapes:
            tokens: (P, x, y, z, F).
            returns: (P, x, y, z, 8, 8, F / 8), parts of parts of tokens.
        """
        first, norm, act, second, last_act = self.output_upscaling
        middle = _halved(tokens, first)  # (P, x, y, z, 8, F / 4)
        if maps:
            middle = _plus(middle, HighResolution.parts(maps[0], 1))
        fine = _halved(act(norm(middle.movedim(5, 1)).movedim(1, 5)), second)
        if maps:
            fine = _plus(fine, HighResolution.parts(maps[1], 2))
        out: Tensor = last_act(fine)
        return out


def _halved(tokens: Tensor, convolution: nn.Module) -> Tensor:
    """A transposed convolution of kernel and stride 2 on tokens: (..., C) -> (..., 8, C')."""
    weight, bias = convolution.get_parameter("weight"), convolution.get_parameter("bias")
    matrix = weight.flatten(2).permute(2, 1, 0).flatten(0, 1)  # (8 C', C)
    parts: Tensor = F.linear(tokens, matrix, bias.repeat(8)).unflatten(-1, (8, -1))
    return parts


def _plus(tokens: Tensor, of_images: Tensor) -> Tensor:
    """Adds values of B images, (B, ...), to P / B consecutive prompts each, (P, ...)."""
    images = of_images.shape[0]
    both: Tensor = tokens.unflatten(0, (images, -1)) + of_images.unsqueeze(1)
    return both.flatten(0, 1)


def sorted_into_volume(parts: Tensor) -> Tensor:
    """(P, x, y, z, 8, 8, K) -> (P, K, 4 x, 4 y, 4 z)."""
    parts = parts.unflatten(5, (2, 2, 2)).unflatten(4, (2, 2, 2))
    return parts.permute(0, 10, 1, 4, 7, 2, 5, 8, 3, 6, 9).flatten(8).flatten(5, 7).flatten(2, 4)
