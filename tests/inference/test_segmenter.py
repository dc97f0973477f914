"""A fine-tuned network and all it needs <-> one file; a volume in, labels out."""

import json
from copy import copy
from dataclasses import replace

import hub_server
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sammed3d_backbone.adapters.unetr import unetr
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import ByFiles, Segmenter, build_network
from sammed3d_backbone.loading.checkpoint import read, write
from sammed3d_backbone.loading.factory import encoder
from sammed3d_backbone.loading.opening import CARD_KEY

loopback_hub = hub_server.loopback_hub  # a fixture


PREPROCESSING = Preprocessing(
    (1.0, 1.0, 1.0), {"default": "zscore_positive"}, "volume", (16, 16, 16)
)


def card(**changes):
    values = {
        "network": "unetr",
        "encoder": {"variant": "tiny", "in_chans": 1, "img_size": 16, "rel_pos": "sammed3d"},
        "adapter": {"feature_size": 4},
        "labels": {0: "background", 1: "head", 2: "tail"},
        "channels": ("MRI",),
        "preprocessing": PREPROCESSING,
        "training": {"config": {"lr": 1e-3}},
        "versions": {"torch": torch.__version__},
    }
    return Card(**values | changes)


BASIC = {"network": "basicunet", "encoder": {}, "adapter": {"features": [4, 4, 8, 8, 8, 4]}}
BASIC["preprocessing"] = replace(PREPROCESSING, crop_vox=(32,) * 3)  # it halves it four times


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return Segmenter(build_network(card()).eval(), card())


