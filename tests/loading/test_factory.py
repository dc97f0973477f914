"""From names and files to networks: every layout, every size, and nothing random by accident."""

import argparse
import dataclasses
import doctest
import hashlib
import json
import os
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch

import sammed3d_backbone
from sammed3d_backbone import encoder, list_weights, sam
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.loading import factory
from sammed3d_backbone.loading.checkpoint import ENCODER, CheckpointError, write
from sammed3d_backbone.loading.opening import CARD_KEY, variant_for
from sammed3d_backbone.loading.registry import DEFAULT_WEIGHTS, WEIGHTS, Weights, to_metadata
from sammed3d_backbone.loading.stored_sizes import encoder_like, sam_like, variant_of
from sammed3d_backbone.loading.variants import VARIANTS, DecoderSizes, Variant

loopback_hub = hub_server.loopback_hub  # a fixture

GOLDEN = Path(__file__).parents[1] / "golden" / "keys_vit_b.json"
TOY = Variant(
    img_size=32,
    patch_size=8,
    embed_dim=24,
    depth=3,
    num_heads=2,
    global_attn_indexes=(1,),
    window_size=3,
    out_chans=8,
    decoder=DecoderSizes(mask_in_chans=4, num_heads=2, mlp_dim=8, iou_head_hidden_dim=8),
)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """A variant that costs nothing, and no weights for it but those of the tests."""
    monkeypatch.setitem(VARIANTS, "toy", TOY)


@pytest.fixture
def source(generator):
    """A toy network of which no value is zero."""
    network = encoder("toy", pretrained=False)
    return filled(network, generator)


def filled(network, generator):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network.eval()


def save(network, path, **extra):
    torch.save({"model_state_dict": network.state_dict(), **extra}, path)
    return path


def volume(side=32, channels=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 1, side, side, side, generator=generator).expand(-1, channels, -1, -1, -1)


def same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


# --- names and random starts -----------------------------------------------------------------


def test_the_public_names_are_functions_and_a_version():
    assert {"encoder", "list_variants", "list_weights", "sam"} <= set(sammed3d_backbone.__all__)
    assert all(callable(getattr(sammed3d_backbone, name)) for name in sammed3d_backbone.__all__)
    assert "turbo" in list_weights()
    assert "vit_b" in sammed3d_backbone.list_variants()


def test_a_random_start_is_asked_for_and_carries_no_record():
    network = encoder("toy", pretrained=False)
    assert (network.pretrained_cfg, network.load_report) == (None, None)


def test_a_variant_without_weights_never_starts_at_random_by_itself():
    with pytest.raises(ValueError, match="pretrained=False"):
        encoder("toy")


@pytest.mark.parametrize("name", ["tiny", "vit_b_256"])
def test_a_random_start_has_the_variants_sizes(name):
    with torch.device("meta"):
        network = encoder(name, pretrained=False, in_chans=2, drop_path_rate=0.1)
    sizes = VARIANTS[name]
    assert network.img_size == (sizes.img_size,) * 3
    assert (network.embed_dim, network.depth) == (sizes.embed_dim, sizes.depth)
    assert network.in_chans == 2


def test_a_random_start_may_have_any_size_and_axial_positions():
    network = encoder("toy", pretrained=False, img_size=(16, 24, 32), rel_pos="axial")
    assert network(torch.zeros(1, 1, 16, 24, 32)).shape == (1, 8, 2, 3, 4)


def test_sizes_may_be_integers_of_numpy():
    side = np.int64(16)
    network = encoder("toy", pretrained=False, in_chans=np.int32(2), img_size=side)
    assert (type(network.in_chans), network.img_size) == (int, (16, 16, 16))
    box = np.array([16, 24, 32])
    assert encoder("toy", pretrained=False, img_size=box, rel_pos="axial").img_size == (16, 24, 32)


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"in_chans": 0}, "in_chans"),
        ({"in_chans": 1.5}, "in_chans"),
        ({"img_size": 16.5}, "img_size"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"drop_path_rate": -0.1}, "drop_path_rate"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate"),
        ({"patch_size": (8, 8, 8)}, "patch_size"),
    ],
)
def test_numbers_that_make_no_network_are_refused(given, remedy):
    with pytest.raises(ValueError, match=remedy):
        encoder("toy", pretrained=False, **given)


def test_an_unknown_variant_gets_the_nearest_one():
    with pytest.raises(ValueError, match=r"Did you mean 'vit_b'\?"):
        encoder("vitb", pretrained=False)


