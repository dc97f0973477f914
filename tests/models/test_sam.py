"""The promptable network: parity with the reference, its faithful oddities, batches and sizes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from sammed3d_backbone.recipes.benchmarks.parity import (
    PromptCase,
    compare_prompts,
    prompt_pair,
    relative_error,
)
from torch import nn

from sammed3d_backbone import encoder, sam
from sammed3d_backbone.loading.variants import VARIANTS
from sammed3d_backbone.models.high_resolution import HighResolution
from sammed3d_backbone.models.mask_decoder import MaskDecoder3D, sorted_into_volume
from sammed3d_backbone.models.prompt_encoder import PromptEncoder3D
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.models.two_way import TwoWayLayer

SMALL = {"embed_dim": 48, "side": 64, "grid": 4, "mlp_dim": 64, "iou_head_hidden_dim": 32}


@pytest.fixture
def prompts():
    """A prompt encoder of a cube of 32 voxels in 4 x 4 x 4 tokens."""
    torch.manual_seed(0)
    return PromptEncoder3D(embed_dim=12, img_size=(32, 32, 32), grid=(4, 4, 4))


@pytest.fixture
def plain():
    """A promptable network with random weights whose masks do not read the image, as released."""
    torch.manual_seed(0)
    sizes = replace(VARIANTS["nano"].decoder, high_resolution=False)
    return Sam3D.around(encoder("nano", pretrained=False), **vars(sizes)).eval()


@pytest.fixture
def embedding(generator):
    """An image embedding of `plain`."""
    return torch.randn(1, 64, 8, 8, 8, generator=generator)


# --- parity ----------------------------------------------------------------------------------


def test_prompts_and_masks_equal_the_reference_in_float64():
    errors = compare_prompts(PromptCase(torch.float64, sets=24, **SMALL))
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.slow
def test_prompts_and_masks_equal_the_reference_in_float32_at_released_size():
    errors = compare_prompts(PromptCase(torch.float32, sets=3))
    # A ReLU whose input is zero within rounding may count on one side only; not so in float64.
    assert errors.pop("parameter gradient") < 5e-3
    assert max(errors.values()) < 1e-5, errors


def test_voxel_indices_may_be_whole_numbers_or_any_float_between(generator):
    reference, ours = (
        pair["prompt_encoder"]
        for pair in prompt_pair(PromptCase(torch.float32, sets=1, **SMALL), seed=3)
    )
    labels = torch.tensor([[1, 0, -1]])
    for coords in (
        torch.randint(64, (1, 3, 3), generator=generator),
        64 * torch.rand(1, 3, 3, generator=generator),
    ):
        want = reference(points=(coords.float(), labels), boxes=None, masks=None)
        got = ours(points=(coords, labels))
        assert relative_error(got[0], want[0]) < 1e-6
        assert torch.equal(got[1], want[1])


def test_the_names_and_shapes_are_the_released_files(root):
    golden = json.loads((root / "tests/golden/keys_vit_b.json").read_text())
    with torch.device("meta"):
        ours = sam("vit_b", pretrained=False).state_dict()
    assert {name: list(value.shape) for name, value in ours.items()} == golden
    assert list(ours) == list(golden)


# --- faithful oddities -----------------------------------------------------------------------


def test_the_released_code_is_sine_cosine_and_the_same_sine_again(prompts):
    frequencies = torch.zeros(3, 4)
    frequencies[0, 0], frequencies[1, 1], frequencies[2, 2] = 0.25, 0.5, 1.0
    prompts.pe_layer.positional_encoding_gaussian_matrix.copy_(frequencies)
    # Places are doubled and shifted to -1 .. 1: here they are 1, 0 and -0.5.
    code = prompts.pe_layer(torch.tensor([1.0, 0.5, 0.25]))
    sines, cosines = [1, 0, 0, 0], [0, 1, -1, 1]
    torch.testing.assert_close(code, torch.tensor([*sines, *cosines, *sines]).float())


def test_released_image_tokens_have_axes_0_and_1_swapped_against_points(prompts):
    code = prompts.get_dense_pe()
    centre = torch.tensor([1.5, 0.5, 3.5]) / 4  # centre of token (1, 0, 3)
    torch.testing.assert_close(code[0, :, 0, 1, 3], prompts.pe_layer(centre))
    assert not torch.allclose(code[0, :, 1, 0, 3], prompts.pe_layer(centre))


def test_points_end_with_a_token_that_is_no_point(prompts):
    where = torch.tensor([[[3, 4, 5], [6, 7, 8], [9, 10, 11]]])
    sparse, _ = prompts(points=(where, torch.tensor([[1, 0, -1]])))
    places = [prompts.pe_layer((where[0, i] + 0.5) / 32) for i in range(2)]
    outside, inside = (kind.weight[0] for kind in prompts.point_embeddings)
    no_point = prompts.not_a_point_embed.weight[0]
    expected = torch.stack([places[0] + inside, places[1] + outside, no_point, no_point])
    torch.testing.assert_close(sparse[0], expected)
    assert prompts(points=(where[:, :0], torch.zeros(1, 0)))[0].shape == (1, 1, 12)
    assert prompts()[0].shape == (1, 0, 12)


def test_the_first_layer_replaces_its_tokens():
    layers = [TwoWayLayer(16, 2, 8, is_first=first) for first in (True, False)]
    tokens, image = torch.randn(1, 3, 16), torch.zeros(1, 5, 16)
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if "out_proj" in name or "lin2" in name:
                nn.init.zeros_(parameter)  # every part adds nothing
    replaced, kept = (layer(tokens, image, tokens, image)[0] for layer in layers)
    assert torch.equal(replaced, torch.zeros_like(tokens))
    normal = nn.functional.layer_norm(tokens, (16,))
    torch.testing.assert_close(kept, normal, rtol=1e-4, atol=1e-4)


def test_norms_of_tokens_have_another_epsilon_than_norms_of_maps(plain):
    token_norms = {
        m.eps for m in plain.mask_decoder.transformer.modules() if isinstance(m, nn.LayerNorm)
    }
    map_norms = {m.eps for m in plain.modules() if type(m).__name__ == "LayerNorm3d"}
    assert (token_norms, map_norms) == ({1e-5}, {1e-6})


# --- aligned point positions --------------------------------------------------------------------


def test_aligned_positions_agree_between_a_point_and_the_token_around_it():
    prompts = PromptEncoder3D(
        embed_dim=16, img_size=(32, 64, 16), grid=(4, 8, 2), point_pos="aligned"
    )
    centre = torch.tensor([1.5 / 4, 6.5 / 8, 0.5 / 2])
    torch.testing.assert_close(
        prompts.get_dense_pe()[0, :, 1, 6, 0], prompts.pe_layer(centre), rtol=0, atol=1e-5
    )
    wave = 2 * math.pi * (2 * centre - 1) @ prompts.pe_layer.positional_encoding_gaussian_matrix
    torch.testing.assert_close(prompts.pe_layer(centre), torch.cat([wave.sin(), wave.cos()]))


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"point_pos": "rotary"}, "use 'swapped' or 'aligned'"),
        ({"embed_dim": 16}, "use a multiple of 3, or the other form"),
        ({"img_size": (32, 32, 64)}, r"pad to \(64, 64, 64\), or train with point_pos="),
    ],
)
def test_positions_that_do_not_exist_are_refused(given, remedy):
    sizes = {"embed_dim": 12, "img_size": (32, 32, 32), "grid": (4, 4, 4)}
    with pytest.raises(ValueError, match=remedy):
        PromptEncoder3D(**{**sizes, **given})


# --- prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"boxes": torch.zeros(1, 6)}, "give points inside the object"),
        ({"points": (torch.zeros(2, 3), torch.zeros(2))}, r"give voxel indices \(P, N, 3\)"),
        ({"points": (torch.zeros(1, 2, 3), torch.zeros(1, 3))}, r"and labels \(P, N\)"),
        ({"points": (torch.zeros(1, 1, 3), torch.full((1, 1), 2))}, "give 1 for a point inside"),
        ({"masks": torch.zeros(1, 1, 8, 8, 8)}, r"logits of shape \('P', 1, 16, 16, 16\)"),
        ({"masks": torch.zeros(1, 16, 16, 16)}, "such as the decoder returned"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(prompts, given, remedy):
    with pytest.raises(ValueError, match=remedy):
        prompts(**given)


def test_prompts_that_fit_no_image_are_refused(plain, embedding):
    points = torch.zeros(3, 1, 3), torch.ones(3, 1)
    with pytest.raises(ValueError, match="2 images embeddings for 3 sets of points; give one for"):
        plain.decode(embedding.expand(2, -1, -1, -1, -1), points)
    with pytest.raises(ValueError, match="2 dense embeddings for 3 sets of points"):
        plain.decode(embedding, points, torch.zeros(2, 1, 32, 32, 32))


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [({"embed_dim": 12}, "not a multiple of 8"), ({"num_heads": 3}, "make embed_dim a multiple")],
)
def test_widths_that_do_not_split_are_refused(sizes, remedy):
    given = {"embed_dim": 16, "num_heads": 2, "mlp_dim": 8, "iou_head_hidden_dim": 8, **sizes}
    with pytest.raises(ValueError, match=remedy):
        MaskDecoder3D(**given)


def test_many_prompts_on_one_image_are_what_each_gives_alone(plain, embedding, generator):
    coords = torch.randint(64, (5, 2, 3), generator=generator)
    labels = torch.randint(2, (5, 2), generator=generator)
    masks = torch.randn(5, 1, 32, 32, 32, generator=generator)
    for given in (masks, None):
        together = plain.decode(embedding, (coords, labels), given)
        for i in range(5):
            mask = None if given is None else given[i : i + 1]
            alone = plain.decode(embedding, (coords[i : i + 1], labels[i : i + 1]), mask)
            assert relative_error(together[i : i + 1], alone) < 1e-6


def test_without_a_mask_the_network_reads_zeros_as_in_its_training(plain, embedding):
    points = torch.tensor([[[20, 30, 40]]]), torch.tensor([[1]])
    first = plain.decode(embedding, points)
    assert torch.equal(first, plain.decode(embedding, points, torch.zeros(1, 1, 32, 32, 32)))
    sparse, untrained = plain.prompt_encoder(points=points)
    code = plain.prompt_encoder.get_dense_pe()
    assert not torch.allclose(first, plain.mask_decoder(embedding, code, sparse, untrained)[0])
    assert not torch.allclose(first, plain.decode(embedding, points, first))


def test_a_mask_alone_is_a_prompt(plain, embedding, generator):
    masks = torch.randn(2, 1, 32, 32, 32, generator=generator)
    logits = plain.decode(embedding, mask_logits=masks)
    assert logits.shape == masks.shape
    assert not torch.allclose(logits[0], logits[1])


def test_logits_are_upsampled_linearly_between_voxel_centres(plain):
    ramp = torch.arange(32.0).view(1, 1, 32, 1, 1).expand(1, 1, 32, 32, 32)
    line = plain.upsample(ramp)[0, 0, :, 5, 60]
    assert line.shape == (64,)
    torch.testing.assert_close(line[1:-1], torch.arange(0.25, 31, 0.5))
    assert (line[0], line[-1]) == (0, 31)


def test_the_network_goes_from_volumes_and_clicks_to_masks_of_the_same_size(plain, generator):
    volumes = torch.randn(2, 1, 64, 64, 64, generator=generator)
    points = torch.tensor([[[1, 2, 3]], [[60, 50, 40]]]), torch.ones(2, 1)
    with torch.no_grad():
        logits = plain(volumes, points)
        steps = plain.upsample(plain.decode(plain.image_encoder(volumes), points))
    assert logits.shape == volumes.shape
    assert torch.equal(logits, steps)


def test_autocast_does_not_touch_the_position_code(plain, embedding):
    points = torch.tensor([[[20, 30, 40]]]), torch.tensor([[1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sparse, _ = plain.prompt_encoder(points=points)
        code = plain.prompt_encoder.get_dense_pe()
    assert torch.equal(sparse, plain.prompt_encoder(points=points)[0])
    assert torch.equal(code, plain.prompt_encoder.get_dense_pe())


# --- sizes -----------------------------------------------------------------------------------


def test_the_small_sizes_are_small_in_half_precision():
    for name, largest_mb in (("tiny", 16), ("nano", 4)):
        values = sam(name, pretrained=False).state_dict().values()
        assert sum(2 * value.numel() for value in values) <= largest_mb * 1e6, name


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_decoder(name):
    with torch.device("meta"):
        network = sam(name, pretrained=False)
        width, grid = network.image_encoder.out_chans, network.image_encoder.grid
        _, dense = network.prompt_encoder()
        code = network.prompt_encoder.get_dense_pe()
        assert code.shape == dense.shape == (1, width, *grid)
        maps = ()
        if network.mask_decoder.high_resolution is not None:
            x, y, z = network.img_size
            maps = network.mask_decoder.high_resolution(torch.zeros(1, 1, x, y, z), code)
        logits, _ = network.mask_decoder(code, code, torch.zeros(2, 3, width), dense, maps=maps)
        assert logits.shape == (2, 1, *network.prompt_encoder.mask_size)


def test_another_input_size_moves_points_and_tokens_together(plain, generator):
    plain.set_input_size(96)
    assert plain.prompt_encoder.mask_size == (48, 48, 48)
    with torch.no_grad():
        logits = plain(
            torch.randn(1, 1, 96, 96, 96, generator=generator),
            (torch.tensor([[[90, 80, 70]]]), torch.ones(1, 1)),
        )
    assert logits.shape == (1, 1, 96, 96, 96)
    code = plain.prompt_encoder.get_dense_pe()
    centre_vox = torch.tensor([[[11.5, 3.5, 3.5]]])  # centre of token (1, 0, 0)
    sparse, _ = plain.prompt_encoder(points=(centre_vox, torch.ones(1, 1)))
    inside = plain.prompt_encoder.point_embeddings[1].weight[0]
    torch.testing.assert_close(sparse[0, 0] - inside, code[0, :, 1, 0, 0], rtol=0, atol=1e-4)


def test_any_box_is_an_input_where_both_forms_of_position_allow_it(generator):
    box = (32, 64, 48)
    network = sam("tiny", pretrained=False, img_size=box).eval()
    points = torch.tensor([[[31, 63, 47]]]), torch.ones(1, 1)
    with torch.no_grad():
        logits = network(torch.randn(1, 1, *box, generator=generator), points)
    assert logits.shape == (1, 1, *box)
    with pytest.raises(ValueError, match="rel_pos='sammed3d' exists on cubes only"):
        sam("tiny", pretrained=False, rel_pos="sammed3d", img_size=box)


def test_masks_in_bfloat16_are_near_those_in_float32(plain, embedding):
    points = torch.tensor([[[20, 30, 40]]]), torch.tensor([[1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = plain.decode(embedding, points)
    assert relative_error(coarse, plain.decode(embedding, points)) < 0.05


@pytest.fixture
def sharp():
    """A small network with high-resolution maps."""
    torch.manual_seed(0)
    return sam("tiny", pretrained=False, img_size=(16, 24, 16)).eval()


def test_high_resolution_maps_lie_where_the_image_lies(sharp, generator):
    image = torch.randn(1, 1, 16, 24, 16, generator=generator)
    middle, fine = sharp.encode(image).maps
    assert middle.shape == (1, 32, 4, 6, 4)
    assert fine.shape == (1, 16, 8, 12, 8)
    assert torch.equal(sorted_into_volume(HighResolution.parts(fine, 2)), fine)
    token = middle[0, :, 2:4, 4:6, 0:2]  # the part of token (1, 2, 0)
    assert torch.equal(HighResolution.parts(middle, 1)[0, 1, 2, 0].T, token.flatten(1))


def test_images_of_a_batch_keep_their_prompts_and_maps(sharp, generator):
    images = torch.randn(2, 1, 16, 24, 16, generator=generator)
    points = torch.randint(0, 16, (4, 2, 3), generator=generator), torch.tensor([[1, 0]] * 4)
    with torch.no_grad():
        together = sharp.decode(sharp.encode(images), points)
        for number in range(2):
            own = slice(2 * number, 2 * number + 2)
            alone = sharp.decode(sharp.encode(images[[number]]), (points[0][own], points[1][own]))
            torch.testing.assert_close(together[own], alone, rtol=0, atol=1e-5)


def test_upsampling_on_tokens_equals_that_on_volumes(generator):
    decoder = MaskDecoder3D(embed_dim=16, num_heads=2, mlp_dim=8, iou_head_hidden_dim=8)
    image = torch.randn(3, 16, 2, 3, 4, generator=generator)
    volume = decoder.output_upscaling(image)
    parts = decoder._upscaled(image.movedim(1, -1), ())
    torch.testing.assert_close(sorted_into_volume(parts), volume)


def test_a_click_reads_the_maps_where_it_falls(sharp):
    maps = torch.zeros(1, 32, 4, 6, 4), torch.zeros(1, 16, 8, 12, 8)
    maps[1][0, 3, 7, 11, 0] = 1
    points = torch.tensor([[[15, 23, 0], [13, 23, 0], [-1, 30, 0]]])
    added = sharp.mask_decoder.at_points(maps, (points, torch.tensor([[1, 0, -1]])), (16, 24, 16))
    layer = sharp.mask_decoder.high_resolution.to_point
    torch.testing.assert_close(added[0, 0], layer.weight[:, 32 + 3] + layer.bias)
    torch.testing.assert_close(added[0, 1], layer.bias)
    assert not added[0, 2:].any()  # no point, and the token that ends the points


def test_maps_and_their_decoder_belong_together(sharp, generator):
    image = torch.randn(1, 1, 16, 24, 16, generator=generator)
    points = torch.zeros(1, 1, 3), torch.ones(1, 1)
    with pytest.raises(ValueError, match="encode"):
        sharp.decode(sharp.image_encoder(image), points)
