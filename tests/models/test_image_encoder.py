"""The encoder: parity with the reference, timm's words, sizes, memory and compilers."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sammed3d_backbone.recipes.benchmarks.parity import Case, compare, pair, relative_error
from torch import nn

from sammed3d_backbone.loading.variants import VARIANTS, variant
from sammed3d_backbone.models.image_encoder import (
    ImageEncoder3D,
    resample_patch_filter,
    resample_pos_embed,
)


def make(generator, **changes):
    sizes = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 2,
        "global_attn_indexes": (1, 3),
        "window_size": 6,
        "out_chans": 10,
    }
    encoder = ImageEncoder3D(**{**sizes, **changes})
    for name, parameter in encoder.named_parameters():
        if "pos" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return encoder.eval()


@pytest.fixture
def encoder(generator):
    return make(generator)


@pytest.fixture
def volume(generator):
    return torch.randn(2, 1, 16, 16, 16, generator=generator)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(96, torch.float64, batch=2), id="96", marks=pytest.mark.slow),
        pytest.param(Case(128, torch.float64, batch=2), id="128", marks=pytest.mark.slow),
        pytest.param(Case(160, torch.float64, num_heads=1, embed_dim=16), id="160"),
        pytest.param(
            Case(256, torch.float64, trained_side=256, embed_dim=16, num_heads=1, depth=2),
            id="256-partial-windows",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_encoder_equals_the_reference_in_float64(case):
    errors = compare(case)
    assert max(errors.values()) < 1e-10, errors


def test_the_encoder_equals_the_reference_in_float32_at_full_depth():
    case = Case(
        128, torch.float32, depth=12, global_attn_indexes=(2, 5, 8, 11), embed_dim=96, num_heads=3
    )
    errors = compare(case)
    assert max(errors["neck"], errors["block"]) < 5e-6, errors
    assert max(errors["input gradient"], errors["parameter gradient"]) < 1e-4, errors


@pytest.mark.slow
def test_the_released_size_equals_the_reference_in_float32(generator):
    reference, ours = pair(
        Case(
            128,
            torch.float32,
            depth=12,
            global_attn_indexes=(2, 5, 8, 11),
            embed_dim=768,
            num_heads=12,
            out_chans=384,
        ),
        seed=5,
    )
    volume = torch.randn(1, 1, 128, 128, 128, generator=generator)
    with torch.inference_mode():
        assert relative_error(ours(volume), reference(volume)) < 5e-6


def test_the_names_and_shapes_are_the_released_files(root):
    golden = json.loads((root / "tests/golden/keys_vit_b.json").read_text())
    prefix = "image_encoder."
    wanted = {
        name.removeprefix(prefix): tuple(shape)
        for name, shape in golden.items()
        if name.startswith(prefix)
    }
    with torch.device("meta"):
        ours = ImageEncoder3D(**VARIANTS["vit_b"].encoder_sizes()).state_dict()
    assert {name: tuple(value.shape) for name, value in ours.items()} == wanted
    assert list(ours) == list(wanted)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_b", 92_924_928),
        ("vit_b_256", 28_602_624),
        ("vit_l_256", 315_202_560),
        ("vit_h_256", 644_850_688),
    ],
)
def test_every_size_has_the_references_number_of_parameters(name, count):
    with torch.device("meta"):
        encoder = ImageEncoder3D(**VARIANTS[name].encoder_sizes())
    assert sum(p.numel() for p in encoder.parameters()) == count


def test_an_unknown_variant_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'vit_b'"):
        variant("vitb")


def test_a_batch_of_two_equals_two_batches_of_one(encoder, volume):
    alone = torch.cat([encoder(volume[:1]), encoder(volume[1:])])
    torch.testing.assert_close(encoder(volume), alone, rtol=1e-5, atol=1e-5)


def test_forward_is_the_neck_of_the_last_block(encoder, volume):
    (tokens,) = encoder.forward_intermediates(volume, 1, intermediates_only=True)
    assert tokens.shape == (2, 24, 4, 4, 4)
    assert torch.equal(encoder(volume), encoder.neck(tokens))
    assert torch.equal(encoder.forward_features(volume), encoder(volume))


def test_intermediates_are_the_blocks_outputs_in_their_order(encoder, volume):
    seen = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.movedim(-1, 1)))
    final, maps = encoder.forward_intermediates(volume, indices=[3, -4])
    assert torch.equal(maps[0], seen[0])
    assert torch.equal(maps[1], seen[3])
    assert torch.equal(final, encoder.neck(seen[3]))


def test_intermediates_alone_do_not_run_the_blocks_behind_them(encoder, volume):
    ran = []
    encoder.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    (only,) = encoder.forward_intermediates(volume, indices=[1], intermediates_only=True)
    assert only.shape == (2, 24, 4, 4, 4)
    assert ran == []


def test_intermediates_pass_the_neck_when_asked(encoder, volume):
    (last,) = encoder.forward_intermediates(volume, 1, norm=True, intermediates_only=True)
    assert torch.equal(last, encoder(volume))


def test_all_blocks_are_returned_when_none_are_named(encoder, volume):
    assert len(encoder.forward_intermediates(volume, intermediates_only=True)) == 4


@pytest.mark.parametrize("indices", [0, 5, [4], [-5], []], ids=str)
def test_an_index_without_a_block_says_which_there_are(encoder, volume, indices):
    with pytest.raises(ValueError, match="indices"):
        encoder.forward_intermediates(volume, indices=indices)


def test_feature_info_says_channels_stride_and_module(encoder):
    assert encoder.feature_info[2] == {
        "num_chs": 24,
        "num_chs_norm": 10,
        "reduction": 4,
        "module": "blocks.2",
    }
    assert len(encoder.feature_info) == 4


def test_pruning_keeps_what_the_taps_need(encoder, volume):
    want = encoder.forward_intermediates(volume, indices=[0, 2], intermediates_only=True)
    assert encoder.prune_intermediate_layers([0, 2], prune_norm=True) == [0, 2]
    got = encoder.forward_intermediates(volume, indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert encoder.depth == 3
    assert len(encoder.feature_info) == 3


def test_without_its_neck_the_encoder_ends_at_the_last_block(encoder, volume):
    (tokens,) = encoder.forward_intermediates(volume, 1, intermediates_only=True)
    encoder.prune_intermediate_layers([3], prune_norm=True)
    assert torch.equal(encoder(volume), tokens)
    assert encoder.num_features == encoder.out_chans == 24


def test_numbers_from_numpy_are_numbers(volume):
    encoder = make(torch.Generator(), img_size=np.int64(16))
    by_array = encoder.forward_intermediates(volume, np.array([0, 2]), intermediates_only=True)
    assert len(by_array) == 2
    assert len(encoder.forward_intermediates(volume, np.int64(1), intermediates_only=True)) == 1


def test_a_resized_encoder_takes_the_new_size_and_keeps_its_relative_tables(encoder, generator):
    before = encoder.blocks[1].attn.rel_pos_d
    encoder.set_input_size(24)
    assert encoder.img_size == (24, 24, 24)
    assert encoder.pos_embed.shape == (1, 6, 6, 6, 24)
    assert encoder.blocks[1].attn.rel_pos_d is before
    assert encoder(torch.randn(1, 1, 24, 24, 24, generator=generator)).shape == (1, 10, 6, 6, 6)


def test_a_position_table_on_its_own_grid_stays_as_it_is(generator):
    table = torch.randn(1, 3, 3, 3, 5, generator=generator)
    assert torch.equal(resample_pos_embed(table, (3, 3, 3)), table)


def test_a_linear_position_table_is_resampled_between_token_centres():
    table = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 4, 4, 2)
    resampled = resample_pos_embed(table, (2, 4, 4))
    assert torch.equal(resampled[0, :, 0, 0, 0], torch.tensor([0.5, 2.5]))


@pytest.mark.parametrize("patch_size", [5, 8, 12])
def test_larger_patches_answer_to_a_magnified_patch_as_before(generator, patch_size):
    filters = torch.randn(3, 2, 4, 4, 4, generator=generator, dtype=torch.float64)
    patch = torch.randn(1, 2, 4, 4, 4, generator=generator, dtype=torch.float64)
    magnified = F.interpolate(patch, size=(patch_size,) * 3, mode="trilinear")
    resampled = resample_patch_filter(filters, patch_size)
    torch.testing.assert_close(F.conv3d(magnified, resampled), F.conv3d(patch, filters))


def test_smaller_patches_answer_as_nearly_as_can_be(generator):
    filters = torch.randn(1, 1, 4, 4, 4, generator=generator, dtype=torch.float64)
    patches = torch.eye(64, dtype=torch.float64).view(64, 1, 4, 4, 4)  # as many as white noise has
    small = F.interpolate(patches, size=(2, 2, 2), mode="trilinear")
    want = F.conv3d(patches, filters).flatten()
    best = torch.linalg.lstsq(small.flatten(1), want[:, None]).solution.flatten()
    torch.testing.assert_close(resample_patch_filter(filters, 2).flatten(), best)


def test_filters_of_the_same_patch_stay_as_they_are(generator):
    filters = torch.randn(3, 1, 4, 4, 4, generator=generator)
    assert torch.equal(resample_patch_filter(filters, 4), filters)


def test_other_patches_keep_the_number_of_tokens_and_all_tables(encoder, volume):
    before = encoder.state_dict()
    want, sides, grid = encoder(volume), encoder.img_size, encoder.grid
    encoder.set_patch_size(8)
    assert encoder.img_size == tuple(2 * n for n in sides)
    assert encoder.grid == grid
    assert {info["reduction"] for info in encoder.feature_info} == {8}
    changed = [n for n, t in encoder.state_dict().items() if not torch.equal(t, before[n])]
    assert changed == ["patch_embed.proj.weight"]
    # Enlarged patch by patch, so that nothing is mixed across borders.
    cubes = volume.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4)
    b, c, x, y, z = cubes.shape[:5]
    large = F.interpolate(cubes.reshape(b, -1, 4, 4, 4), size=(8, 8, 8), mode="trilinear")
    large = large.view(b, c, x, y, z, 8, 8, 8).permute(0, 1, 2, 5, 3, 6, 4, 7)
    large = large.reshape(b, c, *encoder.img_size)
    torch.testing.assert_close(encoder(large), want, rtol=1e-4, atol=1e-5)


def test_a_patch_of_nothing_is_refused(encoder):
    with pytest.raises(ValueError, match="a side in voxels, 1 or more"):
        encoder.set_patch_size(0)


def test_another_size_names_the_call_that_sets_it(encoder, generator):
    with pytest.raises(ValueError, match=r"set_input_size\(\(24, 24, 24\)\)"):
        encoder(torch.zeros(1, 1, 24, 24, 24))


def test_a_box_in_released_mode_names_both_ways_out(encoder):
    with pytest.raises(ValueError, match=r"pad the volume to \(24, 24, 24\), or use rel_pos='axia"):
        encoder(torch.zeros(1, 1, 16, 16, 24))


def test_a_side_that_does_not_split_names_the_size_to_pad_to(encoder):
    with pytest.raises(ValueError, match=r"use \(20, 20, 20\) and pad to it"):
        encoder.set_input_size(18)


def test_missing_axes_or_channels_are_named(encoder):
    with pytest.raises(ValueError, match="in_chans= your channels"):
        encoder(torch.zeros(1, 2, 16, 16, 16))
    with pytest.raises(ValueError, match="add the missing axes"):
        encoder(torch.zeros(16, 16, 16))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"rel_pos": "rotary"}, "use 'sammed3d' or 'axial'"),
        ({"num_heads": 5}, "make embed_dim a multiple of num_heads"),
        ({"img_size": (16, 16)}, "img_size="),
    ],
    ids=["positions", "heads", "sides"],
)
def test_contradicting_sizes_are_refused_with_the_remedy(generator, changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        make(generator, **changes)


def test_axial_positions_take_any_box(generator):
    encoder = make(generator, rel_pos="axial", img_size=(16, 8, 24))
    assert encoder(torch.randn(1, 1, 16, 8, 24, generator=generator)).shape == (1, 10, 4, 2, 6)
    encoder.set_input_size((8, 8, 16))
    assert encoder(torch.randn(1, 1, 8, 8, 16, generator=generator)).shape == (1, 10, 2, 2, 4)


def test_recomputed_blocks_give_bit_equal_outputs_and_gradients(encoder, volume):
    def run():
        encoder.zero_grad()
        out = encoder(volume)
        out.square().mean().backward()
        return [out, *(p.grad.clone() for p in encoder.parameters())]

    plain = run()
    encoder.set_grad_checkpointing()
    recomputed = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_bfloat16_autocast_stays_within_two_per_cent(encoder, volume):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = encoder(volume)
    assert relative_error(half, encoder(volume)) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("rel_pos", ["sammed3d", "axial"])
def test_an_exported_program_equals_the_module(generator, volume, rel_pos):
    encoder = make(generator, rel_pos=rel_pos)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(encoder, (volume,), dynamic_shapes={"x": {0: batch}})
    more = torch.cat([volume, volume[:1]])
    with torch.no_grad():
        assert relative_error(program.module()(more), encoder(more)) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_encoder_equals_the_eager_one_forward_and_backward(generator, volume):
    encoder = make(generator, depth=2, global_attn_indexes=(1,), window_size=5)
    compiled = torch.compile(encoder)
    results = []
    for network in (encoder, compiled):
        encoder.zero_grad()
        out = network(volume)
        out.square().mul(torch.arange(4.0)).mean().backward()
        results.append([out.detach(), encoder.pos_embed.grad, encoder.blocks[0].attn.qkv.bias.grad])
    for eager, other in zip(*results, strict=True):
        assert relative_error(other, eager) < 1e-4


@pytest.mark.parametrize("rel_pos", ["sammed3d", "axial"])
def test_inference_mode_and_vmap_give_the_numbers_of_a_plain_call(generator, volume, rel_pos):
    """Inference computes attention in place."""
    encoder = make(generator, rel_pos=rel_pos)
    expected = encoder(volume)
    with torch.inference_mode():
        assert torch.equal(encoder(volume), expected)
    with torch.no_grad():
        assert relative_error(torch.vmap(encoder)(volume[None])[0], expected) < 1e-6


def test_stochastic_depth_acts_in_training_and_not_in_evaluation(generator, volume):
    encoder = make(generator, drop_path_rate=0.9)
    assert torch.equal(encoder(volume), encoder(volume))
    encoder.train()
    torch.manual_seed(0)
    assert not torch.equal(encoder(volume), encoder(volume))


def test_tables_and_positions_are_spared_from_weight_decay(encoder):
    spared = encoder.no_weight_decay()
    assert "pos_embed" in spared
    assert "blocks.3.attn.rel_pos_w" in spared
    assert "blocks.3.attn.qkv.weight" not in spared
    assert spared <= {name for name, _ in encoder.named_parameters()}


def test_parameters_are_grouped_by_depth_for_layer_decay(encoder):
    from timm.models import group_parameters

    layers = group_parameters(encoder, encoder.group_matcher(), reverse=True)
    assert layers["pos_embed"] == layers["patch_embed.proj.weight"] == 0
    assert layers["blocks.0.attn.qkv.weight"] == 1
    assert layers["blocks.3.mlp.lin1.weight"] == 4
    assert layers["neck.2.weight"] == 5


@pytest.mark.gpu
def test_a_cuda_device_gives_the_processors_features(encoder, volume):
    want = encoder(volume)
    assert relative_error(encoder.cuda()(volume.cuda()).cpu(), want) < 1e-3  # TF32 is allowed


@pytest.mark.gpu
def test_a_bfloat16_step_on_a_cuda_device_reaches_every_parameter(encoder, volume):
    encoder.cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        out = encoder(volume.cuda())
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
