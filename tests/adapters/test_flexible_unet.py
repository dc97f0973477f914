"""MONAI's FlexibleUNet on an encoder, built by us and by MONAI."""

import pytest
import torch
from foreign import ConvEncoder
from monai.networks.nets import FlexibleUNet as MonaiFlexibleUNet
from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE

from sammed3d_backbone.adapters.flexible_unet import (
    decoder_channels,
    flexible_unet,
    register_backbones,
)
from sammed3d_backbone.adapters.pyramid import KINDS


@pytest.fixture
def names(monkeypatch):
    """Registers our backbones with MONAI during a test."""
    monkeypatch.setattr(FLEXUNET_BACKBONE, "register_dict", {**FLEXUNET_BACKBONE.register_dict})
    return register_backbones(
        lambda in_channels, pretrained: ConvEncoder(in_chans=in_channels, depth=6 - pretrained),
        prefix="conv",
        feature_size=4,
    )


def built_by_monai(name, **arguments):
    given = {"in_channels": 2, "out_channels": 3, "spatial_dims": 3, "upsample": "deconv"}
    given |= {"norm": "instance", "decoder_channels": decoder_channels(4)}
    return MonaiFlexibleUNet(backbone=name, **given | arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_equals_monais_own_built_by_name(kind, names, generator):
    assert names[kind] == f"conv-{kind}"
    theirs = built_by_monai(names[kind])
    ours = flexible_unet(ConvEncoder(in_chans=2), 3, kind, feature_size=4)
    state = {}
    for name, value in theirs.state_dict().items():  # what MONAI calls encoder is the pyramid
        state[name.removeprefix("encoder.")] = value
    ours.load_state_dict(state, strict=True)
    volume = torch.randn(2, 2, 16, 16, 16, generator=generator)
    assert torch.equal(ours(volume), theirs(volume))


def test_a_network_built_by_name_leaves_nothing_to_the_next(names):
    deep = built_by_monai(names["simple"], in_channels=2, pretrained=False)
    shallow = built_by_monai(names["simple"], in_channels=1, pretrained=True)
    assert (deep.encoder.encoder.in_chans, deep.encoder.encoder.depth) == (2, 6)
    assert (shallow.encoder.encoder.in_chans, shallow.encoder.encoder.depth) == (1, 5)
    parameters = [FLEXUNET_BACKBONE.register_dict[name]["parameter"] for name in names.values()]
    assert [p["kind"] for p in parameters] == list(KINDS)
    assert [p["pretrained"] for p in parameters] == [True, None, None]
    register_backbones(lambda *_: ConvEncoder(), prefix="conv")
    assert FLEXUNET_BACKBONE.register_dict[names["simple"]]["parameter"]["pretrained"] is None


def test_a_two_dimensional_network_is_refused(names):
    with pytest.raises(ValueError, match="the encoder is 3-D, pass 3"):
        built_by_monai(names["simple"], spatial_dims=2)


def test_no_class_is_refused():
    with pytest.raises(ValueError, match="out_channels"):
        flexible_unet(ConvEncoder(), 0)
