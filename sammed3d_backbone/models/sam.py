"""The promptable network: image encoder, prompt encoder and mask decoder wired together.

Input: a normalised cube and clicks in its voxels. Output: mask logits on the same cube. The
encoder never sees the prompts, so one embedding serves every click and every object. Volumes,
spacing and windows are the predictor's. Letters: P prompts, N points, F width of the embedding,
(X, Y, Z) input voxels, (x, y, z) tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from sammed3d_backbone.models.attention import Grid
from sammed3d_backbone.models.high_resolution import HighResolution
from sammed3d_backbone.models.image_encoder import ImageEncoder3D
from sammed3d_backbone.models.mask_decoder import MaskDecoder3D
from sammed3d_backbone.models.prompt_encoder import PointPos, Points, PromptEncoder3D


class Encoding(NamedTuple):
    """An encoded image: everything that does not depend on prompts, which is what a cache stores.

    Shapes:
        embedding: (B, F, x, y, z), the image encoder's output.
        maps: none, or two of `HighResolution`: (B, F / 4, 2 x, 2 y, 2 z) and
            (B, F / 8, 4 x, 4 y, 4 z).
    """

    embedding: Tensor
    maps: tuple[Tensor, ...] = ()


class Sam3D(nn.Module):
    """SAM-Med3D with the released network's parameter names.

    Attributes:
        pretrained_cfg: Record of the weights (`loading.registry.Weights`); None without.
        load_report: What loading did (`loading.fitting.LoadReport`); None without weights.

    Shapes:
        x: (B, 1, X, Y, Z), the three sides equal to `img_size`.
        points: voxel indices of x (P, N, 3) and labels (P, N), 1 inside and 0 outside; or None.
        mask_logits: (P, 1, 4 x, 4 y, 4 z), as `decode` returned them; or None.
        returns: mask logits (P, 1, X, Y, Z). P is B, or any number on one volume.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder3D,
        prompt_encoder: PromptEncoder3D,
        mask_decoder: MaskDecoder3D,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.pretrained_cfg: Any = None
        self.load_report: Any = None

    @classmethod
    def around(
        cls,
        image_encoder: ImageEncoder3D,
        *,
        mask_in_chans: int,
        num_heads: int,
        mlp_dim: int,
        iou_head_hidden_dim: int,
        point_pos: PointPos,
        high_resolution: bool = False,
    ) -> "Sam3D":
        """An encoder with a random prompt encoder and mask decoder of its sizes.

        The other arguments are those of `PromptEncoder3D` and `MaskDecoder3D`.
        """
        embed_dim = image_encoder.out_chans
        maps = HighResolution(image_encoder.in_chans, embed_dim, image_encoder.patch_size)
        return cls(
            image_encoder,
            PromptEncoder3D(
                embed_dim=embed_dim,
                img_size=image_encoder.img_size,
                grid=image_encoder.grid,
                mask_in_chans=mask_in_chans,
                point_pos=point_pos,
            ),
            MaskDecoder3D(
                embed_dim=embed_dim,
                num_heads=num_heads,
                mlp_dim=mlp_dim,
                iou_head_hidden_dim=iou_head_hidden_dim,
                high_resolution=maps if high_resolution else None,
            ),
        )

    @property
    def img_size(self) -> Grid:
        """Input sides in voxels."""
        return self.image_encoder.img_size

    def forward(
        self, x: Tensor, points: Points | None = None, mask_logits: Tensor | None = None
    ) -> Tensor:
        return self.upsample(self.decode(self.encode(x), points, mask_logits))

    def encode(self, x: Tensor) -> Encoding:
        """Encodes an image once, for all prompts."""
        embedding = self.image_encoder(x)
        if self.mask_decoder.high_resolution is None:
            return Encoding(embedding)
        return Encoding(embedding, self.mask_decoder.high_resolution(x, embedding))

    def decode(
        self,
        encoding: Encoding | Tensor,
        points: Points | None = None,
        mask_logits: Tensor | None = None,
    ) -> Tensor:
        """Mask logits of prompts on an image that is encoded already.

        Without `mask_logits` the network reads a mask of zeros, as in its training; the embedding
        that means "no mask" got no gradient there. Without points it goes by the mask alone, as
        some passes of its training did.

        Shapes:
            encoding: of one image, or of B images with P / B consecutive prompts each; a network
                without high-resolution maps takes the bare embedding, too.
            returns: (P, 1, 4 x, 4 y, 4 z), to be fed back with the next click.
        """
        return self.predict_masks(encoding, points, mask_logits)[0]

    def predict_masks(
        self,
        encoding: Encoding | Tensor,
        points: Points | None = None,
        mask_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mask logits as from `decode`, and the Dice that the network predicts for them.

        The released weights were not trained to predict it.

        Shapes:
            returns: (P, 1, 4 x, 4 y, 4 z) and (P, 1).
        """
        embedding, maps = Encoding(encoding) if isinstance(encoding, Tensor) else encoding
        if mask_logits is None:
            mask_logits = embedding.new_zeros(1, 1, *self.prompt_encoder.mask_size)
        sparse, dense = self.prompt_encoder(points=points, masks=mask_logits)
        if maps and points is not None:
            sparse = sparse + self.mask_decoder.at_points(maps, points, self.img_size)
        if 1 < len(embedding) < len(sparse):
            embedding = embedding.repeat_interleave(len(sparse) // len(embedding), dim=0)
        predicted: tuple[Tensor, Tensor] = self.mask_decoder(
            embedding, self.prompt_encoder.get_dense_pe(), sparse, dense, maps=maps
        )
        return predicted

    def upsample(self, low_res: Tensor) -> Tensor:
        """The decoder's logits on the input's voxels, trilinear between voxel centres.

        Shapes:
            low_res: (P, K, 4 x, 4 y, 4 z).
            returns: (P, K, X, Y, Z).
        """
        return F.interpolate(low_res, size=self.img_size, mode="trilinear", align_corners=False)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Makes the network take volumes of another size; its position table is resampled.

        Args:
            img_size: Side in voxels, or three of them where both forms of position allow it.

        Raises:
            ValueError: If the size is not a multiple of the patch, or not a cube with
                rel_pos="sammed3d" or point_pos="swapped".
        """
        self.image_encoder.set_input_size(img_size)
        self.prompt_encoder.set_input_size(self.img_size, self.image_encoder.grid)
