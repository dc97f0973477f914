"""A fine-tuned network and all it needs <-> one file; a volume in, labels out."""

import dataclasses
import json

import hub_server
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sammed3d_backbone.adapters.unetr import unetr
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.segmenter import (
    CARD_KEY,
    Card,
    Segmenter,
    build_network,
    load_model,
    save_model,
    segment_volume,
    without_folder,
)
from sammed3d_backbone.loading.checkpoint import write
from sammed3d_backbone.loading.factory import encoder

loopback_hub = hub_server.loopback_hub  # a fixture


def card(**changes):
    values = {
        "network": "unetr",
        "encoder": {"variant": "tiny", "in_chans": 1, "img_size": 16, "rel_pos": "sammed3d"},
        "adapter": {"feature_size": 4},
        "labels": {0: "background", 1: "head", 2: "tail"},
        "channels": ("MRI",),
        "spacing_mm": (1.0, 1.0, 1.0),
        "intensity": "zscore_positive",
        "crop_vox": 16,
        "training": {"config": {"lr": 1e-3}},
        "versions": {"torch": torch.__version__},
    }
    return Card(**values | changes)


BASIC = {"network": "basicunet", "encoder": {}, "adapter": {"features": [4, 4, 8, 8, 8, 4]}}
BASIC["crop_vox"] = 32  # it halves its input four times


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
        BASIC,
        {"spacing_mm": None},
    ],
    ids=["unetr", "flexible_unet", "segresnet", "linear_head", "expanding_head", "basic", "native"],
)
def test_a_network_comes_back_with_its_card(tmp_path, changes, generator):
    torch.manual_seed(1)
    given = Segmenter(build_network(card(**changes)).eval(), card(**changes))
    save_model(tmp_path / "model.safetensors", given)
    back = load_model(tmp_path / "model.safetensors")
    assert back.card == given.card
    assert not back.model.training
    volume = torch.randn(1, 34, 36, 32, generator=generator)
    assert torch.equal(back.logits(volume), given.logits(volume))


@pytest.mark.parametrize("stored_size", [16, 24])
def test_an_encoder_from_weights_of_another_size_comes_back(tmp_path, stored_size, generator):
    weights = tmp_path / "weights.safetensors"
    stored = encoder("tiny", weights="none", img_size=stored_size)
    for parameter in stored.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    write(weights, stored.state_dict(), {})
    described = card(encoder={**card().encoder, "img_size": 32}, crop_vox=32)
    backbone = encoder(weights=weights, **described.encoder)
    given = Segmenter(unetr(backbone, 3, **described.adapter).eval(), described)
    save_model(tmp_path / "model.safetensors", given)
    back = load_model(tmp_path / "model.safetensors")
    volume = torch.randn(1, 32, 32, 32, generator=generator)
    assert torch.equal(back.logits(volume), given.logits(volume))


def test_a_file_whose_position_table_is_not_its_cards_is_refused(tmp_path, segmenter):
    described = dataclasses.replace(segmenter.card, encoder={**card().encoder, "img_size": 32})
    save_model(tmp_path / "model.safetensors", Segmenter(segmenter.model, described))
    with pytest.raises(ValueError, match=r"(?s)pos_embed.*copy it again"):
        load_model(tmp_path / "model.safetensors")


def test_a_file_can_be_written_over(tmp_path, segmenter):
    for _ in range(2):
        save_model(tmp_path / "model.safetensors", segmenter)
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
    found = segment_volume(
        Segmenter(Threshold(), card(labels={0: "background", 1: "bright"})), volume, nearest=nearest
    )
    assert found.array.shape == array.shape
    assert found.array.dtype == np.uint8
    assert np.array_equal(found.affine, affine)
    bright = array > 50
    assert 2 * (bright & (found.array == 1)).sum() / (bright.sum() + found.array.sum()) > 0.95
    if affine[0, 0] == 1:
        assert np.array_equal(found.array, bright)


@pytest.mark.parametrize(("one_piece", "islands"), [(False, 2), (True, 0)])
def test_islands_are_left_out_where_every_class_is_one_piece(one_piece, islands):
    array = np.full((20, 20, 20), 1.0, dtype=np.float32)
    array[4:10, 4:10, 4:10] = 100
    array[10, 10, 10] = 100  # touches the cube at a corner: no island
    array[16:18, 4, 4] = 100
    segmenter = Segmenter(
        Threshold(), card(labels={0: "background", 1: "bright"}, one_piece=one_piece)
    )
    found = segment_volume(segmenter, Volume(array, np.eye(4))).array
    assert found[:11, :11, :11].sum() == 6**3 + 1
    assert found.sum() - found[:11, :11, :11].sum() == islands


