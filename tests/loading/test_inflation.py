"""From a 2-D network to a 3-D one: each rule on paper, and the whole against timm's own."""

import dataclasses
from functools import partial

import hub_server
import pytest
import safetensors.torch
import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM

from sammed3d_backbone import encoder
from sammed3d_backbone.adapters.bottleneck import add_bottlenecks
from sammed3d_backbone.adapters.registry import ADAPTERS, adapter
from sammed3d_backbone.cli import main
from sammed3d_backbone.loading.checkpoint import ENCODER, CheckpointError, write
from sammed3d_backbone.loading.exposure import seen_in_pretraining
from sammed3d_backbone.loading.inflation import inflate_2d
from sammed3d_backbone.loading.registry import WEIGHTS, to_metadata
from sammed3d_backbone.loading.variants import VARIANTS, Variant

loopback_hub = hub_server.loopback_hub  # a fixture

SIZES = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "window_size": 2}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """A variant with the sizes of the 2-D network below."""
    toy = Variant(img_size=16, global_attn_indexes=(1,), out_chans=8, **SIZES)
    monkeypatch.setitem(VARIANTS, "toy", toy)


@pytest.fixture
def flat(generator):
    """Timm's 2-D encoder at a small size for images of 32 x 32, of which no value is zero."""
    network = VisionTransformerSAM(
        img_size=32,
        global_attn_indexes=(1,),
        neck_chans=6,
        use_rel_pos=True,
        num_classes=0,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        **SIZES,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network.eval()


@pytest.fixture
def file(flat, tmp_path):
    """The 2-D network as timm publishes it."""
    safetensors.torch.save_file(flat.state_dict(), tmp_path / "flat.safetensors")
    return tmp_path / "flat.safetensors"


def inflated(file, inflate="center", **knobs):
    return encoder("toy", weights=file, inflate=inflate, rel_pos="axial", **knobs).eval()


def slices(side, generator):
    """A grey slice (1, 1, side, side)."""
    return torch.randn(1, 1, side, side, generator=generator)


def last_map(network, volume):
    """The 3-D network's map (1, E, x, y, z) after the last block."""
    return network.forward_intermediates(volume, 1, intermediates_only=True)[0]


def maps_of(flat, slice_):
    """The 2-D network's maps (1, E, x, y) after every block."""
    return flat.forward_intermediates(slice_.expand(-1, 3, -1, -1), intermediates_only=True)


# --- the whole -------------------------------------------------------------------------------


@pytest.mark.parametrize("inflate", ["center", "mean"])
@pytest.mark.parametrize(
    ("side", "depth"), [(32, 4), (32, 12), (16, 4), (24, 20)], ids=lambda n: str(n)
)
def test_a_volume_constant_along_depth_gives_the_2d_networks_maps(
    flat, file, generator, inflate, side, depth
):
    """One slice of patches, or several; images of the size that was trained, or of another."""
    network = inflated(file, inflate, img_size=(side, side, depth))
    slice_ = slices(side, generator)
    volume = slice_[..., None].expand(-1, -1, -1, -1, depth)
    with torch.no_grad():
        maps = network.forward_intermediates(volume, intermediates_only=True)
        expected = maps_of(flat, slice_)
    assert len(maps) == len(expected) == 3
    for map_, wanted in zip(maps, expected, strict=True):
        assert torch.allclose(map_, wanted[..., None].expand_as(map_), atol=1e-4)


def test_the_networks_differ_where_the_grid_leaves_a_window_unfilled(flat, file, generator):
    network = inflated(file, img_size=(20, 20, 4))  # five tokens in windows of two
    slice_ = slices(20, generator)
    with torch.no_grad():
        first = network.forward_intermediates(slice_[..., None].expand(-1, -1, -1, -1, 4))[1][0]
        expected = maps_of(flat, slice_)[0]
    near = torch.isclose(first[..., 0], expected, atol=1e-4).all(dim=1)[0]  # (x, y)
    assert near[:4, :4].all()
    assert not near[4].any()
    assert not near[:, 4].any()


def test_depth_is_seen_where_a_volume_changes_along_it(file, generator):
    network = inflated(file)
    volume = torch.randn(1, 1, 16, 16, 16, generator=generator)
    maps = last_map(network, volume)
    assert not torch.allclose(maps[..., 0], maps[..., 1])
    assert not torch.allclose(maps, last_map(network, volume.flip(4)).flip(4))


def test_the_neck_stays_random_and_everybody_is_told(file, caplog):
    torch.manual_seed(0)
    random = encoder("toy", pretrained=False, rel_pos="axial").neck.state_dict()
    torch.manual_seed(0)
    network = inflated(file)
    assert all(torch.equal(t, random[n]) for n, t in network.neck.state_dict().items())
    report = network.load_report
    assert report.missing == tuple(f"neck.{name}" for name in random)
    assert set(report.unused) == set(report.missing)
    assert len(report.matched) == len(network.state_dict()) - len(random)
    assert "neck.*: 2-D, 6 channels -> random initialisation" in str(report.adapted[-1])
    assert "neck.*: 2-D, 6 channels -> random initialisation" in caplog.text


def test_the_report_names_every_rule_once(file):
    report = inflated(file).load_report
    assert [str(change) for change in report.reshaped] == [
        "pos_embed: (1, 8, 8, 24) -> (1, 4, 4, 4, 24), resampled bicubically in the plane, "
        "repeated over 4 depths",
        "blocks.*.attn.rel_pos_d: (15, 12) -> (7, 12), that of rows, resampled linearly",
        "blocks.*.attn.rel_pos_h: (15, 12) -> (7, 12), that of columns, resampled linearly",
        "blocks.*.attn.rel_pos_w: (15, 12) -> (7, 12), copied from columns, resampled linearly",
    ]
    assert [str(change) for change in report.adapted[:-1]] == [
        "blocks.*.mlp.lin1.*: mlp.fc1 -> mlp.lin1, renamed (6 tensors)",
        "blocks.*.mlp.lin2.*: mlp.fc2 -> mlp.lin2, renamed (6 tensors)",
        "patch_embed.proj.weight: (24, 3, 4, 4) -> (24, 1, 4, 4, 4), summed over 3 colours, at the "
        "centre of depth and 0 elsewhere",
        "blocks.*.attn.rel_pos_d: (3, 12) -> (3, 12), that of rows (2 tensors)",
        "blocks.*.attn.rel_pos_h: (3, 12) -> (3, 12), that of columns (2 tensors)",
        "blocks.*.attn.rel_pos_w: (3, 12) -> (3, 12), copied from columns (2 tensors)",
    ]


@pytest.mark.slow
def test_timms_base_network_fills_vit_b(tmp_path):
    """At full size, by shapes: random initialisation in the layout that timm publishes."""
    import timm

    tensors = timm.create_model("samvit_base_patch16", num_classes=0).state_dict()
    write(tmp_path / "base.safetensors", tensors, to_metadata(WEIGHTS["sam_2d"]))
    network = encoder(
        "vit_b", weights=tmp_path / "base.safetensors", inflate="center", rel_pos="axial"
    )
    assert network.img_size == (128, 128, 128)
    report = network.load_report
    assert (len(report.matched), len(report.missing), report.unexpected) == (183, 6, ())
    assert torch.equal(network.blocks[5].mlp.lin2.weight, tensors["blocks.5.mlp.fc2.weight"])


# --- each rule on paper ----------------------------------------------------------------------

SHAPES = {
    "patch_embed.proj.weight": (1, 1, 2, 2, 2),
    "pos_embed": (1, 2, 1, 2, 1),
    "blocks.0.attn.rel_pos_d": (3, 1),
    "blocks.0.attn.rel_pos_h": (1, 1),
    "blocks.0.attn.rel_pos_w": (3, 1),
    "blocks.0.mlp.lin1.weight": (1, 1),
    "neck.0.weight": (4, 1, 1, 1, 1),
}


def tensors_of_2d(**changes):
    """A 2-D network of one-channel tokens, by names with underscores for dots."""
    return {
        "patch_embed.proj.weight": torch.tensor([1.0, 2.0, 4.0])
        .view(1, 3, 1, 1)
        .expand(1, 3, 2, 2),
        "pos_embed": torch.tensor([[5.0], [7.0]])[None, :, :, None],  # (1, 2, 1, 1)
        "blocks.0.attn.rel_pos_h": torch.tensor([[1.0], [2.0], [3.0]]),
        "blocks.0.attn.rel_pos_w": torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0]]),
        "blocks.0.mlp.fc1.weight": torch.tensor([[9.0]]),
        "neck.0.weight": torch.zeros(3, 1, 1, 1),
        **changes,
    }


