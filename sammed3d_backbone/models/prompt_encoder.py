"""Prompts as embeddings: clicks become sparse tokens, a mask becomes a dense map.

Input: voxel indices with labels, and the logits of an earlier mask. Output: the input of the mask
decoder, and the position code of the image tokens. Letters used here: P prompts, N points of
a prompt, F width of the neck's map, (X, Y, Z) voxels of the input, (x, y, z) its tokens.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from sammed3d_backbone.models.attention import Grid
from sammed3d_backbone.models.layers import LayerNorm3d

PointPos = Literal["swapped", "aligned"]
Points = tuple[Tensor, Tensor]  # voxel indices (P, N, 3) and labels (P, N)
MASK_SCALE = 4  # voxels of a mask prompt per token and axis


class FourierCode(nn.Module):
    """Sines and cosines of random frequencies, which the weights file carries.

    Shapes:
        place: (..., 3), from 0 to 1 along each axis of the input.
        returns: (..., F).
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, embed_dim: int, point_pos: PointPos) -> None:
        super().__init__()
        self.point_pos: PointPos = point_pos
        # Faithful: released codes repeat their sines, so a third of the channels is redundant;
        # pinned by `test_the_released_code_is_sine_cosine_and_the_same_sine_again`.
        self.waves = (torch.sin, torch.cos, torch.sin)[: 3 if point_pos == "swapped" else 2]
        if embed_dim % len(self.waves):
            raise ValueError(
                f"embed_dim={embed_dim} does not split into {len(self.waves)} waves of "
                f"point_pos={point_pos!r}; use a multiple of {len(self.waves)}, or the other form"
            )
        frequencies = torch.randn(3, embed_dim // len(self.waves))
        self.register_buffer("positional_encoding_gaussian_matrix", frequencies)

    def forward(self, place: Tensor) -> Tensor:
        frequencies = self.positional_encoding_gaussian_matrix
        # Spelled out, since autocast would round the factors of a matrix product.
        phase = ((2 * place - 1).unsqueeze(-1) * frequencies).sum(-2) * (2 * math.pi)
        return torch.cat([wave(phase) for wave in self.waves], dim=-1)


def image_token_code(code: FourierCode, grid: Grid) -> Tensor:
    """The position code of every image token.

    Args:
        code: The position code of places.
        grid: Image tokens per axis.

    Shapes:
        returns: (1, F, x, y, z).
    """
    matrix = code.positional_encoding_gaussian_matrix
    axes = [(torch.arange(n, dtype=matrix.dtype, device=matrix.device) + 0.5) / n for n in grid]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (x, y, z, 3)
    if code.point_pos == "swapped":
        # Faithful: token (i, j, k) carries the code of a point at (j, i, k); pinned by
        # `test_released_image_tokens_have_axes_0_and_1_swapped_against_points`.
        centres = centres[..., [1, 0, 2]]
    embedded: Tensor = code(centres)
    return embedded.movedim(3, 0).unsqueeze(0)


class PromptEncoder3D(nn.Module):
    """Embeds points and masks, with the released network's parameter names and call.

    Args:
        embed_dim: Width F of all embeddings, that of the image encoder's neck.
        img_size: Input sides in voxels.
        grid: Image tokens per axis.
        mask_in_chans: Width of the convolutions that read a mask prompt.
        point_pos: "swapped", as the public weights were trained, cubes only; or "aligned", in
            which a click and the image token around it carry matching codes, for training from
            scratch. The two have frequencies of different shapes, so neither loads as the other.

    Shapes:
        points: voxel indices (P, N, 3) in array axis order, voxel centres at whole numbers, and
            labels (P, N): 1 inside the object, 0 outside, -1 no point.
        masks: (P, 1, 4 x, 4 y, 4 z), logits.
        returns: sparse tokens (P, N + 1, F), or (P, 0, F) without points; and a dense map
            (P, F, x, y, z).

    Raises:
        ValueError: If a prompt has the wrong shape or label, or is a box.

    Source:
        github.com/uni-medical/SAM-Med3D, segment_anything/modeling/prompt_encoder3D.py at f3de1fa.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        img_size: Grid,
        grid: Grid,
        mask_in_chans: int = 16,
        point_pos: PointPos = "swapped",
    ) -> None:
        super().__init__()
        if point_pos not in ("swapped", "aligned"):
            raise ValueError(f"point_pos={point_pos!r} is unknown; use 'swapped' or 'aligned'")
        self.pe_layer = FourierCode(embed_dim, point_pos)
        self.set_input_size(img_size, grid)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(2))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv3d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm3d(mask_in_chans // 4),
            nn.GELU(),
            nn.Conv3d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm3d(mask_in_chans),
            nn.GELU(),
            nn.Conv3d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    @property
    def point_pos(self) -> PointPos:
        """Position code of clicks."""
        return self.pe_layer.point_pos

    @property
    def mask_size(self) -> Grid:
        """Voxels per axis of a mask prompt, and of the masks that the decoder returns."""
        x, y, z = (MASK_SCALE * n for n in self.grid)
        return x, y, z

    def set_input_size(self, img_size: Grid, grid: Grid) -> None:
        """Measures points and image tokens on an input of another size, in voxels and tokens.

        Raises:
            ValueError: If point_pos="swapped" meets an input that is not a cube.
        """
        if self.point_pos == "swapped" and len(set(img_size)) > 1:
            raise ValueError(
                f"img_size={img_size} is not a cube, and point_pos='swapped' exchanges two axes; "
                f"pad to {(max(img_size),) * 3}, or train with point_pos='aligned'"
            )
        self.img_size = img_size
        self.grid = grid

    def forward(
        self,
        points: Points | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if boxes is not None:
            raise ValueError(
                "box prompts are refused: no public weights were trained with them, and the "
                "reference's code for them cannot run; give points inside the object"
            )
        none = self.no_mask_embed.weight  # (1, F)
        sparse = none.new_zeros(1 if masks is None else len(masks), 0, none.shape[1])
        if points is not None:
            sparse = self._embed_points(*points)
        if masks is None:
            dense = none.view(1, -1, 1, 1, 1).expand(len(sparse), -1, *self.grid)
        else:
            dense = self._embed_masks(masks)
        return sparse, dense

    def get_dense_pe(self) -> Tensor:
        """The position code of every image token.

        Shapes:
            returns: (1, F, x, y, z).
        """
        return image_token_code(self.pe_layer, self.grid)

    def _embed_points(self, coords: Tensor, labels: Tensor) -> Tensor:
        """Tokens (P, N + 1, F) of points."""
        if coords.ndim != 3 or coords.shape[-1] != 3 or labels.shape != coords.shape[:2]:
            raise ValueError(
                f"points of shape {tuple(coords.shape)} with labels {tuple(labels.shape)}; give "
                "voxel indices (P, N, 3) and labels (P, N)"
            )
        if not bool(((labels == 1) | (labels == 0) | (labels == -1)).all()):
            raise ValueError(
                f"labels {labels.unique().tolist()}; give 1 for a point inside the object, 0 for "
                "one outside, -1 for no point"
            )
        none = self.not_a_point_embed.weight  # (1, F)
        place = (coords.to(none) + 0.5) / none.new_tensor(self.img_size)
        labels = labels.to(none.device, torch.long)
        is_point = (labels != -1).unsqueeze(-1)
        kinds = torch.cat([none, *self.point_embeddings.parameters()])  # (3, F)
        tokens = torch.where(is_point, self.pe_layer(place), 0.0) + kinds[labels + 1]
        # Faithful: a "not a point" token ends every set of points; pinned by
        # `test_points_end_with_a_token_that_is_no_point`.
        return torch.cat([tokens, none.expand(len(tokens), 1, -1)], dim=1)

    def _embed_masks(self, masks: Tensor) -> Tensor:
        """A dense map (P, F, x, y, z) of mask logits."""
        if masks.ndim != 5 or tuple(masks.shape[1:]) != (1, *self.mask_size):
            raise ValueError(
                f"mask prompt of shape {tuple(masks.shape)}; give logits of shape "
                f"{('P', 1, *self.mask_size)}, such as the decoder returned"
            )
        dense: Tensor = self.mask_downscaling(masks)
        return dense
