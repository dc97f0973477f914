"""A promptable network with a known answer.

Its encoder passes the image on, averaged over cells; its decoder finds the connected bright part at
the click. So a predictor around it must bring back bright objects, wherever windows lie.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from sammed3d_backbone.models.sam import Encoding


def fold(cells, side=8):
    """(1, 1, s, s, s) -> (1, C, side, side, side): the cells of a token become its channels."""
    p = cells.shape[-1] // side
    x = cells.reshape(1, side, p, side, p, side, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5).reshape(1, p**3, side, side, side)


def unfold(tokens):
    """The inverse of `fold`."""
    p, side = round(tokens.shape[1] ** (1 / 3)), tokens.shape[-1]
    x = tokens.reshape(1, p, p, p, side, side, side).permute(0, 4, 1, 5, 2, 6, 3)
    return x.reshape(1, 1, side * p, side * p, side * p)


class PassOn(nn.Module):
    """An encoder whose map is the image itself, averaged over cells."""

    def __init__(self, side_vox):
        super().__init__()
        self.img_size = (side_vox,) * 3
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        assert tuple(x.shape[2:]) == self.img_size
        return fold(F.adaptive_avg_pool3d(x, 32))


class Remember(nn.Module):
    """A prompt encoder that returns the prompts."""

    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, points, boxes, masks):
        assert boxes is None
        self.told.append((points, masks))
        return points, masks

    def get_dense_pe(self):
        return torch.zeros(1)


class Component(nn.Module):
    """A decoder that finds the connected bright part at the newest click.

    A positive click adds the part it lies in to the prior, a negative one removes the part.
    """

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(
        self,
        image_embeddings,
        image_pe,
        sparse_prompt_embeddings,
        dense_prompt_embeddings,
        multimask_output,
    ):
        self.passes += 1
        image = unfold(image_embeddings)[0, 0].numpy()
        prior = dense_prompt_embeddings[0, 0].numpy()
        inside = prior > 0
        parts, _ = ndimage.label(image > (image.min() + image.max()) / 2, np.ones((3, 3, 3)))
        if sparse_prompt_embeddings is not None:
            points, labels = sparse_prompt_embeddings
            cell = self.side_vox // 32
            index = tuple(int(n) // cell for n in points[0, -1])
            part = parts == parts[index] if parts[index] else np.zeros_like(inside)
            inside = inside | part if labels[0, -1] else inside & ~part
        logits = torch.from_numpy(np.where(inside, 8.0, -8.0).astype(np.float32))
        return logits[None, None], torch.zeros(1, 1)


class StandIn(nn.Module):
    """The three parts of a promptable network; windows of 64 voxels."""

    def __init__(self, side_vox=64):
        super().__init__()
        self.image_encoder = PassOn(side_vox)
        self.prompt_encoder = Remember()
        self.mask_decoder = Component()
        self.mask_decoder.side_vox = side_vox

    def encode(self, x):
        """See `Sam3D`."""
        return Encoding(self.image_encoder(x))

    def predict_masks(self, encoding, points=None, mask_logits=None):
        """See `Sam3D`."""
        if mask_logits is None:
            mask_logits = torch.zeros(1, 1, 32, 32, 32)
        sparse, dense = self.prompt_encoder(points=points, boxes=None, masks=mask_logits)
        return self.mask_decoder(encoding.embedding, None, sparse, dense, False)


def segment(predictor, volume, points, **about):
    """Predictions by name after positive clicks on one object, or on several by their names."""
    predictor.set_volume(volume, **about)
    for name, given in (points if isinstance(points, dict) else {"object": points}).items():
        for point in given:
            predictor.click(point, object=name)
    return {name: predictor.predict(name) for name in predictor.objects}
