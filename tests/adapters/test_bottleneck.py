"""Bottlenecks behind the blocks of a frozen encoder."""

import copy

import pytest
import torch
from foreign import ConvEncoder
from torch import nn

from sammed3d_backbone import encoder
from sammed3d_backbone.adapters.bottleneck import Bottleneck, add_bottlenecks
from sammed3d_backbone.adapters.unetr import unetr

WIDTH = 4


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return encoder("tiny", pretrained=False, img_size=16).eval()


@pytest.fixture
def adapted(plain):
    network = copy.deepcopy(plain)
    add_bottlenecks(network, width=WIDTH)
    return network


@pytest.fixture
def volume(generator):
    return torch.randn(2, 1, 16, 16, 16, generator=generator)


def test_before_the_first_step_the_encoder_is_what_it_was(plain, adapted, volume):
    assert torch.equal(adapted(volume), plain(volume))


def test_only_the_bottlenecks_learn_and_all_else_keeps_its_name(plain, adapted):
    new = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(".bottleneck." in name for name in new)
    assert {name for name, _ in adapted.named_parameters()} - new == {
        name for name, _ in plain.named_parameters()
    }
    width = plain.embed_dim
    numbers = 2 * width + (width + 1) * WIDTH + 28 * WIDTH + (WIDTH + 1) * width
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plain.depth * numbers


def test_a_token_hears_of_its_neighbours_on_the_grid_only(generator):
    bottleneck = Bottleneck(8, WIDTH)
    nn.init.normal_(bottleneck.up.weight, generator=generator)
    x = torch.randn(1, 4, 4, 4, 8, generator=generator)
    moved = x.clone()
    moved[0, 0, 0, 0] += torch.randn(8, generator=generator)
    changed = (bottleneck(moved) - bottleneck(x)).abs().amax(-1)[0] > 0
    assert changed.nonzero().amax(0).tolist() == [1, 1, 1]
    assert changed[:2, :2, :2].all()


def test_a_copy_goes_through_its_own_bottlenecks(adapted, volume):
    copied = copy.deepcopy(adapted)
    nn.init.normal_(copied.blocks[0].bottleneck.up.weight)
    before = adapted(volume)
    assert not torch.allclose(copied(volume), before, atol=1e-3)
    assert torch.equal(adapted(volume), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_that_learns_gets_a_gradient(adapted, volume, checkpointing):
    model = unetr(adapted, 2, feature_size=4)
    model.set_grad_checkpointing(checkpointing)
    model(volume).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_width_of_nothing_is_refused(plain):
    with pytest.raises(ValueError, match="1 or more"):
        add_bottlenecks(plain, width=0)


def test_what_has_no_blocks_is_refused():
    network = ConvEncoder()
    network.blocks = None
    with pytest.raises(ValueError, match="before anything is put around it"):
        add_bottlenecks(network, width=WIDTH)
