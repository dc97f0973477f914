"""Features of single voxels between tokens, and tokens as colours.

Letters: N voxels, E token width, x, y, z tokens per axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

SPREAD = (1, 99)  # percentiles of a component between which its colour runs


def draw_voxels(
    label: NDArray[Any], values: Sequence[int], per_class: int, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Draws the same number of voxels from every class, or all where a class has fewer.

    Shapes:
        returns: (N, 3) indices.
    """
    drawn = []
    for value in values:
        found = np.flatnonzero(label == value)
        drawn.append(rng.choice(found, min(per_class, len(found)), replace=False))
    flat = np.concatenate(drawn) if drawn else np.empty(0, np.intp)
    return np.stack(np.unravel_index(flat, label.shape), axis=-1)


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
