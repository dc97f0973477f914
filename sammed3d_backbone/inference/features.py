"""What the encoder says about every place of a volume: token maps with their place in the body.

Windows lie side by side over the whole volume, each normalised by its own voxels like every crop
that the network was trained on, so values may step between windows. No prompts take part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sammed3d_backbone.data.geometry import TripleMm
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive.validation import Modality, intensity_of
from sammed3d_backbone.inference.interactive.windows import Windows
from sammed3d_backbone.models.image_encoder import ImageEncoder3D


@dataclass(frozen=True, eq=False)
class TokenMaps:
    """Token maps of a whole volume on one grid.

    Shapes:
        maps: name -> (F, x, y, z) float32, axes towards R, A, S; "block_2" is what comes out of
            transformer block 2, "neck" what the mask decoder reads: the encoder of a fine-tuned
            network may have none.
        affine: (4, 4), token index -> RAS+ mm of the token's centre.
    """

    maps: dict[str, Tensor]
    affine: NDArray[np.float64]


def token_maps(
    encoder: ImageEncoder3D,
    volume: Volume,
    *,
    spacing_mm: TripleMm,
    modality: Modality | None = None,
    blocks: Sequence[int] = (),
    progress: bool = False,
) -> TokenMaps:
    """The encoder's maps of a volume.

    Args:
        encoder: With a cubic input; it is set to evaluation.
        volume: One channel.
        spacing_mm: Along R, A, S, that the encoder was trained with.
        modality: As of `Predictor.set_volume`.
        blocks: Transformer blocks whose output is wanted beside the neck's.
        progress: Show a bar of windows on standard error.

    Raises:
        ValueError: If there is no such modality or block.
    """
    side, patch = encoder.img_size[0], encoder.patch_size
    windows = Windows(volume, spacing_mm, side, intensity_of(modality))
    resampled = windows.geometry.resampled_shape
    counts = [-(-m // side) for m in resampled]
    first = [-((n * side - m) // 2) for n, m in zip(counts, resampled, strict=True)]
    device = next(encoder.parameters()).device
    encoder.eval()
    tokens = side // patch
    maps: dict[str, Tensor] = {}
    for number in tqdm(np.ndindex(*counts), total=math.prod(counts), disable=not progress):
        x, y, z = (f + n * side for f, n in zip(first, number, strict=True))
        place = tuple(slice(n * tokens, (n + 1) * tokens) for n in number)
        parts = _maps_of(encoder, windows.image((x, y, z)).to(device), sorted(set(blocks)))
        for name, part in parts.items():
            if name not in maps:
                maps[name] = torch.zeros(part.shape[1], *(n * tokens for n in counts))
            maps[name][(slice(None), *place)] = part[0].float().cpu()
    box = windows.geometry.boxed((first[0], first[1], first[2]), (side, side, side))
    to_voxel = np.diag([patch, patch, patch, 1.0])
    to_voxel[:3, 3] = (patch - 1) / 2  # the centre of the first token
    return TokenMaps(maps, box.affine @ to_voxel)


def _maps_of(encoder: ImageEncoder3D, image: Tensor, blocks: Sequence[int]) -> dict[str, Tensor]:
    """The maps of one window, each (1, F, g, g, g)."""
    with torch.inference_mode():
        if not blocks:
            return {"neck": encoder(image)}
        if encoder.neck is None:
            maps = {}
            parts = encoder.forward_intermediates(image, indices=blocks, intermediates_only=True)
        else:
            neck, parts = encoder.forward_intermediates(image, indices=blocks)
            maps = {"neck": neck}
    return maps | {f"block_{b}": part for b, part in zip(blocks, parts, strict=True)}
