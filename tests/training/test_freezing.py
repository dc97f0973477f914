"""Frozen parts of networks."""

import copy

import pytest
import torch
from torch import nn

from sammed3d_backbone import encoder
from sammed3d_backbone.adapters.unetr import unetr
from sammed3d_backbone.training import optim
from sammed3d_backbone.training.freezing import set_frozen


@pytest.fixture
def network():
    torch.manual_seed(0)
    return unetr(
        encoder("tiny", pretrained=False, img_size=16, drop_path_rate=0.5), 2, feature_size=4
    )


def trains(network):
    """The modules in training mode, by part."""
    return {
        "encoder": any(module.training for module in network.encoder.modules()),
        "decoder": network.stem.training,
    }


def test_a_frozen_encoder_stays_in_evaluation_mode_when_the_network_trains(network):
    set_frozen(network.encoder, True)
    assert trains(network.train()) == {"encoder": False, "decoder": True}
    assert not network.encoder.train().training
    assert trains(network.eval().train()) == {"encoder": False, "decoder": True}


def test_a_frozen_encoder_has_no_drop_path(network, generator):
    set_frozen(network.encoder, True)
    network.train()
    x = torch.randn(2, 1, 16, 16, 16, generator=generator)
    (one,), (two,) = (
        network.encoder.forward_intermediates(x, [3], intermediates_only=True) for _ in range(2)
    )
    assert torch.equal(one, two)


def test_a_frozen_encoder_is_out_of_the_optimiser_and_gets_no_gradient(network, generator):
    set_frozen(network.encoder, True)
    optimizer = optim.layer_decayed(network, layer_decay=0.75)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in network.encoder.parameters()}
    assert held == {id(p) for p in network.parameters() if p.requires_grad}
    network(torch.randn(1, 1, 16, 16, 16, generator=generator)).square().mean().backward()
    assert {p.grad is None for p in network.encoder.parameters()} == {True}
    assert {id(p) for p in network.parameters() if p.grad is not None} == held


def test_a_part_that_waited_trains_like_the_rest(network):
    set_frozen(network.encoder, True)
    set_frozen(network.encoder, False)
    assert all(module.training for module in network.encoder.modules())
    assert all(p.requires_grad for p in network.parameters())
    network.eval()
    assert trains(network) == {"encoder": False, "decoder": False}


def test_saying_it_again_changes_nothing(network):
    network.eval()
    set_frozen(network.encoder, False)
    assert not network.encoder.training  # as it was
    set_frozen(network.encoder, True)
    set_frozen(network.encoder, True)
    set_frozen(network.encoder, False)
    assert network.encoder.training


def test_a_copy_of_a_frozen_part_is_frozen_on_its_own(network):
    set_frozen(network.encoder, True)
    copied = copy.deepcopy(network)
    set_frozen(network.encoder, False)
    assert trains(copied.train()) == {"encoder": False, "decoder": True}
    assert not any(p.requires_grad for p in copied.encoder.parameters())


def test_what_had_no_gradient_has_no_moments_and_no_decay():
    """The optimiser skips a part without gradients."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = optim.layer_decayed(model, weight_decay=0.5)
    optim.set_lr(optimizer, 1e-1)
    before = model[0].weight.clone()
    set_frozen(model[0], True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert model[0].weight not in optimizer.state
    assert model[1].weight in optimizer.state
