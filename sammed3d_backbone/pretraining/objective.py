"""What a step of pretraining minimises.

Comes in: a batch of `data.objects.ObjectStream`; goes out: the loss, and figures, by one forward
pass, so that wrappers which average gradients over processes see all of it. Clicks, hidden patches
and places of objects teach the same encoder, any of them or all; clicks and places share one pass
of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.pretraining.click_loss import Interaction
from sammed3d_backbone.pretraining.contrast import Contrast
from sammed3d_backbone.pretraining.reconstruction import Reconstruction


class Objective(nn.Module):
    """A promptable network with the losses that train it; at least one.

    Args:
        interaction: With the network that is to be trained.
        with_clicks: Whether the loss of the clicks counts. If not, only the encoder is trained.
        reconstruction: Of hidden patches; None for none.
        contrast: Of places of objects; None for none.
        reconstruction_weight: Beside the clicks.
        contrast_weight: The same.

    Shapes:
        batch: ``image``, ``objects``, ``draws``, ``hidden``, ``labels`` and ``places`` as the
            stream has them, with B in front.
        returns: a scalar, and scalars by name.

    Raises:
        ValueError: If nothing is asked for.
    """

    def __init__(
        self,
        interaction: Interaction,
        *,
        with_clicks: bool = True,
        reconstruction: Reconstruction | None = None,
        contrast: Contrast | None = None,
        reconstruction_weight: float = 1.0,
        contrast_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not with_clicks and reconstruction is None and contrast is None:
            raise ValueError("nothing to learn; give clicks, reconstruction or contrast")
        self.interaction = interaction
        self.with_clicks = with_clicks
        self.reconstruction = reconstruction
        self.contrast = contrast
        self.reconstruction_weight = reconstruction_weight
        self.contrast_weight = contrast_weight
        if not with_clicks:
            # Without a gradient, wrappers that average over processes would wait for them.
            self.network.prompt_encoder.requires_grad_(False)
            self.network.mask_decoder.requires_grad_(False)

    @property
    def network(self) -> Sam3D:
        """The promptable network."""
        return self.interaction.network

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and figures of it."""
        image = batch["image"]
        loss = torch.zeros((), device=image.device)
        figures: dict[str, Tensor] = {}
        if self.with_clicks or self.contrast is not None:
            embedding = self.network.image_encoder(image)
        if self.with_clicks:
            loss, figures = self.interaction.on_embedding(
                embedding, batch["objects"], batch["draws"]
            )
        if self.reconstruction is not None:
            error = self.reconstruction(self.network.image_encoder, image, batch["hidden"])
            figures = {**figures, "patch_error": error}
            loss = loss + self.reconstruction_weight * error
        if self.contrast is not None:
            apart, nearest = self.contrast(embedding, batch["labels"], batch["places"])
            figures = {**figures, "contrast": apart, "nearest_same": nearest}
            loss = loss + self.contrast_weight * apart
        return loss, figures
