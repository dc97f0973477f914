"""Random initialisation."""

from dataclasses import replace

import pytest
import torch

from sammed3d_backbone import encoder, sam
from sammed3d_backbone.loading.variants import VARIANTS
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.pretraining.init import init_weights, warm_up_decoder


def test_places_are_told_apart_and_linear_layers_keep_the_scale():
    torch.manual_seed(0)
    network = sam("tiny", pretrained=False, img_size=16)
    init_weights(network)
    table = network.image_encoder.pos_embed.detach().flatten(0, 3)  # (8, E)
    assert torch.unique(table, dim=0).shape == table.shape
    assert 0.9 < float(table.abs().max()) <= 1
    layer = network.image_encoder.blocks[3].mlp.lin1
    bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
    assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound
    assert not layer.bias.any()
    stem = network.image_encoder.patch_embed.proj
    assert float(stem.weight.detach().abs().max()) <= (6 / (8**3 + 192)) ** 0.5


def test_a_click_attends_to_its_own_place_before_any_training():
    torch.manual_seed(0)
    network = sam("tiny", pretrained=False)
    init_weights(network)
    code = network.prompt_encoder.get_dense_pe().flatten(2)[0].T  # (N, F)
    for layer in network.mask_decoder.transformer.layers:
        attention = layer.cross_attn_token_to_image
        scores = attention.q_proj(code) @ attention.k_proj(code).T  # (N, N)
        assert (scores.argmax(1) == torch.arange(len(code))).float().mean() > 0.99


def plain():
    """A network whose masks follow from the clicks alone, for images without content."""
    sizes = replace(VARIANTS["nano"].decoder, high_resolution=False)
    return Sam3D.around(encoder("nano", pretrained=False, img_size=32), **vars(sizes))


@pytest.mark.slow
def test_after_the_warm_up_clicks_far_apart_get_masks_apart():
    torch.manual_seed(0)
    network = plain()
    init_weights(network)
    places = torch.tensor([[[6, 6, 6]], [[26, 26, 26]]])
    embedding = torch.zeros(1, 64, 4, 4, 4)

    def favour():
        """How far each click's own place is above that of the other, in logits."""
        with torch.no_grad():
            one, other = network.decode(embedding, (places, torch.ones(2, 1)))[:, 0]
        here, there = (3, 3, 3), (13, 13, 13)
        return float(min(one[here] - one[there], other[there] - other[here]))

    before = favour()
    soft_dice = warm_up_decoder(network, 200)
    assert favour() > max(1.0, 5 * before)
    assert soft_dice > 0.1
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.slow
def test_the_warm_up_needs_the_initialisation():
    learned = []
    for start in (lambda _: None, init_weights):
        torch.manual_seed(0)
        network = plain()
        start(network)
        learned.append(warm_up_decoder(network, 200))
    without, after = learned
    assert without < 0.08
    assert after > 2 * without