@pytest.mark.parametrize(
    "name", [None, 3, ["toy"], "x" * 5000], ids=["none", "int", "list", "long"]
)
def test_what_is_no_variant_is_refused_in_few_words(name):
    with pytest.raises(ValueError, match="variant") as caught:
        encoder(name, pretrained=False)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("build", [encoder, sam])
@pytest.mark.parametrize("given", ["no", None])
def test_text_for_yes_or_no_is_refused(build, given):
    with pytest.raises(TypeError, match="pretrained="):
        build("toy", pretrained=given)


@pytest.mark.parametrize("side", [float("nan"), None, "x", (16, 16)])
def test_an_input_size_that_is_none_is_refused_later_too(side):
    with pytest.raises(ValueError, match="img_size="):
        encoder("toy", pretrained=False).set_input_size(side)


@pytest.mark.parametrize("given", [None, np.zeros((1, 1, 16, 16, 16)), {"image": 1}])
def test_what_is_no_tensor_is_refused(given):
    with pytest.raises(TypeError, match="tensor"):
        encoder("toy", pretrained=False)(given)


def test_weights_of_another_variant_are_refused_before_any_download():
    with pytest.raises(ValueError, match=r"call encoder\('vit_b', weights='turbo'\)"):
        encoder("toy", weights="turbo")


def test_the_example_in_the_docstring_runs():
    done = doctest.testmod(factory)
    assert (done.failed, done.attempted) == (0, 4)


# --- files -----------------------------------------------------------------------------------


