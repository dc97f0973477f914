"""LoRA on the blocks' linear layers: trainable parameters, effect, and merging."""

import copy
import sys

import pytest
import torch
from foreign import ConvEncoder

from sammed3d_backbone import encoder
from sammed3d_backbone.adapters.lora import add_lora, merge_lora
from sammed3d_backbone.adapters.unetr import unetr
from sammed3d_backbone.models.layers import MLP

RANK = 2


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return encoder("tiny", pretrained=False, img_size=16).eval()


@pytest.fixture
def volume(generator):
    return torch.randn(2, 1, 16, 16, 16, generator=generator)


def with_lora(plain, *, learned):
    """A copy with LoRA, with updates of zero or, as after some steps, random ones."""
    network = copy.deepcopy(plain)
    add_lora(network, rank=RANK)
    if learned:
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return network


def test_before_the_first_step_it_changes_nothing(plain, volume):
    assert torch.equal(with_lora(plain, learned=False)(volume), plain(volume))


def test_four_layers_of_every_block_learn_and_nothing_else_does(plain):
    network = with_lora(plain, learned=False)
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0] for name in learning} == {
        f"blocks.{i}.{layer}"
        for i in range(plain.depth)
        for layer in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
    }
    width = plain.embed_dim
    numbers = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert numbers == plain.depth * RANK * ((1 + 3) + (1 + 1) + 2 * (1 + 4)) * width


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"])
def test_what_each_layer_learns_reaches_the_output(plain, volume, layer):
    network = with_lora(plain, learned=False)
    torch.nn.init.normal_(network.get_submodule(f"blocks.0.{layer}").lora_B["default"].weight)
    assert not torch.allclose(network(volume), plain(volume), atol=1e-3)


def test_merged_it_is_the_plain_network_that_gives_the_same(plain, volume):
    network = with_lora(plain, learned=True).double()
    single = merge_lora(network)
    assert {n: t.shape for n, t in single.state_dict().items()} == {
        n: t.shape for n, t in plain.state_dict().items()
    }
    torch.testing.assert_close(single(volume.double()), network(volume.double()))
    assert any("lora" in name for name in network.state_dict())  # is as it was


def test_merged_weights_are_the_old_ones_plus_the_product(plain):
    network = with_lora(plain, learned=True)
    layer = network.blocks[1].attn.qkv
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    want = plain.blocks[1].attn.qkv.weight + product
    torch.testing.assert_close(
        merge_lora(network).blocks[1].attn.qkv.weight, want, rtol=0, atol=1e-7
    )


def test_without_lora_merging_returns_the_network_itself(plain):
    assert merge_lora(plain) is plain


def test_a_decoder_learns_beside_it(plain, volume):
    add_lora(plain, rank=RANK)
    model = unetr(plain, 2, feature_size=4)
    model(volume).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("network", "names"),
    [(ConvEncoder(), "none"), (MLP(2, 2, 2), r"layers\.0, layers\.1, layers\.2")],
    ids=["without", "others"],
)
def test_a_pattern_that_matches_nothing_says_what_there_is(network, names):
    with pytest.raises(ValueError, match=f"called {names} and so on; give a regular expression"):
        add_lora(network, rank=RANK)


def test_a_rank_of_nothing_is_refused(plain):
    with pytest.raises(ValueError, match="1 or more"):
        add_lora(plain, rank=0)


def test_where_peft_is_missing_it_says_what_to_install(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sammed3d_backbone\[peft\]'"):
        add_lora(plain, rank=RANK)
