"""Exported files give the network's numbers, or are not written."""

import json

import pytest
import torch
from torch import nn

from sammed3d_backbone.cli import main
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.inference import export as exporting
from sammed3d_backbone.inference.export import export
from sammed3d_backbone.models.image_encoder import ImageEncoder3D

FORMATS = [
    pytest.param(".onnx", marks=pytest.mark.filterwarnings("ignore")),
    pytest.param(".pt2", marks=pytest.mark.filterwarnings("ignore")),
]


def needs_onnx(suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")


def small(rel_pos, *, windows):
    torch.manual_seed(0)
    network = ImageEncoder3D(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        global_attn_indexes=(1,),
        window_size=windows,
        out_chans=8,
        rel_pos=rel_pos,
    )
    for name, parameter in network.named_parameters():
        if "rel_pos" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("windows", [3, 4], ids=["padded windows", "whole windows"])
@pytest.mark.parametrize("rel_pos", ["sammed3d", "axial"])
def test_an_exported_encoder_gives_its_numbers_at_any_batch(tmp_path, suffix, rel_pos, windows):
    needs_onnx(suffix)
    path = tmp_path / f"e{suffix}"
    difference = export(small(rel_pos, windows=windows), path, (1, 32, 32, 32), {"a": "b"})
    assert difference < 1e-5
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "changes", [{}, {"network": "class_prompts", "adapter": {"variant": "tiny"}}]
)
def test_a_fine_tuned_model_is_exported_with_its_preprocessing(
    tmp_path, fine_tuned, capsys, changes, suffix
):
    needs_onnx(suffix)
    path = tmp_path / f"m{suffix}"
    assert main(["export", fine_tuned(**changes), str(path)]) == 0
    assert "16, 16, 16" in capsys.readouterr().out
    if suffix == ".onnx":
        import onnxruntime

        metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
        text = metadata["preprocessing"]
    else:
        files = {"preprocessing": ""}
        torch.export.load(path, extra_files=files)
        text = files["preprocessing"]
    assert Preprocessing.from_dict(json.loads(text)).spacing_mm == (2.0, 2.0, 2.0)
    assert main(["export", "tiny", str(path)]) == 2
    assert path.name in capsys.readouterr().err


def test_a_file_with_other_numbers_is_refused_and_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_to_pt2", lambda program, path, metadata: None)
    monkeypatch.setattr(exporting, "_opened_pt2", lambda path: lambda x: x.flatten(1) + 1)
    with pytest.raises(ValueError, match="differ"):
        export(nn.Flatten(), tmp_path / "a.pt2", (1, 2, 2, 2), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.pth", "m", "m.onnx.gz"])
def test_a_name_without_a_format_is_refused_before_any_work(tmp_path, name, capsys):
    assert main(["export", "tiny", str(tmp_path / name)]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("rel_pos", ["sammed3d", "axial"])
@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_not_bound_to_its_batch(rel_pos, monkeypatch):
    monkeypatch.setattr("sammed3d_backbone.models.attention.CACHED_LOGITS", 3 * 64 * 64)
    network, x = small(rel_pos, windows=3), torch.randn(3, 1, 32, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(network, x[:1], check_trace=False)
        assert torch.allclose(traced(x), network(x), atol=1e-5)
