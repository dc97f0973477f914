"""Learning rates per layer and per step."""

import pytest
import torch
from torch import nn

from sammed3d_backbone import encoder, sam
from sammed3d_backbone.adapters.unetr import unetr
from sammed3d_backbone.training import optim


@pytest.fixture(scope="module")
def network():
    return unetr(encoder("tiny", pretrained=False, img_size=16), 3, feature_size=4)


def lr_of(optimizer, parameter):
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group["lr"]


def test_block_0_is_slower_than_the_last_block_and_the_decoder(network):
    optimizer = optim.layer_decayed(network, layer_decay=0.75)
    optim.set_lr(optimizer, 1e-3)
    first = lr_of(optimizer, network.encoder.blocks[0].attn.qkv.weight)
    second = lr_of(optimizer, network.encoder.blocks[1].attn.qkv.weight)
    last = lr_of(optimizer, network.encoder.blocks[-1].attn.qkv.weight)
    head = lr_of(optimizer, next(network.out.parameters()))
    patch = lr_of(optimizer, network.encoder.patch_embed.proj.weight)
    assert patch < first < second < last < head == 1e-3
    assert first / second == pytest.approx(0.75)


def test_the_factors_hold_in_every_step(network):
    optimizer = optim.layer_decayed(network, layer_decay=0.75)
    optim.set_lr(optimizer, 1e-3)
    ratio = {id(g["params"][0]): g["lr"] / 1e-3 for g in optimizer.param_groups}
    optim.set_lr(optimizer, 5e-5)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(5e-5 * ratio[id(group["params"][0])])


def test_every_trainable_parameter_is_in_one_group(network):
    for layer_decay in (1.0, 0.75):
        optimizer = optim.layer_decayed(network, layer_decay=layer_decay)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held)) == len(list(network.parameters()))


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_positions_norms_and_biases_do_not_decay(network, layer_decay):
    optimizer = optim.layer_decayed(network, layer_decay=layer_decay, weight_decay=0.1)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in decayed}
    assert "encoder.blocks.0.attn.qkv.weight" in names
    assert not [n for n in names if n.endswith("bias") or "rel_pos" in n or "pos_embed" in n]


def test_the_groups_are_described_by_rate_decay_size_and_names(network):
    optimizer = optim.layer_decayed(network, layer_decay=0.5, weight_decay=0.1)
    head, *rows = optim.describe(network, optimizer, 1e-3).splitlines()
    assert head.split() == ["lr", "decay", "tensors", "parameters", "layers"]
    assert len(rows) == len(optimizer.param_groups)
    (row,) = [row.split() for row in rows if "blocks.3" in row and " 0.1 " in row]
    block = network.encoder.blocks[3]
    weights = [
        block.attn.qkv.weight,
        block.attn.proj.weight,
        *(p for p in block.mlp.parameters() if p.ndim > 1),
    ]
    numbers = sum(p.numel() for p in weights)
    optim.set_lr(optimizer, 1e-3)
    rate = lr_of(optimizer, weights[0])
    assert row == [f"{rate:.2e}", "0.1", "4", f"{numbers:,}", "encoder.blocks.3.*"]
    assert sum(int(row.split()[2]) for row in rows) == len(list(network.parameters()))
    assert "encoder.pos_embed, encoder.patch_embed.proj.bias" in rows[0]


def test_a_frozen_parameter_is_left_out():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    optimizer = optim.layer_decayed(model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_layer_decay_of_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="pass layer_decay=1"):
        optim.layer_decayed(nn.Linear(2, 2), layer_decay=0.9)


def test_warm_up_rises_in_a_line_and_the_cosine_ends_near_zero():
    factors = [optim.warmup_cosine(step, 100, 4) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[52] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-3
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_a_run_shorter_than_its_warm_up_is_defined():
    assert [optim.warmup_cosine(step, 2, 4) for step in range(2)] == pytest.approx([0.2, 0.4])


def test_no_step_divides_by_zero():
    assert torch.isfinite(torch.tensor(optim.warmup_cosine(5, 5, 5)))


def test_each_part_learns_at_its_own_rate_and_embeddings_do_not_decay():
    network = sam("tiny", pretrained=False, img_size=16)
    scales = {"image_encoder": 1.0, "prompt_encoder": 0.1, "mask_decoder": 0.5}
    optimizer = optim.part_scaled(network, scales, weight_decay=0.05)
    optim.set_lr(optimizer, 2e-3)
    decoder = network.mask_decoder
    assert lr_of(optimizer, network.image_encoder.pos_embed) == 2e-3
    assert lr_of(optimizer, network.prompt_encoder.not_a_point_embed.weight) == pytest.approx(2e-4)
    assert lr_of(optimizer, decoder.mask_tokens.weight) == 1e-3
    still = {id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    assert id(decoder.mask_tokens.weight) in still
    assert id(decoder.iou_prediction_head.layers[0].weight) not in still
    assert id(network.image_encoder.pos_embed) in still
