"""Contrastive loss: places of one object are drawn together and away from all other places.

A linear layer maps every token to vectors of the 2 x 2 x 2 parts of its patch. Parts of the same
object are drawn together and away from everything else (supervised contrastive learning:
Khosla et al., NeurIPS 2020; on voxels of synthetic volumes: Dey et al., anatomix, ICLR 2025).
Unlabelled places serve as negatives only, since they may be anything. A click trains one object;
this loss trains all places at once, on the same pass of the encoder.

Letters: B volumes, S voxels a side, T tokens of a volume, N = 8 T parts, M places, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sammed3d_backbone.models.image_encoder import ImageEncoder3D

PARTS_PER_SIDE = 2  # a patch is split into so many parts along each axis
PURE = 0.75  # a part belongs to the label that this share of its voxels has


class Contrast(nn.Module):
    """The contrastive loss and its linear layer.

    Args:
        encoder: Has one input channel; only its sizes are read, see `Reconstruction`.
        channels: Length D of a vector.
        temperature: Divides the cosines between places.
        most: Largest number of places per object that are compared; twice as many unlabelled ones.

    Shapes:
        embedding: (B, F, x, y, z), the encoder's map.
        labels: (B, S, S, S) integers; 0 is unlabelled.
        draws: (B, N), from 0 to 1, decide which places are compared.
        returns: two scalars, the loss and the share of places whose nearest place belongs to the
            same object. A volume without two places of an object counts as 0.
    """

    def __init__(
        self,
        encoder: ImageEncoder3D,
        *,
        channels: int = 32,
        temperature: float = 0.1,
        most: int = 200,
    ) -> None:
        super().__init__()
        self.side_vox = encoder.patch_size // PARTS_PER_SIDE
        self.temperature = temperature
        self.most = most
        self.to_parts = nn.Linear(encoder.out_chans, PARTS_PER_SIDE**3 * channels)

    def forward(self, embedding: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and share of nearest places."""
        found = [
            self._of_volume(*volume)
            for volume in zip(self._vectors(embedding), self._owners(labels), draws, strict=True)
        ]
        losses, nearest = zip(*found, strict=True)
        return torch.stack(losses).mean(), torch.stack(nearest).mean()

    def _vectors(self, embedding: Tensor) -> Tensor:
        """Normalised vectors of all parts, (B, N, D)."""
        vectors = self.to_parts(embedding.movedim(1, -1)).float()  # (B, x, y, z, 8 D)
        vectors = vectors.unflatten(-1, (PARTS_PER_SIDE, PARTS_PER_SIDE, PARTS_PER_SIDE, -1))
        return F.normalize(vectors.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(1, 6), dim=-1)

    def _owners(self, labels: Tensor) -> Tensor:
        """The label of every part, (B, N); -1 for parts that no label fills to `PURE`."""
        p = self.side_vox
        cut = labels.unflatten(3, (-1, p)).unflatten(2, (-1, p)).unflatten(1, (-1, p))
        voxels = cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # (B, N, p ** 3)
        owner = voxels.mode(-1).values
        is_pure = (voxels == owner.unsqueeze(-1)).float().mean(-1) >= PURE
        return torch.where(is_pure, owner, -1)

    def _of_volume(self, vectors: Tensor, owners: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and share of nearest places of one volume: (N, D), (N,), (N,)."""
        order = draws.argsort()
        kept = []
        for label in owners.unique().tolist():
            if label >= 0:
                places = order[owners[order] == label]
                kept.append(places[: self.most if label else 2 * self.most])
        chosen = torch.cat(kept) if kept else order[:0]
        vectors, owners = vectors[chosen], owners[chosen]  # (M, D), (M,)
        same = (owners.unsqueeze(1) == owners) & (owners > 0)
        same.fill_diagonal_(False)
        partners = same.sum(1)
        if not partners.any():
            return vectors.sum() * 0, draws.new_zeros(())
        itself = torch.eye(len(owners), dtype=torch.bool, device=owners.device)
        cosines = (vectors @ vectors.T / self.temperature).masked_fill(itself, -torch.inf)
        log_share = cosines - cosines.logsumexp(1, keepdim=True)
        missed = -log_share.masked_fill(~same, 0).sum(1) / partners.clamp(min=1)
        # Objects have equal weight, whatever their size.
        weight = (partners > 0) / (partners + 1)
        weight = weight / weight.sum()
        nearest = same.gather(1, cosines.argmax(1, keepdim=True)).squeeze(1)
        return (missed * weight).sum(), (nearest * weight).sum()