class Threshold(nn.Module):
    """Says class 1 where the image is above a value: what goes in is what comes out."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(50.0))

    def forward(self, x):
        logits = self.gain * (x - 1.57)  # half way up the edge of the phantom below
        return torch.cat([-logits, logits], dim=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"network": "flexible_unet", "adapter": {"feature_size": 4, "kind": "multi_level"}},
        {"network": "segresnet", "adapter": {"feature_size": 4, "kind": "conv_stem"}},
        {"network": "linear_head", "adapter": {}},
        {"network": "expanding_head"},
        {"network": "class_prompts", "adapter": {"variant": "tiny"}},
        BASIC,
        {"preprocessing": replace(PREPROCESSING, spacing_mm=None)},
    ],
    ids=[
        "unetr",
        "flexible_unet",
        "segresnet",
        "linear_head",
        "expanding_head",
        "class_prompts",
        "basic",
        "native",
    ],
)
def test_a_network_comes_back_with_its_card(tmp_path, changes, generator):
    torch.manual_seed(1)
    given = Segmenter(build_network(card(**changes)).eval(), card(**changes))
    given.save(tmp_path / "model.safetensors")
    back = Segmenter.from_pretrained(tmp_path / "model.safetensors")
    assert back.card == given.card
    assert not back.model.training
    volume = torch.randn(1, 34, 36, 32, generator=generator)
    assert torch.equal(back.logits(volume), given.logits(volume))


@pytest.mark.parametrize("stored_size", [16, 24])
def test_an_encoder_from_weights_of_another_size_comes_back(tmp_path, stored_size, generator):
    weights = tmp_path / "weights.safetensors"
    stored = encoder("tiny", pretrained=False, img_size=stored_size)
    for parameter in stored.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    write(weights, stored.state_dict(), {})
    described = card(
        encoder={**card().encoder, "img_size": 32},
        preprocessing=replace(PREPROCESSING, crop_vox=(32, 32, 32)),
    )
    backbone = encoder(weights=weights, **described.encoder)
    given = Segmenter(unetr(backbone, 3, **described.adapter).eval(), described)
    given.save(tmp_path / "model.safetensors")
    back = Segmenter.from_pretrained(tmp_path / "model.safetensors")
    volume = torch.randn(1, 32, 32, 32, generator=generator)
    assert torch.equal(back.logits(volume), given.logits(volume))


def test_a_file_whose_position_table_is_not_its_cards_is_refused(tmp_path, segmenter):
    described = replace(segmenter.card, encoder={**card().encoder, "img_size": 32})
    Segmenter(segmenter.model, described).save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="pos_embed"):
        Segmenter.from_pretrained(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "token"),
    [
        (lambda t: t.fill_(float("nan")), "non-finite"),
        (lambda t: t.to(torch.int8), "int8"),
        (lambda t: t.to(torch.complex64), "complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "float8"),
    ],
    ids=["nan", "int8", "complex", "fp8"],
)
def test_a_model_with_other_values_than_numbers_is_refused(tmp_path, segmenter, damage, token):
    segmenter.save(tmp_path / "model.safetensors")
    tensors, metadata = read(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("norm1.weight"))
    tensors[name] = damage(tensors[name])
    write(tmp_path / "model.safetensors", tensors, metadata, overwrite=True)
    with pytest.raises(ValueError, match=token):
        Segmenter.from_pretrained(tmp_path / "model.safetensors")


def test_a_model_with_a_flipped_bit_is_refused(tmp_path, segmenter):
    path = tmp_path / "model.safetensors"
    segmenter.save(path)
    content = bytearray(path.read_bytes())
    content[-4001] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ValueError, match="content_sha256"):
        Segmenter.from_pretrained(path)


def test_a_file_can_be_written_over(tmp_path, segmenter):
    for _ in range(2):
        segmenter.save(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize(
    "affine",
    [
        np.diag([1.0, 1.0, 1.0, 1.0]),
        np.array([[0, 0, -2.0, 5], [-0.7, 0, 0, 1], [0, 1.3, 0, 2], [0, 0, 0, 1]]),
        np.array([[1.5, 0.1, 0, 5], [-0.1, 1.5, 0.2, 1], [0, -0.2, 1.5, 2], [0, 0, 0, 1]]),
    ],
    ids=["plain", "turned", "oblique"],
)
def test_labels_lie_on_the_volumes_own_grid_with_its_affine(affine, nearest):
    array = np.full((20, 14, 22), 1.0, dtype=np.float32)
    array[6:14, 4:10, 5:15] = 100
    volume = Volume(array, affine)
    segmenter = Segmenter(Threshold(), card(labels={0: "background", 1: "bright"}))
    found = segmenter.predict(volume, nearest=nearest)
    assert found.array.shape == array.shape
    assert found.array.dtype == np.uint8
    assert np.array_equal(found.affine, affine)
    bright = array > 50
    assert 2 * (bright & (found.array == 1)).sum() / (bright.sum() + found.array.sum()) > 0.95
    if affine[0, 0] == 1:
        assert np.array_equal(found.array, bright)


@pytest.mark.parametrize(("keep_largest", "islands"), [(False, 2), (True, 0)])
def test_islands_are_left_out_where_only_the_largest_component_is_kept(keep_largest, islands):
    array = np.full((20, 20, 20), 1.0, dtype=np.float32)
    array[4:10, 4:10, 4:10] = 100
    array[10, 10, 10] = 100  # touches the cube at a corner: no island
    array[16:18, 4, 4] = 100
    labels = {0: "background", 1: "bright"}
    segmenter = Segmenter(Threshold(), card(labels=labels, keep_largest_component=keep_largest))
    found = segmenter.predict(Volume(array, np.eye(4))).array
    assert found[:11, :11, :11].sum() == 6**3 + 1
    assert found.sum() - found[:11, :11, :11].sum() == islands


def test_half_precision_is_near_and_goes_along_to_workers(segmenter, rng, tmp_path):
    segmenter.save(tmp_path / "model.safetensors")
    image = torch.from_numpy(rng.normal(size=(1, 20, 18, 16)).astype(np.float32))
    half = replace(Segmenter.from_pretrained(tmp_path / "model.safetensors"), precision="bf16")
    expected = segmenter.logits(image)
    sent = copy(ByFiles(half)).segmenter  # as a worker opens it
    for found in (half.logits(image), sent.logits(image)):
        assert found.dtype == torch.float32
        assert 1e-5 < (found - expected).norm() / expected.norm() < 0.03


def test_the_callers_autocast_does_not_change_the_precision(segmenter, rng):
    image = torch.from_numpy(rng.normal(size=(1, 16, 16, 16)).astype(np.float32))
    expected = segmenter.logits(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(segmenter.logits(image), expected)


def test_an_unknown_precision_is_refused(segmenter):
    with pytest.raises(ValueError, match="precision="):
        replace(segmenter, precision="fp16").logits(torch.zeros(1, 16, 16, 16))


def test_several_channels_are_asked_for_by_name(segmenter):
    volume = Volume(np.zeros((2, 16, 16, 16), np.float32), np.eye(4))
    with pytest.raises(ValueError, match="MRI"):
        segmenter.predict(volume)


def test_a_volume_smaller_than_the_window_is_segmented(segmenter):
    volume = Volume(np.random.default_rng(0).normal(size=(5, 30, 9)).astype(np.float32), np.eye(4))
    assert segmenter.predict(volume).array.shape == (5, 30, 9)


def test_a_constant_volume_is_refused(segmenter):
    volume = Volume(np.zeros((16, 16, 16), np.float32), np.eye(4))
    with pytest.raises(ValueError, match="all voxels"):
        segmenter.predict(volume)


def test_an_unknown_network_names_the_known_ones():
    with pytest.raises(ValueError, match="unetr"):
        build_network(card(network="transformer"))


def test_a_file_without_a_card_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="card"):
        Segmenter.from_pretrained(tmp_path / "model.safetensors")


def rewritten(path, segmenter, *, tensors=None, **entries):
    """The model's file with some of it changed."""
    segmenter.save(path)
    values = segmenter.card.to_dict() | entries
    held = load_file(path) | (tensors or {})
    save_file(held, path, metadata={CARD_KEY: json.dumps(values)})
    return path