def on_paper(depth_filter="center", **changes):
    return inflate_2d(tensors_of_2d(**changes), SHAPES, depth_filter=depth_filter)[0]


def test_colours_are_summed_and_the_filter_put_at_the_centre_of_depth():
    filters = on_paper()["patch_embed.proj.weight"]
    assert filters[0, 0, :, :, 0].tolist() == [[0, 0], [0, 0]]
    assert filters[0, 0, :, :, 1].tolist() == [[7, 7], [7, 7]]


def test_colours_are_summed_and_the_filter_spread_over_depth():
    assert on_paper("mean")["patch_embed.proj.weight"].unique().tolist() == [3.5]


def test_the_position_table_is_the_same_at_every_depth():
    table = on_paper()["pos_embed"]
    assert table[0, :, 0, 0, 0].tolist() == [5, 7]
    assert torch.equal(table[:, :, :, 1], table[:, :, :, 0])


def test_a_position_table_of_another_grid_is_resampled_in_the_plane():
    table = torch.arange(4.0).view(1, 4, 1, 1).repeat(1, 1, 1, 2)
    shapes = {**SHAPES, "pos_embed": (1, 2, 1, 2, 2)}
    state, _ = inflate_2d(tensors_of_2d(pos_embed=table), shapes, depth_filter="center")
    # Four rows to two: cubic weights 111/128, 111/128, 29/128, -9/128 over their sum of 242/128.
    expected = torch.tensor([71 / 121, 3 - 71 / 121]).view(1, 2, 1, 1, 1).expand(1, 2, 1, 2, 2)
    assert torch.allclose(state["pos_embed"], expected)


