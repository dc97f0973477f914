"""Several input channels with an encoder of one channel."""

import pytest
import torch
from foreign import ConvEncoder
from torch import nn

from sammed3d_backbone import encoder
from sammed3d_backbone.adapters.channels import SharedEncoder
from sammed3d_backbone.adapters.contract import check_encoder
from sammed3d_backbone.adapters.unetr import unetr

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def inner():
    torch.manual_seed(0)
    return encoder("tiny", pretrained=False, img_size=16).eval()


@pytest.fixture
def volume(generator):
    return torch.randn(2, 3, 16, 16, 16, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
def test_it_fulfils_the_contract(inner, channels):
    check_encoder(SharedEncoder(inner, channels))


def test_a_foreign_encoder_can_be_shared(volume):
    shared = SharedEncoder(ConvEncoder(), 3)
    check_encoder(shared)
    assert unetr(shared, 2, feature_size=4)(volume).shape == (2, 2, 16, 16, 16)


def test_at_first_the_maps_are_the_means_of_the_channels(inner, volume):
    final, (tap,) = SharedEncoder(inner, 3).forward_intermediates(volume, [2])
    alone = [inner.forward_intermediates(volume[:, c : c + 1], [2]) for c in range(3)]
    torch.testing.assert_close(final, torch.stack([f for f, _ in alone]).mean(0), **CLOSE)
    torch.testing.assert_close(tap, torch.stack([m for _, (m,) in alone]).mean(0), **CLOSE)


def test_a_missing_channel_leaves_the_mean_of_the_others(inner, volume):
    volume[0, 1] = 0
    (got,) = SharedEncoder(inner, 3).forward_intermediates(volume, [2], intermediates_only=True)
    alone = [
        inner.forward_intermediates(volume[:, c : c + 1], [2], intermediates_only=True)[0]
        for c in range(3)
    ]
    torch.testing.assert_close(got[0], (alone[0][0] + alone[2][0]) / 2, **CLOSE)
    torch.testing.assert_close(got[1], sum(m[1] for m in alone) / 3, **CLOSE)


def test_a_merge_that_has_learned_hears_nothing_of_a_missing_channel(inner, volume):
    shared = SharedEncoder(inner, 3)
    nn.init.normal_(shared.merges["2"].mix.weight)
    volume[:, 1] = 0
    want = shared.forward_intermediates(volume, [2], intermediates_only=True)[0]
    width = inner.embed_dim
    nn.init.normal_(shared.merges["2"].mix.weight.data[:, width : 2 * width])
    assert torch.equal(shared.forward_intermediates(volume, [2], intermediates_only=True)[0], want)


def test_a_volume_without_anything_is_a_volume_all_the_same(inner):
    shared = SharedEncoder(inner, 2)
    final, _ = shared.forward_intermediates(torch.zeros(1, 2, 16, 16, 16))
    torch.testing.assert_close(final, inner(torch.zeros(1, 1, 16, 16, 16)), **CLOSE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decoder_reaches_all_of_it(inner, volume, checkpointing):
    model = unetr(SharedEncoder(inner, 3), 2, feature_size=4)
    model.set_grad_checkpointing(checkpointing)
    model(volume).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert "encoder.encoder.pos_embed" in model.no_weight_decay()


def test_merges_of_blocks_that_nobody_reads_are_gone(inner):
    shared = SharedEncoder(inner, 2)
    assert shared.prune_intermediate_layers([1, 3], prune_norm=True) == [1, 3]
    assert list(shared.merges) == ["1", "3"]
    assert shared.depth == 4
    with pytest.raises(ValueError, match="read some of 1, 3"):
        shared.forward_intermediates(torch.zeros(1, 2, 16, 16, 16), [2], intermediates_only=True)


@pytest.mark.parametrize("channels", [0, 2])
def test_what_cannot_be_shared_is_refused(channels):
    with pytest.raises(ValueError, match="built with in_chans=1"):
        SharedEncoder(ConvEncoder(in_chans=1 if channels == 0 else 2), channels)


def test_other_channels_than_promised_are_refused(inner):
    with pytest.raises(ValueError, match="zeros for one that is missing"):
        SharedEncoder(inner, 2).forward_intermediates(torch.zeros(1, 3, 16, 16, 16))
