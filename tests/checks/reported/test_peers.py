"""What other libraries' own suites said of our objects."""

import json

import numpy as np
import pytest
import torch

from sammed3d_backbone import Predictor, Segmenter, encoder, sam, unetr
from sammed3d_backbone.models.attention import Projection
from sammed3d_backbone.models.image_encoder import ImageEncoder3D

from .tools import cli, label, nifti, nnunet, tune


def small(windows, rel_pos="sammed3d", depth=2):
    """A small encoder; a window of 3 tokens is padded, 0 is the whole grid."""
    torch.manual_seed(0)
    network = ImageEncoder3D(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=depth,
        num_heads=2,
        global_attn_indexes=() if windows else range(depth),
        window_size=windows or 3,
        out_chans=16,
        rel_pos=rel_pos,
    ).eval()
    for name, parameter in network.named_parameters():
        if "rel_pos" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize("windows", [0, 3])
@pytest.mark.parametrize("kind", ["IA3", "LoRA", "DoRA"])
def test_adapters_of_peft_equal_their_merged_network(kind, windows):
    peft = pytest.importorskip("peft")
    settings = {
        "IA3": lambda: peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]),
        "LoRA": lambda: peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False),
        "DoRA": lambda: peft.LoraConfig(r=4, target_modules=["qkv"], use_dora=True),
    }[kind]
    adapted, x = (
        peft.get_peft_model(small(windows), settings()).eval(),
        torch.randn(1, 1, 32, 32, 32),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
        given = adapted(x)
        merged = adapted.merge_and_unload().eval()(x)
    assert float((given - merged).norm() / merged.norm()) < 1e-4


@pytest.mark.parametrize("rel_pos", ["sammed3d", "axial"])
@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_not_bound_to_its_batch(rel_pos):
    network, x = encoder("tiny", pretrained=False, rel_pos=rel_pos), torch.randn(2, 1, 64, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(network, x[:1], check_trace=False)
        assert torch.allclose(traced(x), network(x), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rel_pos", ["sammed3d", "axial"])
@pytest.mark.parametrize("windows", [0, 3])
@pytest.mark.filterwarnings("ignore")
def test_the_legacy_onnx_exporter_writes_the_same_numbers(windows, rel_pos, tmp_path):
    network = small(windows, rel_pos, depth=2 if windows else 3)
    network = (network if windows else unetr(network, 2, feature_size=4)).eval()
    x = torch.randn(3, 1, 32, 32, 32)
    opened = legacy_onnx(network, (x[:1],), tmp_path, image=0, output=0)
    with torch.no_grad():
        expected = network(x)
    assert abs(opened(image=x) - expected).max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_legacy_onnx_exporter_writes_a_promptable_network(tmp_path):
    class Clicked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = sam("tiny", pretrained=False)

        def forward(self, image, points, labels):
            return self.network(image, (points, labels))

    network = Clicked().eval()
    x, points, labels = torch.randn(1, 1, 64, 64, 64), 60 * torch.rand(1, 3, 3), torch.ones(1, 3)
    given = (x, points[:, :1], labels[:, :1].long())
    opened = legacy_onnx(network, given, tmp_path, points=1, labels=1)
    with torch.no_grad():
        expected = network(x, points, labels.long())
    difference = opened(image=x, points=points, labels=labels.long()) - expected
    assert abs(difference).max() < 1e-4 * expected.abs().max()


def legacy_onnx(network, given, folder, **free_axes):
    """A network written without dynamo and opened; `free_axes` says which axis is free by name."""
    onnxruntime = pytest.importorskip("onnxruntime")
    names = ["image", "points", "labels"][: len(given)]
    axes = {name: {axis: "free"} for name, axis in free_axes.items()}
    with torch.no_grad():
        torch.onnx.export(
            network,
            given,
            folder / "x.onnx",
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["output"],
            dynamic_axes=axes,
        )
    session = onnxruntime.InferenceSession(folder / "x.onnx", providers=["CPUExecutionProvider"])
    return lambda **x: torch.from_numpy(
        session.run(None, {name: value.numpy() for name, value in x.items()})[0]
    )


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_as_the_page_says():
    network, x = encoder("tiny"), torch.randn(1, 1, 64, 64, 64)
    for part in network.modules():
        if isinstance(part, Projection):
            part.__class__ = torch.nn.Linear
    made = torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear})
    assert "quantized" in type(made.blocks[0].attn.qkv).__module__
    with torch.no_grad():
        expected = encoder("tiny")(x)
        assert (made(x) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.slow
def test_peft_trains_whole_parts_that_are_named_one_by_one():
    peft = pytest.importorskip("peft")
    network = unetr(small(0, depth=3), 2, feature_size=4)
    parts = ["stem", "skips.0", "skips.1", "ups.0", "ups.1", "ups.2", "tap_norms.0", "out.conv"]
    settings = peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=parts)
    adapted = peft.get_peft_model(network, settings)
    adapted(torch.randn(1, 1, 32, 32, 32)).sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    for part in parts:
        assert any(f".{part}." in name for name in trained), part


def test_timms_words():
    network = encoder("tiny", pretrained=False)
    maps = network.forward_intermediates(
        torch.randn(1, 1, 64, 64, 64), indices=[3], output_fmt="NCHW", intermediates_only=True
    )
    assert tuple(maps[0].shape) == (1, 192, 8, 8, 8)
    assert network.num_features == 128  # those of the neck, as in timm


def test_an_image_of_another_library_is_a_volume():
    from monai.data import MetaTensor

    predictor = Predictor(sam("tiny", pretrained=False))
    predictor.set_volume(MetaTensor(np.arange(512.0).reshape(1, 8, 8, 8), affine=np.eye(4)))
    predictor.click((4, 4, 4))


@pytest.mark.slow
def test_nnunets_regions_and_ignored_voxels_are_trained_and_scored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMMED3D_RUNS", str(tmp_path / "runs"))
    labels = {"background": 0, "both": [1, 2], "tail": [2], "ignore": 3}
    folder = nnunet("raw", labels=labels, regions_class_order=[1, 2])
    array = label()
    array[:2] = 3
    nifti(folder / "labelsTr/case_0.nii.gz", array)
    code, said = tune(folder)
    assert code == 0, said
    scores = json.loads((tmp_path / "runs/toy/results/scores.json").read_text())
    assert set(scores["dice"]) == {"both", "tail"}
    card = Segmenter.from_pretrained(tmp_path / "runs/toy/last.safetensors").card
    assert dict(card.labels) == {0: "background", 1: "both, value 1", 2: "tail"}
    assert cli("curate", folder, "out")[0] == 2
