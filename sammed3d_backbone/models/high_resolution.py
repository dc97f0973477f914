"""Maps of the image at two and four times the token grid, for sharp masks.

Input: the image and its embedding. Output: two maps that the mask decoder adds while upsampling,
and a vector for every click, read from the maps at its position. They are computed once per image,
like the embedding, and serve all prompts. The released networks do not have them.

Source of the idea: high-resolution features of SAM 2 (Ravi et al., 2024) and HQ-SAM (Ke et al.,
NeurIPS 2023). The wiring, a small U-Net whose deepest level is the embedding, is our own.
"""

import torch
from torch import Tensor, nn

from sammed3d_backbone.models.attention import Grid


class HighResolution(nn.Module):
    """A small U-Net around the embedding.

    Args:
        in_chans: Channels C of the image.
        embed_dim: Width F of the embedding, a multiple of 8.
        patch_size: Side of a patch in voxels, a multiple of 4.

    Shapes:
        image: (B, C, X, Y, Z).
        embedding: (B, F, x, y, z).
        returns: (B, F / 4, 2 x, 2 y, 2 z) and (B, F / 8, 4 x, 4 y, 4 z).

    Raises:
        ValueError: If the patch does not split into 4 parts.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        if patch_size % 4:
            raise ValueError(f"patch_size={patch_size}; high-resolution maps need a multiple of 4")
        stride, middle, fine = patch_size // 4, embed_dim // 4, embed_dim // 8
        self.stem = nn.Sequential(
            nn.Conv3d(in_chans, fine, 2 * stride - 1, stride=stride, padding=stride - 1),
            nn.InstanceNorm3d(fine, affine=True),
            nn.GELU(),
        )
        self.down = nn.Sequential(
            nn.Conv3d(fine, middle, 2, stride=2), nn.InstanceNorm3d(middle, affine=True), nn.GELU()
        )
        self.tokens_up = nn.ConvTranspose3d(embed_dim, middle, 2, stride=2)
        self.middle = _mixer(middle)
        self.middle_up = nn.ConvTranspose3d(middle, fine, 2, stride=2)
        self.fine = _mixer(fine)
        self.to_point: nn.Module = nn.Linear(middle + fine, embed_dim)

    def forward(self, image: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        shallow = self.stem(image)
        middle = self.down(shallow) + self.tokens_up(embedding)
        middle = middle + self.middle(middle)
        fine = shallow + self.middle_up(middle)
        fine = fine + self.fine(fine)
        return middle, fine

    def at_points(self, maps: tuple[Tensor, ...], points: Tensor, img_size: Grid) -> Tensor:
        """Prompt tokens from the values of the maps at the clicks.

        Args:
            maps: What `forward` returned, of B images with P / B consecutive prompts each.
            points: Voxel indices in the image.
            img_size: Sides of the image in voxels.

        Shapes:
            points: (P, N, 3).
            returns: (P, N, F).
        """
        image_of = torch.arange(len(points), device=points.device) * len(maps[0]) // len(points)
        place = (points + 0.5) / points.new_tensor(img_size, dtype=torch.float32)  # 0 to 1
        found = []
        for values in maps:
            sides = place.new_tensor(values.shape[2:])
            cell = (place * sides).long().clamp(min=0)
            x, y, z = cell.minimum(sides.long() - 1).unbind(-1)  # (P, N)
            found.append(values.movedim(1, 4)[image_of.unsqueeze(1), x, y, z])  # (P, N, C)
        tokens: Tensor = self.to_point(torch.cat(found, dim=-1))
        return tokens

    @staticmethod
    def parts(values: Tensor, levels: int) -> Tensor:
        """A map sorted by tokens: (B, C, n x, n y, n z) -> (B, x, y, z, 8, C), or with 8, 8 for 2.

        Args:
            values: The map.
            levels: How often its grid halves that of the tokens, 1 or 2.
        """
        halves = (-1, *(2,) * levels)
        for axis in (4, 3, 2):
            values = values.unflatten(axis, halves)
        if levels == 1:  # (B, C, x, 2, y, 2, z, 2)
            return values.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6)
        values = values.permute(0, 2, 5, 8, 3, 6, 9, 4, 7, 10, 1)
        return values.flatten(7, 9).flatten(4, 6)


def _mixer(width: int) -> nn.Sequential:
    """A residual branch: each voxel reads its neighbours."""
    return nn.Sequential(
        nn.Conv3d(width, width, 3, padding=1, bias=False),
        nn.InstanceNorm3d(width, affine=True),
        nn.GELU(),
        nn.Conv3d(width, width, 1),
    )
