"""What a frozen encoder says about single voxels, and its tokens as colours.

Tokens are far apart, so a voxel's features are interpolated between the tokens around it. Only the
voxels that are asked for are computed: dense features of one volume would fill gigabytes.

Letters: N voxels, E token width, x, y, z tokens per axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from nibabel.affines import apply_affine
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from tqdm import tqdm

from sammed3d_backbone.adapters.contract import Encoder
from sammed3d_backbone.data.geometry import Geometry

SPREAD = (1, 99)  # percentiles of a component between which its colour runs


def draw_voxels(
    label: NDArray[Any], values: Sequence[int], per_class: int, rng: np.random.Generator
) -> NDArray[np.intp]:
    """As many voxels of every class, or all where a class has fewer.

    Args:
        label: (X, Y, Z) integers.
        values: Classes to draw.
        per_class: Voxels of each.
        rng: Of the draws.

    Shapes:
        returns: (N, 3) indices.
    """
    drawn = []
    for value in values:
        found = np.flatnonzero(label == value)
        drawn.append(rng.choice(found, min(per_class, len(found)), replace=False))
    flat = np.concatenate(drawn) if drawn else np.empty(0, np.intp)
    return np.stack(np.unravel_index(flat, label.shape), axis=-1)


def features_at(
    encoder: Encoder,
    image: Tensor,
    places: ArrayLike,
    blocks: Sequence[int],
    *,
    progress: bool = False,
) -> dict[int, Tensor]:
    """Features of some places after some blocks.

    The image is seen through windows that overlap by half. A place that lies in several has their
    mean, in which a window counts the less the nearer the place is to its border.

    Args:
        encoder: In evaluation mode.
        image: Prepared, no side smaller than the encoder's input.
        places: In voxels of the image, with fractions, none outside it.
        blocks: Numbers from 0.
        progress: Show a bar of windows on standard error.

    Shapes:
        image: (C, X, Y, Z).
        places: (N, 3).
        returns: block -> (N, E) float32.

    Raises:
        ValueError: If the image is smaller than the encoder's input.
    """
    from monai.data.utils import dense_patch_slices  # takes seconds to import

    sides = encoder.img_size
    if any(n < side for n, side in zip(image.shape[1:], sides, strict=True)):
        raise ValueError(
            f"an image of {tuple(image.shape[1:])} voxels does not fill the encoder's {sides}; pad "
            "it, or call set_input_size with a smaller side"
        )
    at = torch.as_tensor(np.asarray(places), dtype=torch.float32)
    chosen = sorted(set(blocks))
    device = next((p.device for p in cast("nn.Module", encoder).parameters()), image.device)
    sums = {block: torch.zeros(len(at), encoder.embed_dim) for block in chosen}
    total = torch.zeros(len(at))
    side = torch.tensor(sides)
    windows = dense_patch_slices(image.shape[1:], sides, tuple(n // 2 for n in sides))
    for window in tqdm(windows, disable=not progress):
        inside = at - torch.tensor([part.start for part in window])
        nearness = (1 - (2 * (inside + 0.5) / side - 1).abs()).clamp_min(0).prod(1)
        seen = nearness > 0
        if not seen.any():
            continue
        with torch.inference_mode():
            maps = encoder.forward_intermediates(
                image[(None, slice(None), *window)].to(device),
                indices=chosen,
                intermediates_only=True,
            )
        tokens_at = (inside[seen] + 0.5) / encoder.patch_size - 0.5
        for block, tokens in zip(chosen, maps, strict=True):
            sums[block][seen] += nearness[seen, None] * sampled(tokens[0].float().cpu(), tokens_at)
        total += nearness
    return {block: values / total[:, None] for block, values in sums.items()}


def feature_grid(
    encoder: Encoder,
    image: Tensor,
    geometry: Geometry,
    blocks: Sequence[int],
    *,
    progress: bool = False,
) -> tuple[dict[int, Tensor], NDArray[np.float64]]:
    """Features of a whole volume, on a grid about as fine as the encoder's, without seams.

    Args:
        encoder: In evaluation mode.
        image: As `Preparation.image` gives it.
        geometry: Likewise.
        blocks: Numbers from 0.
        progress: Show a bar of windows on standard error.

    Shapes:
        image: (C, X, Y, Z).
        returns: block -> (E, x, y, z), axes towards R, A, S; and (4, 4), its index -> RAS+ mm.
    """
    shape = geometry.resampled_shape
    counts = [-(-n // encoder.patch_size) for n in shape]
    to_voxel = np.eye(4)  # grid of features -> voxels of the image; both cover the whole volume
    for axis, (n, count, start) in enumerate(zip(shape, counts, geometry.box_start, strict=True)):
        to_voxel[axis, axis] = n / count
        to_voxel[axis, 3] = 0.5 * n / count - 0.5 - start
    places = apply_affine(to_voxel, list(np.ndindex(*counts)))
    found = features_at(encoder, image, places, blocks, progress=progress)
    maps = {block: values.T.reshape(-1, *counts) for block, values in found.items()}
    return maps, geometry.affine @ to_voxel


def sampled(tokens: Tensor, places: Tensor) -> Tensor:
    """Values between tokens, trilinear, and those of the outermost tokens beyond them.

    Shapes:
        tokens: (E, x, y, z).
        places: (N, 3) in tokens, centres at whole numbers.
        returns: (N, E).
    """
    sizes = torch.tensor(tokens.shape[1:])
    unit = (2 * places.float() + 1) / sizes - 1  # -1 to 1 over the extent of the grid
    grid = unit.flip(-1)[None, :, None, None]  # torch wants the last axis first
    found = F.grid_sample(tokens[None], grid, padding_mode="border", align_corners=False)
    return found[0, :, :, 0, 0].T


def pca_colours(tokens: Tensor) -> Tensor:
    """The three directions in which tokens differ most, as red, green and blue.

    Tokens are compared by cosine after each channel was standardised, as by the probes: otherwise
    a few channels, and air in CT, would take all colours. The same tokens have the same colours
    whatever their order; colours of two volumes or blocks cannot be compared.

    Shapes:
        tokens: (E, x, y, z).
        returns: (3, x, y, z), 0 to 1.

    Raises:
        ValueError: If there are fewer than three tokens or channels.
    """
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    flat = tokens.flatten(1).T.double().numpy()
    if min(flat.shape) < 3:
        raise ValueError(
            f"{flat.shape[0]} tokens of {flat.shape[1]} channels have no three colours; give three "
            "of each or more"
        )
    # From version 1.5 on, scikit-learn fixes the signs by the directions, not by the samples.
    pca = make_pipeline(StandardScaler(), Normalizer(), PCA(3, svd_solver="full"))
    parts = pca.fit_transform(flat)
    low, high = np.percentile(parts, SPREAD, axis=0)
    colours = ((parts - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return torch.from_numpy(colours.T).float().reshape(3, *tokens.shape[1:])