LAYOUTS = {
    "encoder only": lambda t: t,
    "encoder only under its prefix": lambda t: {f"{ENCODER}{n}": v for n, v in t.items()},
    "module. prefix": lambda t: {f"module.{ENCODER}{n}": v for n, v in t.items()},
    "full model": lambda t: {
        **{f"{ENCODER}{n}": v for n, v in t.items()},
        "prompt_encoder.no_mask_embed.weight": torch.zeros(1, 8),
        "mask_decoder.iou_token.weight": torch.zeros(1, 8),
    },
    "training run": lambda t: {
        "model_state_dict": {f"{ENCODER}{n}": v for n, v in t.items()},
        "args": argparse.Namespace(lr=1.0),
        "epoch": 1,
    },
    "state_dict": lambda t: {"state_dict": t},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_file_in_any_layout_gives_the_network_that_made_it(tmp_path, source, layout):
    torch.save(layout(source.state_dict()), tmp_path / "a.pth")
    network = encoder("toy", weights=tmp_path / "a.pth").eval()
    assert same(network, source)
    assert torch.equal(network(volume()), source(volume()))
    report = network.load_report
    assert set(report.matched) == set(source.state_dict())
    changes = (report.missing, report.unexpected, report.adapted, report.reshaped)
    assert changes == ((), (), (), ())


def test_the_network_carries_the_record_of_its_file(tmp_path, source):
    path = save(source, tmp_path / "a.pth")
    record = encoder("toy", weights=path).pretrained_cfg
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (record.variant, record.status) == ("toy", "local file")


def test_a_record_inside_a_file_reaches_the_network(tmp_path, source):
    path = tmp_path / "a.safetensors"
    inside = Weights(name="mine", variant="toy", preprocessing=SAM_MED3D, rel_pos="sammed3d")
    write(path, source.state_dict(), to_metadata(inside))
    network = encoder("toy", weights=path)
    assert same(network, source)
    assert network.pretrained_cfg.preprocessing == SAM_MED3D
    assert network.pretrained_cfg.status == "local file, made from mine"


def test_a_record_inside_a_file_for_another_variant_is_refused(tmp_path, source):
    path = tmp_path / "a.safetensors"
    write(path, source.state_dict(), to_metadata(Weights(name="mine", variant="tiny")))
    with pytest.raises(ValueError, match=r"call encoder\('tiny'"):
        encoder("toy", weights=path)


def test_a_file_with_another_variants_sizes_names_that_variant(tmp_path, source):
    path = save(source, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"call encoder\('toy', weights=\.\.\.\)"):
        encoder("tiny", weights=path)


def test_a_file_that_lacks_tensors_raises_and_never_loads_in_part(tmp_path, source):
    state = source.state_dict()
    del state["blocks.2.attn.qkv.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.2\.attn\.qkv\.weight"):
        encoder("toy", weights=tmp_path / "a.pth")


def test_a_file_of_something_else_raises(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="variant"):
        encoder("toy", weights=tmp_path / "a.pth")


def test_the_variant_of_every_size_is_recognised_from_its_tensors():
    for name in VARIANTS:
        with torch.device("meta"):
            state = encoder(name, pretrained=False).state_dict()
        assert variant_of(state) == name
        assert variant_of({f"{ENCODER}{n}": t for n, t in state.items()}) == name
    assert variant_of({}) is None


def test_weights_alone_choose_the_variant(tmp_path, source, fine_tuned):
    write(tmp_path / "toy.safetensors", source.state_dict(), {})
    assert variant_for("tiny") == "tiny"
    assert variant_for(fine_tuned()) == "tiny"
    assert variant_for(tmp_path / "toy.safetensors") == "toy"
    assert variant_for(None) == variant_for("hf-hub:some/where") == "vit_b"


def test_the_released_files_tensors_are_those_of_vit_b():
    shapes = json.loads(GOLDEN.read_text(encoding="utf-8"))
    released = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        ours = encoder_like(released, "vit_b").state_dict()
    assert {f"{ENCODER}{n}": list(t.shape) for n, t in ours.items()} == {
        n: shape for n, shape in shapes.items() if n.startswith(ENCODER)
    }


# --- channels, sizes, positions --------------------------------------------------------------


@pytest.mark.parametrize("gains", [None, (0.5, 0.25, 0.25, 0)])
def test_more_channels_keep_the_response(tmp_path, source, gains):
    path = save(source, tmp_path / "a.pth")
    network = encoder("toy", weights=path, in_chans=4, channel_gains=gains).eval()
    assert torch.allclose(network(volume(channels=4)), source(volume()), atol=1e-4)
    assert "4 channels" in str(network.load_report)


def test_gains_without_weights_to_adapt_are_refused():
    with pytest.raises(ValueError, match="channel_gains"):
        encoder("toy", pretrained=False, in_chans=2, channel_gains=(0.5, 0.5))


@pytest.mark.parametrize("build", [encoder, sam])
def test_weights_contradict_random_initialisation(build):
    with pytest.raises(ValueError, match="pretrained=False"):
        build("tiny", pretrained=False, weights="tiny")


def test_another_size_resamples_the_position_table_and_nothing_else(tmp_path, source):
    path = save(source, tmp_path / "a.pth")
    network = encoder("toy", weights=path, img_size=48).eval()
    (change,) = network.load_report.reshaped
    assert str(change) == ("pos_embed: (1, 4, 4, 4, 24) -> (1, 6, 6, 6, 24), resampled trilinearly")
    expected = torch.nn.functional.interpolate(
        source.pos_embed.movedim(-1, 1), size=(6, 6, 6), mode="trilinear"
    ).movedim(1, -1)
    assert torch.allclose(network.pos_embed, expected)
    assert torch.equal(network.blocks[1].attn.rel_pos_d, source.blocks[1].attn.rel_pos_d)
    source.set_input_size(48)
    assert torch.equal(network(volume(48)), source(volume(48)))


def test_another_patch_resamples_the_filter_and_nothing_else(tmp_path, source):
    path = save(source, tmp_path / "a.pth")
    network = encoder("toy", weights=path, patch_size=16)
    assert network.img_size == (64, 64, 64)
    (change,) = network.load_report.reshaped
    assert (change.name, change.rule) == (
        "patch_embed.proj.weight",
        "resampled by the pseudo-inverse",
    )
    same_volume = encoder("toy", weights=path, patch_size=16, img_size=32)
    assert same_volume(volume(32)).shape == (1, 8, 2, 2, 2)


def test_a_network_with_another_patch_is_stored_and_found_again(tmp_path, source):
    source.set_patch_size(4)
    path = save(source, tmp_path / "a.pth")
    again = encoder("toy", weights=path).eval()
    assert (again.patch_size, again.img_size) == (4, (16, 16, 16))
    assert torch.equal(again(volume(16)), source(volume(16)))


def test_a_random_start_may_have_another_patch():
    network = encoder("toy", pretrained=False, patch_size=4, img_size=8)
    assert network(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 8, 2, 2, 2)


def test_the_size_that_weights_were_stored_with_is_the_default(tmp_path, generator):
    bigger = filled(encoder("toy", pretrained=False, img_size=48), generator)
    network = encoder("toy", weights=save(bigger, tmp_path / "a.pth")).eval()
    assert network.img_size == (48, 48, 48)
    assert same(network, bigger)


def test_a_network_that_was_resized_is_stored_and_found_again(tmp_path, source):
    source.set_input_size(48)  # new position table, old relative tables
    network = encoder("toy", weights=save(source, tmp_path / "a.pth")).eval()
    assert same(network, source)
    assert torch.equal(network(volume(48)), source(volume(48)))
    again = encoder("toy", weights=tmp_path / "a.pth", img_size=32)
    assert again.img_size == (32, 32, 32)
    assert len(again.load_report.reshaped) == 1


def test_axial_positions_on_other_weights_say_that_they_need_fine_tuning(tmp_path, source, caplog):
    network = encoder("toy", weights=save(source, tmp_path / "a.pth"), rel_pos="axial")
    assert "fine-tune before use" in caplog.text
    assert "relative positions: not known -> axial" in str(network.load_report)


def test_axial_weights_load_as_what_they_are(tmp_path, generator, caplog):
    box = (16, 24, 32)
    axial = filled(encoder("toy", pretrained=False, rel_pos="axial", img_size=box), generator)
    path = tmp_path / "a.safetensors"
    write(path, axial.state_dict(), to_metadata(Weights(name="ours", rel_pos="axial")))
    for given in ({}, {"rel_pos": "axial"}):
        network = encoder("toy", weights=path, **given).eval()
        assert network.img_size == box
        assert same(network, axial)
    assert not caplog.text
    with pytest.raises(ValueError, match="rel_pos='axial'"):
        encoder("toy", weights=path, rel_pos="sammed3d")


# --- the Hub ---------------------------------------------------------------------------------


def test_a_file_on_the_hub_becomes_a_network(loopback_hub, tmp_path, source):
    path = save(source, tmp_path / "a.pth")
    loopback_hub.publish("someone/net", "toy.pth", path.read_bytes())
    network = encoder("toy", weights="hf-hub:someone/net", weights_file="toy.pth")
    assert same(network, source)
    assert network.pretrained_cfg.repo_id == "someone/net"


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_file_from_the_hub_runs_nothing(loopback_hub, tmp_path, source):
    path = save(source, tmp_path / "a.pth", args=Hostile(tmp_path / "it ran"))
    loopback_hub.publish("someone/net", "toy.pth", path.read_bytes())
    with pytest.raises(CheckpointError, match="mkdir"):
        encoder("toy", weights="hf-hub:someone/net", weights_file="toy.pth")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.slow
def test_the_default_encoder_at_full_size_through_the_hub(loopback_hub, tmp_path, monkeypatch):
    """`encoder()` on a file with the released file's names, shapes and layout."""
    shapes = json.loads(GOLDEN.read_text(encoding="utf-8"))
    tensors = {n: torch.full(shape, float(i)) for i, (n, shape) in enumerate(shapes.items())}
    path = tmp_path / "turbo.pth"
    torch.save({"model_state_dict": tensors}, path)
    content = path.read_bytes()
    listed = dataclasses.replace(WEIGHTS["turbo"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(WEIGHTS, "turbo", listed)
    loopback_hub.publish(listed.repo_id, listed.filename, content)
    assert DEFAULT_WEIGHTS["vit_b"] == "turbo"

    network = encoder()

    assert network.pretrained_cfg == listed
    assert len(network.load_report.matched) == 189
    assert len(network.load_report.unused) == 135
    state = network.state_dict()
    assert all(torch.equal(state[n], tensors[f"{ENCODER}{n}"]) for n in state)

    torch.save({"model_state_dict": tensors, "args": argparse.Namespace(lr=8e-4)}, path)
    local = encoder("vit_b", weights=path)
    assert same(local, network)
    assert local.pretrained_cfg.status == "local file"
    del local

    whole = sam()
    assert whole.pretrained_cfg == listed
    assert (len(whole.load_report.matched), whole.load_report.unused) == (324, ())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in whole.state_dict().items())


# --- the promptable network ------------------------------------------------------------------


@pytest.fixture
def promptable(generator):
    """A toy promptable network of which no value is zero."""
    network = sam("toy", pretrained=False, point_pos="aligned")
    return filled(network, generator)


def challenge(state):
    """A state dict with the box corners of the challenge's files."""
    corners = {f"prompt_encoder.point_embeddings.{i}.weight": torch.ones(1, 8) for i in (2, 3)}
    return {**state, **corners}


def test_a_promptable_file_and_its_safetensors_twin_give_the_network(tmp_path, promptable):
    old = save(promptable, tmp_path / "a.pth", args=argparse.Namespace(lr=1.0))
    twin = tmp_path / "a.safetensors"
    write(twin, promptable.state_dict(), {})
    clicks = torch.tensor([[[3, 4, 5]]]), torch.ones(1, 1)
    for path in (old, twin):
        network = sam("toy", weights=path).eval()
        assert same(network, promptable)
        assert torch.equal(network(volume(), clicks), promptable(volume(), clicks))
        report = network.load_report
        assert set(report.matched) == set(promptable.state_dict())
        assert (report.missing, report.unexpected, report.unused) == ((), (), ())
        assert network.pretrained_cfg.point_pos == "aligned"
        assert same(encoder("toy", weights=path), promptable.image_encoder)


def test_a_file_of_the_challenge_loads_and_says_that_its_corners_are_not_used(tmp_path, promptable):
    path = tmp_path / "a.pth"
    torch.save({"model_state_dict": challenge(promptable.state_dict())}, path)
    network = sam("toy", weights=path)
    assert same(network, promptable)
    report = str(network.load_report)
    assert "full model of the challenge" in report
    assert (
        "not used by this network: prompt_encoder.point_embeddings.2.weight, "
        "prompt_encoder.point_embeddings.3.weight" in report
    )
    assert network.load_report.unexpected == ()


def test_a_promptable_network_may_have_another_size(tmp_path, promptable):
    path = save(promptable, tmp_path / "a.pth")
    network = sam("toy", weights=path, img_size=48)
    (change,) = network.load_report.reshaped
    assert str(change).startswith("image_encoder.pos_embed: (1, 4, 4, 4, 24) -> (1, 6, 6, 6, 24)")
    assert network.prompt_encoder.mask_size == (24, 24, 24)
    assert sam("toy", pretrained=False, point_pos="aligned", img_size=48).img_size == (48, 48, 48)


def test_positions_are_those_of_the_weights(tmp_path, promptable):
    path = save(promptable, tmp_path / "a.pth")
    assert sam("toy", weights=path, point_pos="aligned").prompt_encoder.point_pos == "aligned"
    with pytest.raises(ValueError, match="point_pos"):
        sam("toy", weights=path, point_pos="swapped")


def test_axial_promptable_weights_load_as_what_they_are(tmp_path, generator):
    axial = sam("toy", pretrained=False, rel_pos="axial", point_pos="aligned")
    path = tmp_path / "a.safetensors"
    write(path, axial.state_dict(), to_metadata(Weights(name="ours", rel_pos="axial")))
    assert same(sam("toy", weights=path), axial)
    assert same(sam("toy", weights=path, rel_pos="axial"), axial)
    with pytest.raises(ValueError, match="rel_pos='axial'"):
        sam("toy", weights=path, rel_pos="sammed3d")


def test_an_encoder_alone_is_no_promptable_network(tmp_path, source):
    path = save(source, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="mask decoder"):
        sam("toy", weights=path)


def test_a_fine_tuned_network_takes_no_prompts(tmp_path, source):
    path = tmp_path / "a.safetensors"
    card = {CARD_KEY: json.dumps({"network": "unetr", "encoder": {"variant": "toy"}})}
    write(path, {f"encoder.{n}": t for n, t in source.state_dict().items()}, card)
    with pytest.raises(CheckpointError, match="unetr"):
        sam("toy", weights=path)


def test_a_promptable_file_that_lacks_tensors_raises(tmp_path, promptable):
    state = promptable.state_dict()
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"missing \(mask_decoder\.iou_token\.weight\)"):
        sam("toy", weights=tmp_path / "a.pth")


def test_promptable_weights_of_another_variant_name_the_call(tmp_path, promptable):
    with pytest.raises(ValueError, match=r"call sam\('vit_b', weights='turbo'\)"):
        sam("toy", weights="turbo")
    with pytest.raises(CheckpointError, match=r"call sam\('toy', weights=\.\.\.\)"):
        sam("tiny", weights=save(promptable, tmp_path / "a.pth"))


def test_a_promptable_network_never_starts_at_random_by_itself():
    with pytest.raises(ValueError, match="pretrained=False"):
        sam("toy")
    network = sam("toy", pretrained=False, point_pos="aligned")
    assert (network.pretrained_cfg, network.load_report) == (None, None)


def test_the_released_files_tensors_are_those_of_the_promptable_vit_b():
    shapes = json.loads(GOLDEN.read_text(encoding="utf-8"))
    released = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    for stored in (released, challenge(released)):
        with torch.device("meta"):
            network = sam_like(stored, "vit_b")
        assert {n: list(t.shape) for n, t in network.state_dict().items()} == shapes
        assert network.prompt_encoder.point_pos == "swapped"