def test_a_card_of_another_format_is_refused(tmp_path, segmenter):
    path = rewritten(tmp_path / "model.safetensors", segmenter, format=99)
    with pytest.raises(ValueError, match="format"):
        Segmenter.from_pretrained(path)


def test_a_card_with_a_key_of_a_newer_version_is_refused(tmp_path, segmenter):
    path = rewritten(tmp_path / "model.safetensors", segmenter, colour="blue")
    with pytest.raises(ValueError, match="colour"):
        Segmenter.from_pretrained(path)


def with_card(path, segmenter, change):
    """The model's file with its card changed in place."""
    segmenter.save(path)
    values = segmenter.card.to_dict()
    change(values)
    save_file(load_file(path), path, metadata={CARD_KEY: json.dumps(values)})
    return path


def test_a_card_of_an_older_version_has_defaults_for_what_it_does_not_say(tmp_path, segmenter):
    path = with_card(tmp_path / "model.safetensors", segmenter, lambda v: v.pop("overlap"))
    assert Segmenter.from_pretrained(path).card == segmenter.card


def test_a_card_without_what_a_network_needs_is_refused(tmp_path, segmenter):
    path = with_card(tmp_path / "model.safetensors", segmenter, lambda v: v.pop("labels"))
    with pytest.raises(ValueError, match="labels"):
        Segmenter.from_pretrained(path)


def test_a_card_of_a_size_below_0_is_refused(tmp_path, segmenter):
    path = with_card(
        tmp_path / "model.safetensors",
        segmenter,
        lambda v: v.update(adapter={"feature_size": -4}),
    )
    with pytest.raises(ValueError, match="card"):
        Segmenter.from_pretrained(path)


def test_tensors_that_do_not_fit_the_card_are_refused(tmp_path, segmenter):
    path = rewritten(tmp_path / "model.safetensors", segmenter, tensors={"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="extra"):
        Segmenter.from_pretrained(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        Segmenter.from_pretrained(tmp_path / "none.safetensors")


def test_a_damaged_file_is_refused(tmp_path, segmenter):
    path = tmp_path / "model.safetensors"
    segmenter.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="safetensors"):
        Segmenter.from_pretrained(path)


@pytest.mark.parametrize("address", ["me/hippo", "hf-hub:me/hippo", "me/hippo@{commit}"])
def test_a_model_on_the_hub_is_loaded_by_its_address(tmp_path, segmenter, loopback_hub, address):
    segmenter.save(tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    commit = loopback_hub.publish("me/hippo", "model.safetensors", content)
    loopback_hub.publish("me/hippo", "best.safetensors", content)
    address = address.format(commit=commit)
    assert Segmenter.from_pretrained(address).card == segmenter.card
    best = Segmenter.from_pretrained("me/hippo", weights_file="best.safetensors")
    assert best.card == segmenter.card


def test_a_folder_holds_tensors_and_a_readable_card(tmp_path, segmenter, generator):
    segmenter.save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json"}
    back = Segmenter.from_pretrained(tmp_path / "model")
    assert back.card == segmenter.card
    volume = torch.randn(1, 16, 16, 16, generator=generator)
    assert torch.equal(back.logits(volume), segmenter.logits(volume))
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["labels"] == {"0": "background", "1": "head", "2": "tail"}
    config["labels"]["1"] = "front"
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert Segmenter.from_pretrained(tmp_path / "model").card.labels[1] == "front"


def test_networks_that_differ_in_statistics_alone_see_different_windows(rng):
    """A scan whose halves have other scales: by crop they look alike, by volume they do not."""
    array = rng.normal(100, 10, (64, 16, 16)).astype(np.float32)
    array[32:] *= 10
    seen = {}
    for statistics in ("crop", "volume"):
        described = card(preprocessing=replace(PREPROCESSING, statistics=statistics), overlap=0.0)
        segmenter = Segmenter(Threshold(), described)
        windows = []
        segmenter.model.register_forward_pre_hook(lambda _, given, to=windows: to.append(given[0]))
        segmenter.predict(Volume(array, np.eye(4)))
        seen[statistics] = torch.cat(windows).mean((1, 2, 3, 4))
    assert seen["crop"].abs().max() < 1e-3
    assert (seen["crop"] - seen["volume"]).abs().min() > 0.3
    assert seen["volume"].diff()[1] > 1
