"""The SegResNetDS-style decoder and its deep supervision."""

import pytest
import torch
from foreign import ConvEncoder

from sammed3d_backbone.adapters.segresnet import segresnet


def test_training_gives_logits_at_several_resolutions_and_evaluation_one(generator):
    network = segresnet(ConvEncoder(), 3, feature_size=4)
    volume = torch.randn(2, 1, 16, 16, 16, generator=generator)
    outputs = network.train()(volume)
    assert [tuple(out.shape) for out in outputs] == [(2, 3, n, n, n) for n in (16, 8, 4, 2)]
    assert torch.equal(network.eval()(volume), outputs[0])


def test_without_deep_supervision_training_gives_one_tensor_too(generator):
    network = segresnet(ConvEncoder(), 3, feature_size=4, dsdepth=1)
    volume = torch.randn(2, 1, 16, 16, 16, generator=generator)
    assert network.train()(volume).shape == (2, 3, 16, 16, 16)


@pytest.mark.parametrize("dsdepth", [0, 5])
def test_a_depth_that_is_not_there_is_refused(dsdepth):
    with pytest.raises(ValueError, match=r"give 1 \(full resolution only\) to 4"):
        segresnet(ConvEncoder(), 3, dsdepth=dsdepth)


def test_no_class_is_refused():
    with pytest.raises(ValueError, match="out_channels"):
        segresnet(ConvEncoder(), 0)