def test_tables_of_rows_and_columns_are_those_of_axes_0_and_1_and_columns_serve_depth_too():
    tables = {name: tensor.flatten().tolist() for name, tensor in on_paper().items()}
    assert tables["blocks.0.attn.rel_pos_d"] == [1, 2, 3]
    assert tables["blocks.0.attn.rel_pos_h"] == [30]  # the middle: position 0 relative to itself
    expected = [10 + 10 / 3, 30, 50 - 10 / 3]  # centres of thirds of five entries
    assert tables["blocks.0.attn.rel_pos_w"] == pytest.approx(expected)


def test_timms_layers_get_the_names_of_sam():
    assert on_paper()["blocks.0.mlp.lin1.weight"].tolist() == [[9]]


# --- what can be asked for -------------------------------------------------------------------


def test_files_of_the_original_sam_serve_as_well(flat, file, tmp_path):
    named = {n.replace("mlp.fc", "mlp.lin"): t for n, t in flat.state_dict().items()}
    whole = {
        **{f"{ENCODER}{n}": t for n, t in named.items()},
        "prompt_encoder.point_embeddings.2.weight": torch.zeros(1, 6),
        "mask_decoder.iou_token.weight": torch.zeros(1, 6),
    }
    torch.save(whole, tmp_path / "sam.pth")
    ours, theirs = inflated(tmp_path / "sam.pth"), inflated(file)
    assert torch.equal(ours.patch_embed.proj.weight, theirs.patch_embed.proj.weight)
    assert torch.equal(ours.blocks[1].mlp.lin1.weight, theirs.blocks[1].mlp.lin1.weight)
    assert ours.load_report.unexpected == ()
    assert len(ours.load_report.unused) == 8


def test_half_precision_is_widened_and_reported(flat, tmp_path):
    halves = {name: tensor.half() for name, tensor in flat.state_dict().items()}
    safetensors.torch.save_file(halves, tmp_path / "half.safetensors")
    network = inflated(tmp_path / "half.safetensors")
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert "widened without loss" in str(network.load_report)


def test_several_channels_and_patches_of_another_side_build_on_inflated_filters(file, generator):
    network = inflated(file, in_chans=2, channel_gains=(1, 0), patch_size=8, img_size=32)
    assert (network.img_size, network.grid) == ((32, 32, 32), (4, 4, 4))
    volume = torch.randn(1, 2, 32, 32, 32, generator=generator)
    one = inflated(file, patch_size=8, img_size=32)
    with torch.no_grad():
        assert torch.allclose(last_map(network, volume), last_map(one, volume[:, :1]), atol=1e-4)
    assert "patch_embed.proj.weight: (24, 2, 4, 4, 4) -> (24, 2, 8, 8, 8)" in str(
        network.load_report
    )


