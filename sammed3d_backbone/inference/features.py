"""The encoder's token maps of a whole volume, on one grid with a known place in the body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sammed3d_backbone.adapters.contract import Encoder
from sammed3d_backbone.console import progress_bar
from sammed3d_backbone.data.preprocessing import Modality, Preprocessing
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.loading.fitting import require_finite_output


@dataclass(frozen=True, eq=False)
class TokenMaps:
    """Token maps of a whole volume on one grid.

    Shapes:
        maps: name -> (F, x, y, z) float32, axes towards R, A, S; "block_2" is the output of
            transformer block 2, "neck" the input of the mask decoder, which pruned encoders lack.
        affine: (4, 4), token index -> RAS+ mm of the token's centre.
    """

    maps: dict[str, Tensor]
    affine: NDArray[np.float64]


def token_maps(
    encoder: Encoder,
    volume: Volume,
    preprocessing: Preprocessing,
    *,
    modality: Modality | None = None,
    blocks: Sequence[int] = (),
    progress: bool = False,
) -> TokenMaps:
    """The encoder's token maps of a volume, from windows that overlap by half.

    Where windows overlap, their maps are averaged with Gaussian weights. Prompts are not involved.

    Args:
        encoder: Is set to evaluation mode.
        volume: Has as many channels as the encoder.
        preprocessing: Expected by the weights; the window is the encoder's `img_size`.
        modality: Chooses the intensity mode.
        blocks: Transformer blocks whose output is also returned.
        progress: Show a bar of windows on standard error.

    Raises:
        ValueError: If a block does not exist, a voxel is not finite, or the weights do not know
            the modality.
    """
    from monai.data.utils import dense_patch_slices
    from monai.inferers import sliding_window_inference

    module = cast("nn.Module", encoder).eval()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    sides, patch = encoder.img_size, encoder.patch_size
    image, geometry = preprocessing.image(volume, modality, min_shape=sides, multiple_of=patch)
    chosen = sorted(set(blocks))
    has_neck = not isinstance(getattr(module, "neck", None), nn.Identity | None)

    def maps_of(crops: Tensor) -> dict[str, Tensor]:
        bar.update()
        x = preprocessing.crops(crops, modality)
        if not chosen:
            return {"neck": module(x)}
        if has_neck:
            neck, parts = encoder.forward_intermediates(x, indices=chosen)
            found = {"neck": neck}
        else:
            parts = encoder.forward_intermediates(x, indices=chosen, intermediates_only=True)
            found = {}
        return found | {f"block_{b}": part for b, part in zip(chosen, parts, strict=True)}

    # Neighbouring windows are whole tokens apart; the half voxel guards against rounding down.
    steps = [max(1, side // patch // 2) * patch for side in sides]
    count = len(dense_patch_slices(image.shape[1:], sides, steps))
    with (
        progress_bar(desc="encoding", unit="window", total=count, shown=progress) as bar,
        torch.inference_mode(),
    ):
        found = sliding_window_inference(
            image[None],
            sides,
            sw_batch_size=1,
            predictor=maps_of,
            overlap=[1 - (step + 0.5) / side for step, side in zip(steps, sides, strict=True)],
            mode="gaussian",
            sw_device=device,
            device="cpu",
        )
    assert isinstance(found, dict)  # as `maps_of` returns one
    for part in found.values():
        require_finite_output(part)
    # Tokens that lie in padding alone are left out.
    first = [-start // patch for start in geometry.box_start]
    last = [
        -(-(n - start) // patch)
        for start, n in zip(geometry.box_start, geometry.resampled_shape, strict=True)
    ]
    kept = (slice(None), *map(slice, first, last))
    to_voxel = np.diag([patch, patch, patch, 1.0])
    to_voxel[:3, 3] = np.multiply(first, patch) + (patch - 1) / 2  # centre of the first token
    maps = {name: part[0][kept].contiguous() for name, part in found.items()}
    return TokenMaps(maps, geometry.affine @ to_voxel)
