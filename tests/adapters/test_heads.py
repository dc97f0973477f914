"""Heads that read tokens only."""

import pytest
import torch
from foreign import ConvEncoder

from sammed3d_backbone.adapters.heads import expanding_head, linear_head


@pytest.mark.parametrize("head", [linear_head, expanding_head])
@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_a_head_gives_logits_of_every_voxel(patch_size, head, generator):
    network = head(ConvEncoder(patch_size, in_chans=2, img_size=32), 3)
    volume = torch.randn(2, 2, 32, 32, 32, generator=generator)
    assert network(volume).shape == (2, 3, 32, 32, 32)


def test_the_linear_head_is_as_small_as_can_be():
    network = linear_head(ConvEncoder(embed_dim=12), 3)
    assert sum(p.numel() for p in network.head.parameters()) == 12 * 3 + 3


def test_an_expanded_token_depends_on_no_other_token(generator):
    network = expanding_head(ConvEncoder(patch_size=8, embed_dim=12), 2, feature_size=4)
    tokens = torch.randn(1, 12, 3, 3, 3, generator=generator)
    others = torch.randn(1, 12, 3, 3, 3, generator=generator)
    others[..., 1, 1, 1] = tokens[..., 1, 1, 1]
    middle = (..., *[slice(8, 16)] * 3)
    torch.testing.assert_close(network.head(tokens)[middle], network.head(others)[middle])


@pytest.mark.parametrize("head", [linear_head, expanding_head])
def test_no_class_is_refused(head):
    with pytest.raises(ValueError, match="out_channels"):
        head(ConvEncoder(), 0)
