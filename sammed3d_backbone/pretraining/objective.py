"""The loss of a pretraining step.

Input: a batch of `object_crops.ObjectStream`. Output: the loss and figures for the log, by one
forward pass, so that wrappers which average gradients over processes see all of it. The parts are
optional: clicks, dense labels, contrast, a teacher's embedding, which share one pass of the
encoder, and reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.pretraining.click_loss import Interaction
from sammed3d_backbone.pretraining.contrast import Contrast
from sammed3d_backbone.pretraining.dense_labels import DenseLabels
from sammed3d_backbone.pretraining.imitation import Imitation
from sammed3d_backbone.pretraining.reconstruction import Reconstruction


class Objective(nn.Module):
    """A promptable network with the losses that train it; at least one.

    Args:
        interaction: Click loss, with the network that is trained.
        with_clicks: Whether the click loss is used; without it, only the encoder is trained.
        reconstruction: Loss of hidden patches; None for none.
        contrast: Contrastive loss of places; None for none.
        dense: Loss of dense labels, which needs high-resolution maps; None for none.
        imitation: Loss of a teacher's embedding; None for none.
        reconstruction_weight: Weight of the reconstruction loss; the click loss has 1.
        contrast_weight: Weight of the contrastive loss.
        dense_weight: Weight of the dense loss.
        imitation_weight: Weight of the loss of the embedding.

    Shapes:
        batch: ``image``, ``objects``, ``draws``, ``plan``, ``hidden``, ``labels``, ``places``,
            ``classes`` and ``known`` as the stream has them, with B in front, each only for the
            losses that need it; ``embedding`` as `answers.AnswerStream` has it.
        returns: a scalar, and scalars by name.

    Raises:
        ValueError: If there is no loss, or dense labels without high-resolution maps.
    """

    def __init__(
        self,
        interaction: Interaction,
        *,
        with_clicks: bool = True,
        reconstruction: Reconstruction | None = None,
        contrast: Contrast | None = None,
        dense: DenseLabels | None = None,
        imitation: Imitation | None = None,
        reconstruction_weight: float = 1.0,
        contrast_weight: float = 1.0,
        dense_weight: float = 1.0,
        imitation_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not with_clicks and reconstruction is None and contrast is None and dense is None:
            raise ValueError("there is no loss; give clicks, reconstruction, contrast or dense")
        if dense is not None and interaction.network.mask_decoder.high_resolution is None:
            raise ValueError("dense labels need a variant with high_resolution, such as tiny")
        self.interaction = interaction
        self.with_clicks = with_clicks
        self.reconstruction = reconstruction
        self.contrast = contrast
        self.dense = dense
        self.imitation = imitation
        self.reconstruction_weight = reconstruction_weight
        self.contrast_weight = contrast_weight
        self.dense_weight = dense_weight
        self.imitation_weight = imitation_weight
        if not with_clicks:
            # Without a gradient, wrappers that average over processes would wait for them.
            self.network.prompt_encoder.requires_grad_(False)
            self.network.mask_decoder.requires_grad_(False)
            if dense is not None and self.network.mask_decoder.high_resolution is not None:
                maps = self.network.mask_decoder.high_resolution
                maps.requires_grad_(True)
                maps.to_point.requires_grad_(False)

    @property
    def network(self) -> Sam3D:
        """The promptable network."""
        return self.interaction.network

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and figures of it."""
        image = batch["image"]
        loss = torch.zeros((), device=image.device)
        figures: dict[str, Tensor] = {}
        if self.with_clicks or self.contrast is not None or self.dense is not None:
            encoding = self.network.encode(image)
        if self.with_clicks:
            loss, figures = self.interaction.on_encoding(
                encoding, batch["objects"], batch["draws"], batch["plan"]
            )
        if self.reconstruction is not None:
            error = self.reconstruction(self.network.image_encoder, image, batch["hidden"])
            figures = {**figures, "patch_error": error}
            loss = loss + self.reconstruction_weight * error
        if self.contrast is not None:
            apart, nearest = self.contrast(encoding.embedding, batch["labels"], batch["places"])
            figures = {**figures, "contrast": apart, "nearest_same": nearest}
            loss = loss + self.contrast_weight * apart
        if self.dense is not None:
            unlike, agreement = self.dense(encoding, batch["classes"], batch["known"])
            figures = {**figures, "dense_loss": unlike.detach(), "dense_dice": agreement}
            loss = loss + self.dense_weight * unlike
        if self.imitation is not None:
            apart = self.imitation(encoding.embedding, batch["embedding"])
            figures = {**figures, "embedding_error": apart.detach()}
            loss = loss + self.imitation_weight * apart
        return loss, figures