def test_several_channels_are_asked_for_by_name(segmenter):
    volume = Volume(np.zeros((2, 16, 16, 16), np.float32), np.eye(4))
    with pytest.raises(ValueError, match="2 channels, the model needs 1: MRI; stack"):
        segment_volume(segmenter, volume)


def test_a_volume_smaller_than_the_window_is_segmented(segmenter):
    volume = Volume(np.random.default_rng(0).normal(size=(5, 30, 9)).astype(np.float32), np.eye(4))
    assert segment_volume(segmenter, volume).array.shape == (5, 30, 9)


def test_an_empty_volume_gives_labels(segmenter):
    volume = Volume(np.zeros((16, 16, 16), np.float32), np.eye(4))
    assert segment_volume(segmenter, volume).array.max() <= 2


def test_an_unknown_network_names_the_known_ones():
    with pytest.raises(ValueError, match=r"this version knows unetr, flexible_unet, .*, basicunet"):
        build_network(card(network="transformer"))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/me/own.pth", "own.pth"),
        ("sam2d:/home/me/own.pth", "sam2d:own.pth"),
        ("sam2d-mean:/home/me/a:b.pth", "sam2d-mean:a:b.pth"),
        ("sam2d:hub", "sam2d:hub"),
        ("sam2d:org/net@main:x.safetensors", "sam2d:org/net@main:x.safetensors"),
        ("runs/own.pth", "runs/own.pth"),
        ("https://host/x.pth", "https://host/x.pth"),
    ],
)
def test_cards_hold_no_folders_of_the_machine_that_trained(text, kept):
    assert without_folder(text) == kept


def test_a_file_without_a_card_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"pass a model that recipes/finetune_unetr\.py wrote"):
        load_model(tmp_path / "model.safetensors")


def rewritten(path, segmenter, *, tensors=None, **entries):
    """The model's file with some of it changed."""
    save_model(path, segmenter)
    values = json.loads(segmenter.card.to_json()) | entries
    held = load_file(path) | (tensors or {})
    save_file(held, path, metadata={CARD_KEY: json.dumps(values)})
    return path


def test_a_card_of_another_format_is_refused(tmp_path, segmenter):
    path = rewritten(tmp_path / "model.safetensors", segmenter, format=99)
    with pytest.raises(ValueError, match="reads 1; upgrade sammed3d-backbone"):
        load_model(path)


def test_a_card_with_a_key_of_a_newer_version_is_refused(tmp_path, segmenter):
    path = rewritten(tmp_path / "model.safetensors", segmenter, colour="blue")
    with pytest.raises(ValueError, match=r"colour.*upgrade sammed3d-backbone"):
        load_model(path)


def with_card(path, segmenter, change):
    """The model's file with its card changed in place."""
    save_model(path, segmenter)
    values = json.loads(segmenter.card.to_json())
    change(values)
    save_file(load_file(path), path, metadata={CARD_KEY: json.dumps(values)})
    return path


def test_a_card_of_an_older_version_has_defaults_for_what_it_does_not_say(tmp_path, segmenter):
    path = with_card(tmp_path / "model.safetensors", segmenter, lambda v: v.pop("overlap"))
    assert load_model(path).card == segmenter.card


def test_a_card_without_what_a_network_needs_is_refused(tmp_path, segmenter):
    path = with_card(tmp_path / "model.safetensors", segmenter, lambda v: v.pop("labels"))
    with pytest.raises(ValueError, match=r"lacks \['labels'\]; copy the file again"):
        load_model(path)


def test_tensors_that_do_not_fit_the_card_are_refused(tmp_path, segmenter):
    path = rewritten(tmp_path / "model.safetensors", segmenter, tensors={"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"(?s)extra.*copy it again"):
        load_model(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_model(tmp_path / "none.safetensors")


def test_a_damaged_file_is_refused(tmp_path, segmenter):
    path = tmp_path / "model.safetensors"
    save_model(path, segmenter)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_model(path)


def test_a_model_on_the_hub_is_loaded_by_its_address(tmp_path, segmenter, loopback_hub):
    save_model(tmp_path / "model.safetensors", segmenter)
    content = (tmp_path / "model.safetensors").read_bytes()
    loopback_hub.publish("me/hippo", "last.safetensors", content)
    assert load_model("me/hippo:last.safetensors").card == segmenter.card
