"""Sliding windows, part by part, are MONAI's to the last bit."""

import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from sammed3d_backbone.inference.sliding import sliding_planes


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("shape", [(16, 16, 16), (37, 16, 20), (40, 33, 16), (61, 17, 18)], ids=str)
def test_the_parts_together_are_what_monai_computes_at_once(shape, overlap, generator):
    torch.manual_seed(0)
    network = nn.Conv3d(2, 3, 3, padding=1).eval()
    image = torch.randn(2, *shape, generator=generator)
    expected = sliding_window_inference(
        image[None], (16, 16, 16), 2, network, overlap=overlap, mode="gaussian"
    )[0]
    parts = [part.clone() for part in sliding_planes(network, image, (16, 16, 16), overlap)]
    assert torch.equal(torch.cat(parts, dim=1), expected)
    if shape[0] > 40:
        assert len(parts) > 1
