"""Control encoders."""

import torch

from sammed3d_backbone import encoder
from sammed3d_backbone.adapters.controls import ZeroedEncoder
from sammed3d_backbone.adapters.unetr import unetr


def test_the_zeroed_encoder_has_no_parameters_and_says_nothing(generator):
    zeroed = ZeroedEncoder(encoder("tiny", pretrained=False, img_size=16))
    model = unetr(zeroed, 3, feature_size=4)
    assert list(model.encoder.parameters()) == []
    final, maps = model.encoder.forward_intermediates(torch.ones(2, 1, 16, 16, 16), [0, 3])
    assert [tuple(m.shape) for m in (final, *maps)] == [(2, 128, 2, 2, 2)] + 2 * [(2, 192, 2, 2, 2)]
    assert not any(m.any() for m in (final, *maps))
    loss = model(torch.randn(2, 1, 16, 16, 16, generator=generator)).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
