"""The encoder contract, for every variant and for a foreign encoder."""

import pytest
import torch
from foreign import ConvEncoder
from torch import nn

from sammed3d_backbone.adapters.contract import check_encoder
from sammed3d_backbone.adapters.registry import ADAPTERS, adapter
from sammed3d_backbone.loading.variants import VARIANTS
from sammed3d_backbone.models.image_encoder import ImageEncoder3D


def reduced(name, rel_pos="sammed3d"):
    """A variant with its wiring and its number of blocks, at a fraction of its width and input."""
    sizes = VARIANTS[name].encoder_sizes()
    heads = 2
    return ImageEncoder3D(
        **{
            **sizes,
            "embed_dim": 8 * heads,
            "num_heads": heads,
            "out_chans": 6,
            "img_size": 2 * sizes["patch_size"],
        },
        rel_pos=rel_pos,
    )


@pytest.mark.parametrize("rel_pos", ["sammed3d", "axial"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_fulfils_the_contract(name, rel_pos):
    check_encoder(reduced(name, rel_pos))


def test_a_foreign_encoder_fulfils_the_contract():
    check_encoder(ConvEncoder())


def test_checking_leaves_the_encoder_as_it_is():
    encoder = ConvEncoder().train()
    encoder.stem.eval()
    encoder.stem.weight.requires_grad_(False)
    check_encoder(encoder)
    assert encoder.training
    assert not encoder.stem.training
    assert not encoder.stem.weight.requires_grad
    assert encoder.depth == 6
    assert all(p.grad is None for p in encoder.parameters())


def test_a_pattern_that_is_not_anchored_is_told():
    class Loose(ConvEncoder):
        def group_matcher(self, coarse=False):
            return {"stem": "^stem|final", "blocks": [(r"^blocks\.(\d+)", None)]}

    with pytest.raises(ValueError, match=r"begin each alternative with \^"):
        check_encoder(Loose())


def test_pruning_that_leaves_idle_parameters_is_told():
    class Hoarder(ConvEncoder):
        def prune_intermediate_layers(self, indices=None, *, prune_norm=False):
            return list(indices)

    with pytest.raises(ValueError, match="remove there what the chosen maps do not need"):
        check_encoder(Hoarder())


def test_what_makes_only_maps_that_are_not_read_is_told_too():
    class Scaled(ConvEncoder):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))  # scale of the first block's map

        def forward_intermediates(self, x, indices=None, *, intermediates_only=False):
            found = super().forward_intermediates(x, indices, intermediates_only=intermediates_only)
            maps = found if intermediates_only else found[1]
            if indices is None or 0 in indices:
                maps[0] = maps[0] * self.scale
            return found

    with pytest.raises(ValueError, match=r"layers\(\[5\].* 1 parameters get no gradient, scale"):
        check_encoder(Scaled())


def test_a_missing_name_is_named():
    with pytest.raises(TypeError, match=r"Identity lacks .*'forward_intermediates'.*contract"):
        check_encoder(nn.Identity())


def test_a_patch_that_is_no_power_of_two_says_why():
    encoder = ConvEncoder(patch_size=6, img_size=12)
    with pytest.raises(ValueError, match="patch_size has to be a power of two"):
        check_encoder(encoder)


def test_channels_that_are_not_the_promised_ones_name_the_attribute():
    encoder = ConvEncoder()
    encoder.out_chans = 7
    with pytest.raises(ValueError, match="set out_chans to what comes out"):
        check_encoder(encoder)


def test_a_missing_map_is_told():
    class Forgetful(ConvEncoder):
        def forward_intermediates(self, x, indices=None, *, intermediates_only=False):
            final, maps = super().forward_intermediates(x, indices)
            return maps[:-1] if intermediates_only else (final, maps[:-1])

    with pytest.raises(ValueError, match="return one for every index"):
        check_encoder(Forgetful())


def test_a_norm_over_the_batch_is_told():
    class Batchwise(ConvEncoder):
        def forward_intermediates(self, x, indices=None, *, intermediates_only=False):
            shifted = x - x.mean(0, keepdim=True)
            return super().forward_intermediates(
                shifted, indices, intermediates_only=intermediates_only
            )

    with pytest.raises(ValueError, match="replace norms over the batch"):
        check_encoder(Batchwise())


def test_weights_that_are_not_finite_are_told():
    encoder = ConvEncoder()
    nn.init.constant_(encoder.blocks[0].bias, float("nan"))
    with pytest.raises(ValueError, match="check its weights"):
        check_encoder(encoder)


def test_the_check_runs_where_the_parameters_are():
    with torch.device("meta"):
        encoder = ConvEncoder()
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        check_encoder(encoder)


@pytest.mark.parametrize("network", ADAPTERS)
@pytest.mark.parametrize("given", [None, "tiny", nn.Linear(2, 2)], ids=["none", "name", "layer"])
def test_every_network_refuses_what_is_not_an_encoder(network, given):
    with pytest.raises(TypeError, match=r"lacks .*encoder\("):
        adapter(network)(given, 3)


@pytest.mark.parametrize("network", ADAPTERS)
@pytest.mark.parametrize("classes", ["3", None, 2.5, True, [3], float("nan"), 0, 10**7])
def test_every_network_refuses_a_number_of_classes_that_is_none(network, classes):
    with pytest.raises(ValueError, match=r"out_channels=.*whole number"):
        adapter(network)(ConvEncoder(), classes)


@pytest.mark.parametrize("network", ["unetr", "segresnet", "flexible_unet", "expanding_head"])
@pytest.mark.parametrize("size", ["16", 2.5, 0])
def test_every_network_refuses_a_number_of_channels_that_is_none(network, size):
    with pytest.raises(ValueError, match="feature_size="):
        adapter(network)(ConvEncoder(), 3, feature_size=size)


@pytest.mark.parametrize("network", ["unetr", "segresnet", "flexible_unet"])
@pytest.mark.parametrize("indices", ["x", 3, ["0"], [0.5], []])
def test_every_network_refuses_indices_that_are_no_block_numbers(network, indices):
    with pytest.raises(ValueError, match="out_indices="):
        adapter(network)(ConvEncoder(), 3, out_indices=indices)
