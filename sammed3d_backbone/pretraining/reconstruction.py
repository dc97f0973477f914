"""Masked image modelling: hidden patches are reconstructed from the rest of a volume.

Hidden patches are 0, the mean of a normalised volume, so that the encoder needs no token for them
and keeps its form (as in SimMIM: Xie et al., CVPR 2022). The target is each patch normalised by its
own mean and deviation (as in MAE: He et al., CVPR 2022): its structure, not its brightness.
Letters: B volumes, S voxels a side, p those of a patch, T patches of a volume.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sammed3d_backbone.models.image_encoder import ImageEncoder3D


class Reconstruction(nn.Module):
    """The reconstruction loss and its linear layer, which predicts voxels from the encoder's map.

    Args:
        encoder: Has one input channel; only its sizes are read. `forward` is given the encoder, so
            that this module holds its own parameters only.
        hidden_share: Share of the patches that is hidden.

    Shapes:
        image: (B, 1, S, S, S).
        draws: (B, T), from 0 to 1, decide which patches are hidden.
        returns: a scalar, the mean squared error; predicting the mean of each patch gives 1.

    Raises:
        ValueError: If nothing or everything would be hidden.
    """

    def __init__(self, encoder: ImageEncoder3D, hidden_share: float = 0.6) -> None:
        super().__init__()
        if not 0 < hidden_share < 1:
            raise ValueError(f"hidden_share={hidden_share}; give a share between 0 and 1")
        self.hidden_share = hidden_share
        self.patch_size = encoder.patch_size
        self.to_voxels = nn.Linear(encoder.out_chans, encoder.patch_size**3)

    def forward(self, encoder: nn.Module, image: Tensor, draws: Tensor) -> Tensor:
        """The loss over hidden patches."""
        patches = self._patches(image)  # (B, x, y, z, p ** 3)
        hidden = (draws < self.hidden_share).view(patches.shape[:-1])
        covered = hidden
        for axis in (1, 2, 3):
            covered = covered.repeat_interleave(self.patch_size, dim=axis)  # (B, S, S, S)
        seen = image.masked_fill(covered.unsqueeze(1), 0.0)
        predicted = self.to_voxels(encoder(seen).movedim(1, -1))
        truth = F.layer_norm(patches, patches.shape[-1:])
        error = (predicted.float() - truth).square().mean(-1)  # (B, x, y, z)
        # A mean over volumes, so that halves of a batch, on two processes, make up the whole.
        per_volume = (error * hidden).flatten(1).sum(1) / hidden.flatten(1).sum(1).clamp(min=1)
        loss: Tensor = per_volume.mean()
        return loss

    def _patches(self, image: Tensor) -> Tensor:
        p = self.patch_size
        cut = image[:, 0].unflatten(3, (-1, p)).unflatten(2, (-1, p)).unflatten(1, (-1, p))
        patches: Tensor = cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
        return patches
