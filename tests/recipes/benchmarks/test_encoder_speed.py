"""The measuring scripts count what they say they count, and the README quotes their files."""

import json

import pytest
import torch
from sammed3d_backbone.recipes.benchmarks import click_speed as benchmark_clicks
from sammed3d_backbone.recipes.benchmarks import encoder_speed as benchmark
from sammed3d_backbone.recipes.benchmarks import parity
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


def test_time_is_told_for_every_part_of_the_decoder(generator):
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


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("encoder_speed", benchmark.table),
        ("click_speed", benchmark_clicks.table),
        ("parity", parity.table),
        ("parity", parity.prompt_table),
    ],
    ids=["benchmark", "clicks", "parity", "parity of prompts"],
)
def test_the_readme_shows_the_table_of_the_committed_figures(root, name, table):
    result = json.loads((root / f"recipes/benchmarks/{name}.json").read_text())
    assert table(result) in (root / "README.md").read_text()


def test_the_committed_parity_is_within_the_promised_bounds(root):
    for row in json.loads((root / "recipes/benchmarks/parity.json").read_text())["rows"]:
        outputs, gradients = (5e-6, 1e-4) if row["dtype"] == "float32" else (1e-10, 1e-10)
        assert max(row["block"], row["neck"]) <= outputs
        assert max(row["input gradient"], row["parameter gradient"]) <= gradients


def test_the_committed_parity_of_prompts_is_within_the_promised_bounds(root):
    rows = json.loads((root / "recipes/benchmarks/parity.json").read_text())["prompts"]["rows"]
    # A ReLU whose input is zero within rounding may count on one side only; not so in float64.
    bounds = {"float32": (1e-5, 5e-3), "float64": (1e-10, 1e-10)}
    assert {row["dtype"]: row["sets"] >= 200 for row in rows} == dict.fromkeys(bounds, True)
    for row in rows:
        outputs, gradients = bounds[row["dtype"]]
        errors = {kind: row[kind] for kind in parity.PROMPT_KINDS}
        assert errors.pop("parameter gradient") <= gradients
        assert max(errors.values()) <= outputs, errors
