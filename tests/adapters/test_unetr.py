"""UNETR on our encoder and on a foreign one, against MONAI's own."""

import pytest
import torch
from foreign import ConvEncoder
from monai.networks.nets import UNETR as MonaiUNETR
from torch import nn

from sammed3d_backbone.adapters.unetr import unetr
from sammed3d_backbone.models.image_encoder import ImageEncoder3D


def make_encoder(**changes):
    sizes = {
        "img_size": 32,
        "patch_size": 16,
        "embed_dim": 24,
        "depth": 12,
        "num_heads": 2,
        "global_attn_indexes": (2, 5, 8, 11),
        "window_size": 3,
        "out_chans": 10,
    }
    torch.manual_seed(0)
    return ImageEncoder3D(**{**sizes, **changes})


class MonaiTokens(nn.Module):
    """MONAI's ViT behind the contract: the hidden states that its UNETR decodes."""

    def __init__(self, vit, hidden_size, img_size):
        super().__init__()
        self.vit, self.embed_dim, self.out_chans = vit, hidden_size, hidden_size
        self.in_chans, self.patch_size, self.depth = 1, 16, 12
        self.img_size = (img_size,) * 3
        self.grid = (img_size // 16,) * 3

    def forward_intermediates(self, x, indices=None, *, intermediates_only=False):
        final, states = self.vit(x)
        maps = [states[i].mT.unflatten(-1, self.grid) for i in indices]
        maps[-1] = final.mT.unflatten(-1, self.grid)
        return maps

    def prune_intermediate_layers(self, indices=None, *, prune_norm=False):
        return list(indices)


def under_our_names(theirs):
    """MONAI's decoder weights with our attribute names."""
    names = {"encoder1": "stem", "out": "out", "vit": "encoder.vit"}
    names.update({f"encoder{stage + 1}": f"skips.{stage - 1}" for stage in (1, 2, 3)})
    names.update({f"decoder{stage + 2}": f"ups.{stage}" for stage in range(4)})
    state = {}
    for name, value in theirs.state_dict().items():
        part, _, rest = name.partition(".")
        state[f"{names[part]}.{rest}"] = value
    return state


@pytest.mark.parametrize("res_block", [True, False])
@pytest.mark.parametrize("conv_block", [True, False])
def test_it_equals_monai_on_the_same_hidden_states_and_weights(generator, conv_block, res_block):
    torch.manual_seed(0)
    theirs = MonaiUNETR(
        in_channels=1,
        out_channels=3,
        img_size=(32, 32, 32),
        feature_size=4,
        hidden_size=24,
        mlp_dim=48,
        num_heads=2,
        conv_block=conv_block,
        res_block=res_block,
    )
    ours = unetr(
        MonaiTokens(theirs.vit, 24, 32),
        3,
        feature_size=4,
        out_indices="monai",
        norm_maps=False,
        conv_block=conv_block,
        res_block=res_block,
    )
    ours.load_state_dict(under_our_names(theirs), strict=True)
    volume = torch.randn(2, 1, 32, 32, 32, generator=generator)
    assert torch.equal(ours(volume), theirs(volume))


@pytest.mark.parametrize(
    ("patch_size", "out_indices", "want"),
    [
        (16, None, (2, 5, 8, 11)),
        (16, "monai", (3, 6, 9, 11)),
        (8, None, (3, 7, 11)),
        (8, "monai", (4, 8, 11)),
        (16, (0, 1, 2, 7), (0, 1, 2, 7)),
    ],
)
def test_taps_count_blocks_from_zero(patch_size, out_indices, want):
    assert (
        unetr(make_encoder(patch_size=patch_size), 2, out_indices=out_indices).out_indices == want
    )


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("patch_size", [8, 16])
def test_every_parameter_gets_a_gradient(generator, patch_size, in_chans):
    network = unetr(make_encoder(patch_size=patch_size, in_chans=in_chans), 3, feature_size=4)
    volume = torch.randn(2, in_chans, 32, 32, 32, generator=generator)
    logits = network(volume)
    assert logits.shape == (2, 3, 32, 32, 32)
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_blocks_behind_the_last_tap_and_an_unread_neck_are_dropped():
    network = unetr(make_encoder(), 2, out_indices=(0, 1, 2, 7))
    assert network.encoder.depth == 8
    assert not [name for name, _ in network.named_parameters() if "neck" in name]


def test_each_tap_has_a_norm_of_its_own_that_makes_its_scale_irrelevant(generator):
    class Loud(ConvEncoder):
        loudness = 1.0

        def forward_intermediates(self, x, indices=None, *, intermediates_only=False):
            maps = super().forward_intermediates(x, indices, intermediates_only=True)
            return [tap * self.loudness for tap in maps]

    torch.manual_seed(0)
    network = unetr(Loud(), 2, feature_size=4)
    volume = torch.randn(1, 1, 16, 16, 16, generator=generator)
    quiet = network(volume)
    network.encoder.loudness = 100.0
    torch.testing.assert_close(network(volume), quiet, rtol=1e-3, atol=1e-4)
    assert len({id(norm.weight) for norm in network.tap_norms}) == 3


def test_a_foreign_encoder_is_decoded(generator):
    network = unetr(ConvEncoder(patch_size=8, in_chans=2), 4)
    assert network(torch.randn(1, 2, 16, 16, 16, generator=generator)).shape == (1, 4, 16, 16, 16)


def test_depth_groups_and_weight_decay_see_the_encoder_under_its_new_name():
    from timm.models import group_parameters

    network = unetr(make_encoder(), 2)
    layers = group_parameters(network, network.group_matcher(), reverse=True)
    assert layers["encoder.pos_embed"] == layers["encoder.patch_embed.proj.weight"] == 0
    assert layers["encoder.blocks.0.norm1.weight"] == 1
    assert layers["encoder.blocks.11.norm1.weight"] == 12
    assert layers["stem.layer.conv1.conv.weight"] > 12
    assert layers["tap_norms.0.weight"] > 12
    assert network.no_weight_decay() <= {name for name, _ in network.named_parameters()}
    assert "encoder.pos_embed" in network.no_weight_decay()


def test_recomputing_blocks_keeps_less_and_gives_the_same_gradients(generator):
    network = unetr(make_encoder(img_size=16, patch_size=8), 2, feature_size=4)
    volume = torch.randn(1, 1, *network.encoder.img_size, generator=generator)

    def step():
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(volume).square().mean()
        network.zero_grad()
        loss.backward()
        return sum(kept.values()), [p.grad.clone() for p in network.parameters()]

    whole, gradients = step()
    network.set_grad_checkpointing()
    assert network.encoder.grad_checkpointing
    less, recomputed = step()
    assert less < whole / 2
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"out_channels": 0}, "out_channels=0"),
        (
            {"out_indices": (1, 2, 3)},
            "expected 4 ascending",
        ),
        ({"out_indices": (1, 2, 3, 12)}, "out_indices="),
        ({"out_indices": (3, 2, 5, 11)}, "ascending"),
    ],
    ids=["no-class", "too-few", "too-deep", "order"],
)
def test_what_does_not_fit_is_refused_with_the_remedy(arguments, remedy):
    with pytest.raises(ValueError, match=remedy):
        unetr(make_encoder(), **{"out_channels": 2, **arguments})
