"""Encoded windows on disk serve later sessions, and never the wrong ones."""

import numpy as np
import pytest
import torch
from standin import StandIn, segment

from sammed3d_backbone import sam
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.loading.checkpoint import read


def session(folder, volume, model=None, **how):
    """The mask of a fresh session, and the passes of its encoder."""
    model = model or StandIn()
    (found,) = segment(
        Predictor(model, cache_folder=folder), volume, [(22, 40, 36)], **how
    ).values()
    return found.mask, model.image_encoder.passes


def test_a_later_session_needs_no_encoder(tmp_path, balls):
    first, passes = session(tmp_path / "cache", balls[0])
    assert passes == 1
    again, passes = session(tmp_path / "cache", balls[0])
    assert passes == 0
    assert np.array_equal(first, again)


def test_high_resolution_maps_are_kept_too(tmp_path):
    torch.manual_seed(0)
    network = sam("tiny", pretrained=False, img_size=16)
    array = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    volume = Volume(array, np.diag([1.5, 1.5, 1.5, 1.0]))
    found = [
        segment(Predictor(network, cache_folder=tmp_path, max_windows=1), volume, [(8, 8, 8)])
        for _ in range(2)
    ]
    (path,) = tmp_path.iterdir()
    tensors, _ = read(path)
    assert {tuple(tensor.shape[1:]) for tensor in tensors.values()} == {
        (128, 2, 2, 2),
        (32, 4, 4, 4),
        (16, 8, 8, 8),
    }
    first, again = (next(iter(one.values())).mask for one in found)
    assert np.array_equal(first, again)


def test_another_volume_modality_or_network_is_encoded(tmp_path, balls):
    volume, *_ = balls
    session(tmp_path, volume)
    changed = volume.array.copy()
    changed[22, 40, 36] += 1
    assert session(tmp_path, changed, affine=volume.affine)[1] == 1
    bright = np.where(volume.array > 100, 3000, volume.array - 20)
    session(tmp_path, bright, affine=volume.affine)
    assert session(tmp_path, bright, affine=volume.affine, modality="ct")[1] == 1
    other = StandIn()
    other.register_buffer("value", torch.ones(1))
    assert session(tmp_path, volume, other)[1] == 1


@pytest.mark.parametrize("damage", ["cut", "altered", "emptied"])
def test_a_damaged_file_is_made_anew(tmp_path, balls, damage, caplog):
    session(tmp_path, balls[0])
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-100],
            "altered": content[:-1] + bytes([content[-1] ^ 1]),
            "emptied": b"",
        }[damage]
    )
    assert session(tmp_path, balls[0])[1] == 1
    assert "encoded again" in caplog.text
    assert session(tmp_path, balls[0])[1] == 0


def test_a_folder_that_cannot_be_written_is_only_read(tmp_path, balls, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("sammed3d_backbone.inference.interactive.embedding_cache.write", full)
    mask, _ = session(tmp_path, balls[0])
    assert mask.any()
    assert "encoded windows are not kept: no space left" in caplog.text


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        Predictor(StandIn(), cache_folder=tmp_path / "file")
