"""The encoder is what timm's and peft's wrappers expect, held against the installed libraries."""

import copy

import pytest
import torch
from timm.layers import Format
from timm.models._features import FeatureGetterNet
from torch import nn

from sammed3d_backbone import encoder, list_variants
from sammed3d_backbone.models.attention import Attention
from sammed3d_backbone.models.image_encoder import ImageEncoder3D


def small(**changes):
    sizes = {
        "img_size": 24,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 2,
        "global_attn_indexes": (1, 3),
        "window_size": 4,
        "out_chans": 10,
    }
    return ImageEncoder3D(**sizes | changes).eval()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", list_variants())
def test_feature_getter_runs_every_variant(name, norm):
    with torch.device("meta"):
        network = encoder(name, pretrained=False)
        getter = FeatureGetterNet(network, out_indices=(0, -1), norm=norm)
        maps = getter(torch.empty(1, 1, *network.img_size))
    channels = getter.feature_info.channels()
    assert channels == [network.num_features] * 2
    grid = tuple(n // network.patch_size for n in network.img_size)
    assert [tuple(m.shape) for m in maps] == [(1, c, *grid) for c in channels]
    assert isinstance(network.neck, nn.Identity) is not norm


def test_arguments_may_be_positional_in_timms_order():
    network, volume = small(), torch.randn(1, 1, 24, 24, 24)
    (named,) = network.forward_intermediates(
        volume, indices=[1], norm=True, output_fmt=Format.NCHW, intermediates_only=True
    )
    (placed,) = network.forward_intermediates(volume, [1], True, False, "NCHW", True)
    assert torch.equal(named, placed)
    with pytest.raises(ValueError, match="output_fmt"):
        network.forward_intermediates(volume, output_fmt="NLC")
    assert network.prune_intermediate_layers([1], True, True) == [1]


def test_hooks_on_every_linear_layer_and_the_patch_projection_fire():
    network, seen = small(), set()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            module.register_forward_hook(lambda *_, name=name: seen.add(name))
    network(torch.randn(1, 1, 24, 24, 24))
    assert {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj", "neck.0"} <= seen


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config"])
def test_peft_adapters_equal_their_merged_network_on_padded_windows(kind, generator):
    import peft

    network = small()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    config = {
        "LoraConfig": {"r": 2, "target_modules": ["qkv", "proj"], "init_lora_weights": False},
        "IA3Config": {"target_modules": ["qkv"], "feedforward_modules": []},
    }[kind]
    adapted = peft.inject_adapter_in_model(getattr(peft, kind)(**config), network)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    volume = torch.randn(1, 1, 24, 24, 24, generator=generator)
    merged = copy.deepcopy(adapted)
    for module in merged.modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
    attention = [m for m in adapted.modules() if isinstance(m, Attention)]
    assert any(m.window_size for m in attention)
    with torch.no_grad():
        torch.testing.assert_close(adapted(volume), merged(volume), rtol=1e-4, atol=1e-4)