def test_a_frozen_inflated_encoder_learns_beside_itself(file, generator):
    network = inflated(file)
    add_bottlenecks(network, width=2)
    last_map(network, torch.randn(1, 1, 16, 16, 16, generator=generator)).sum().backward()
    learns = {name for name, p in network.named_parameters() if p.grad is not None}
    assert learns
    assert all(".bottleneck." in name for name in learns)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "class_prompts"])
def test_no_other_decoder_than_class_prompts_reads_the_random_neck(file, generator, name):
    network = inflated(file)
    add_bottlenecks(network, width=2)
    model = adapter(name)(network, 2)
    assert isinstance(model.encoder.neck, torch.nn.Identity)
    logits = model(torch.randn(1, 1, 16, 16, 16, generator=generator))
    assert (logits[0] if isinstance(logits, list) else logits).shape == (1, 2, 16, 16, 16)


# --- what the command line says of a 2-D file -------------------------------------------------


def verdict(file, capsys, *options):
    code = main(["verify", str(file), *options])
    return code, *capsys.readouterr().out.splitlines()[-1].split(None, 1)


def test_a_2d_file_verifies_as_what_it_is_and_says_how_to_use_it(file, capsys):
    assert verdict(file, capsys) == (
        0,
        "ok",
        "a 2-D SAM encoder, which fills 48 of the 54 tensors of toy, all but the neck: "
        f"encoder('toy', weights='{file}', inflate='center', rel_pos='axial') converts it",
    )


@pytest.mark.parametrize(
    ("lost", "options", "said"),
    [
        ("blocks.1.mlp.fc1.bias", (), "missing (blocks.1.mlp.lin1.bias)"),
        ("blocks.0.attn.rel_pos_h", (), "no known variant"),
        ("blocks.0.attn.rel_pos_h", ("--variant", "toy"), "missing (blocks.0.attn.rel_pos_d)"),
    ],
)
def test_a_2d_file_with_a_hole_fails_and_says_where(flat, tmp_path, lost, options, said, capsys):
    tensors = flat.state_dict()
    del tensors[lost]
    torch.save(tensors, tmp_path / "a.pth")
    code, mark, sentence = verdict(tmp_path / "a.pth", capsys, *options)
    assert (code, mark) == (1, "WRONG")
    assert said in sentence


def test_info_names_the_variant_that_a_2d_file_inflates_to(file, capsys):
    assert main(["info", str(file)]) == 0
    assert "variant: toy" in capsys.readouterr().out


# --- refusals --------------------------------------------------------------------------------


def test_inflation_needs_axial_positions(file):
    with pytest.raises(ValueError, match="rel_pos='axial'"):
        encoder("toy", weights=file, inflate="center", rel_pos="sammed3d")


def test_a_2d_file_without_inflation_is_told_of_it(file):
    with pytest.raises(CheckpointError, match="inflate="):
        encoder("toy", weights=file)


def test_a_3d_file_is_not_inflated(tmp_path):
    torch.save(encoder("toy", pretrained=False).state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="inflate="):
        inflated(tmp_path / "a.pth")


def test_a_2d_network_of_other_sizes_asks_for_its_variant(file):
    with pytest.raises(CheckpointError, match="variant"):
        encoder("tiny", weights=file, inflate="center", rel_pos="axial")


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="variant"):
        inflated(tmp_path / "a.pth")


# --- where the values come from --------------------------------------------------------------


def test_timms_weights_come_from_the_hub_with_their_record(loopback_hub, file, monkeypatch):
    listed = dataclasses.replace(WEIGHTS["sam_2d"], variant="toy")
    monkeypatch.setitem(WEIGHTS, "sam_2d", listed)
    loopback_hub.publish(listed.repo_id, listed.filename, file.read_bytes())
    network = inflated("sam_2d")
    record = network.pretrained_cfg
    assert record == listed
    assert "Kirillov" in record.citation
    assert record.licence.startswith("Apache-2.0")
    exposure = seen_in_pretraining(record, "MSD_Hippocampus")
    assert (exposure.verdict, "incomplete" in exposure.sentence) == ("not listed", True)
    assert seen_in_pretraining(record, "SA-1B").verdict == "seen"


def test_of_a_local_file_nothing_is_claimed_unless_it_says_so(flat, file, tmp_path):
    assert inflated(file).pretrained_cfg.pretraining is None
    assert inflated(file).pretrained_cfg.rel_pos == "axial"
    copy = tmp_path / "copy.safetensors"
    record = WEIGHTS["sam_2d"]
    write(copy, flat.state_dict(), to_metadata(record))
    assert inflated(copy).pretrained_cfg.pretraining == record.pretraining
