"""Encoder and decoder of a UNETR from one file: a weights file or a fine-tuned model."""

from dataclasses import replace

import pytest
import torch

from sammed3d_backbone import encoder, sam, unetr
from sammed3d_backbone.adapters.channels import SharedEncoder
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import Segmenter
from sammed3d_backbone.loading.checkpoint import CheckpointError, read, write
from sammed3d_backbone.loading.registry import UnetrDecoder, Weights, from_metadata, to_metadata
from sammed3d_backbone.loading.variants import VARIANTS, DecoderSizes, Variant

TOY = Variant(
    img_size=16,
    patch_size=4,
    embed_dim=24,
    depth=4,
    num_heads=2,
    global_attn_indexes=(0, 1, 2, 3),
    out_chans=8,
    rel_pos="axial",
    decoder=DecoderSizes(
        mask_in_chans=4, num_heads=2, mlp_dim=8, iou_head_hidden_dim=8, point_pos="aligned"
    ),
)
STORED = UnetrDecoder(4, 4, (1, 3), ("liver",))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """A variant that costs nothing."""
    monkeypatch.setitem(VARIANTS, "toy", TOY)


@pytest.fixture
def whole(tmp_path):
    """A file with a promptable network and a UNETR decoder in half precision, and the UNETR."""
    torch.manual_seed(0)
    network = sam("toy", pretrained=False)
    decoded = unetr(encoder("toy", pretrained=False), 2, feature_size=4)
    own = network.image_encoder.state_dict()
    decoded.encoder.load_state_dict({name: own[name] for name in decoded.encoder.state_dict()})
    decoder = {
        f"unetr.{name}": tensor
        for name, tensor in decoded.state_dict().items()
        if not name.startswith(("encoder.", "out."))
    }
    tensors = {k: v.half() for k, v in {**network.state_dict(), **decoder}.items()}
    record = Weights(name="toy", variant="toy", rel_pos="axial", unetr=STORED)
    write(tmp_path / "whole.safetensors", tensors, to_metadata(record))
    decoded.load_state_dict({k: v.half() for k, v in decoded.state_dict().items()})
    return tmp_path / "whole.safetensors", decoded


def filled(network):
    """The tensors of a network but those of its classes."""
    return {k: v for k, v in network.state_dict().items() if not k.startswith("out.")}


def volume(channels=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 1, 16, 16, 16, generator=generator).expand(-1, channels, -1, -1, -1)


@pytest.mark.parametrize("pretrained", [True, False])
def test_one_file_fills_encoder_and_decoder_but_the_last_layer(whole, pretrained):
    path, expected = whole
    weights = path if pretrained else None
    network = unetr(encoder("toy", pretrained=pretrained, weights=weights), 3, weights=path)
    wanted = filled(expected)
    assert filled(network).keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in filled(network).items())
    report = network.load_report
    assert {*report.matched} == {*wanted}
    assert [name.split(".")[0] for name in report.missing] == ["out", "out"]
    assert not report.unexpected
    assert network.encoder.pretrained_cfg.unetr == STORED


def test_the_promptable_network_and_the_encoder_of_such_a_file_are_those_without_it(whole):
    path, expected = whole
    network, backbone = sam("toy", weights=path), encoder("toy", weights=path)
    assert not network.load_report.missing + network.load_report.unexpected
    decoder = [name for name in network.load_report.unused if name.startswith("unetr.")]
    assert len(decoder) == len([name for name in filled(expected) if "encoder." not in name])
    assert {*decoder} <= {*backbone.load_report.unused}
    mine = expected.encoder.state_dict()
    assert all(torch.equal(backbone.state_dict()[name], tensor) for name, tensor in mine.items())


@pytest.mark.parametrize("gains", [None, (0.75, 0.25)])
def test_several_equal_channels_give_what_one_gave(whole, gains):
    path, _ = whole
    one = unetr(encoder("toy", weights=path), 2, feature_size=4, weights=path).eval()
    two = unetr(
        encoder("toy", weights=path, in_chans=2, channel_gains=gains),
        2,
        feature_size=4,
        weights=path,
    ).eval()
    two.out.load_state_dict(one.out.state_dict())
    torch.testing.assert_close(two(volume(2)), one(volume()), rtol=1e-4, atol=1e-5)
    kernel = two.state_dict()["stem.layer.conv1.conv.weight"]
    share = 1 if gains is None else gains[0] / gains[1]
    torch.testing.assert_close(kernel[:, 0], share * kernel[:, 1])
    assert "stem.layer.conv1.conv.weight" in {c.name for c in two.load_report.adapted}


def test_an_encoder_shared_by_channels_keeps_its_one_channel(whole):
    path, _ = whole
    shared = SharedEncoder(encoder("toy", weights=path), 2)
    network = unetr(shared, 2, feature_size=4, weights=path)
    kernel = network.state_dict()["stem.layer.conv1.conv.weight"]
    assert torch.equal(kernel[:, 0], kernel[:, 1])
    assert "encoder.encoder.pos_embed" in network.load_report.matched


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"feature_size": 8}, "feature_size=4"),
        ({"patch_size": 8}, "patch_size=4"),
        ({"out_indices": (0, 3)}, r"out_indices=\(1, 3\)"),
        ({"res_block": False}, "defaults of unetr"),
    ],
    ids=lambda value: str(value),
)
def test_another_decoder_is_refused_with_the_value_that_fits(whole, changes, remedy):
    path, _ = whole
    changes = {"feature_size": 4, **changes}
    backbone = encoder("toy", weights=path, patch_size=changes.pop("patch_size", None))
    with pytest.raises(CheckpointError, match=remedy):
        unetr(backbone, 2, weights=path, **changes)


def test_a_file_without_a_decoder_fills_the_encoder_and_says_so(whole, tmp_path, caplog):
    path, expected = whole
    tensors, metadata = read(path)
    record = replace(from_metadata(Weights(name="file"), metadata), unetr=None)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("unetr.")}
    write(tmp_path / "old.safetensors", kept, to_metadata(record))
    backbone = encoder("toy", pretrained=False)
    network = unetr(backbone, 2, feature_size=8, weights=tmp_path / "old.safetensors")
    mine = expected.encoder.state_dict()
    assert all(
        torch.equal(network.encoder.state_dict()[name], tensor) for name, tensor in mine.items()
    )
    assert "stem.layer.conv1.conv.weight" in network.load_report.missing
    assert "no decoder" in caplog.text


def test_a_fine_tuned_model_serves_another_task(whole, tmp_path):
    path, _ = whole
    trained = unetr(encoder("toy", weights=path), 5, feature_size=4, weights=path)
    card = Card(
        "unetr",
        {"variant": "toy", "in_chans": 1, "img_size": 16},
        {"feature_size": 4},
        dict(enumerate("abcde")),
        ("MR",),
        replace(SAM_MED3D, crop_vox=(16, 16, 16)),
    )
    Segmenter(trained, card).save(tmp_path / "model.safetensors")
    backbone = encoder("toy", weights=tmp_path / "model.safetensors")
    assert backbone.rel_pos == "axial"
    network = unetr(backbone, 2, feature_size=4, weights=tmp_path / "model.safetensors")
    wanted = filled(trained)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in filled(network).items())


def test_a_foreign_encoder_cannot_be_filled(whole):
    from foreign import ConvEncoder

    with pytest.raises(ValueError, match="ConvEncoder"):
        unetr(ConvEncoder(patch_size=4), 2, weights=whole[0])
