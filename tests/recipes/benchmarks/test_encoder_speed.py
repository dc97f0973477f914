"""The benchmark of the encoder."""

import pytest
import torch
from sammed3d_backbone.recipes.benchmarks import encoder_speed as benchmark
from torch.utils.flop_counter import FlopCounterMode


def test_the_listed_matrix_products_are_the_forward_pass():
    with torch.device("meta"):
        network = benchmark.ours()
        x = torch.zeros(1, 1, benchmark.SIDE, benchmark.SIDE, benchmark.SIDE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    listed = sum(
        2 * count * b * rows * inner * columns
        for _, count, (b, rows, inner, columns) in benchmark.matrix_products()
    )
    convolution = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    # Relative positions are matrix products too: one per cent of the work, not on the list.
    assert counter.get_total_flops() == pytest.approx(listed + convolution, rel=0.02)


def test_actions_run_in_turn_and_the_first_round_is_not_counted():
    seen = []
    times = benchmark.in_turn({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert seen == ["a", "b"] * 3
    assert len(times["a"]["all_s"]) == 2


def test_every_part_of_the_decoder_is_timed(generator):
    from sammed3d_backbone.adapters.unetr import unetr
    from sammed3d_backbone.models.image_encoder import ImageEncoder3D

    encoder = ImageEncoder3D(
        img_size=16, patch_size=8, embed_dim=8, depth=3, num_heads=2, global_attn_indexes=(2,)
    )
    network = unetr(encoder, 2, feature_size=4)
    volume = torch.randn(1, 1, 16, 16, 16, generator=generator)
    parts = benchmark.where_the_time_goes(network, volume, runs=1)
    assert len(parts) == 1 + 1 + 2 + 3 + 1  # encoder, stem, skips, ups, class logits
    assert all(seconds > 0 for seconds in parts.values())
