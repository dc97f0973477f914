"""Random values to begin from."""

import torch

from sammed3d_backbone import sam
from sammed3d_backbone.training.starts import start_afresh


def test_places_are_told_apart_and_linear_layers_keep_the_scale():
    torch.manual_seed(0)
    network = sam("tiny", "none", img_size=16)
    start_afresh(network)
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
    network = sam("tiny", "none")
    start_afresh(network)
    code = network.prompt_encoder.get_dense_pe().flatten(2)[0].T  # (N, F)
    for layer in network.mask_decoder.transformer.layers:
        attention = layer.cross_attn_token_to_image
        scores = attention.q_proj(code) @ attention.k_proj(code).T  # (N, N)
        assert (scores.argmax(1) == torch.arange(len(code))).float().mean() > 0.99
