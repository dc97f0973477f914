"""From low-resolution logits in windows to a mask on the volume's own grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import logit_field as field
from sammed3d_backbone.inference.interactive.logit_field import LogitField
from sammed3d_backbone.inference.interactive.windows import Windows


def windows_of(shape, affine, side=16):
    return Windows(
        Volume(np.zeros(shape, np.int16), affine), replace(SAM_MED3D, crop_vox=(side,) * 3)
    )


def smooth(generator, cells=4):
    return torch.randn(cells, cells, cells, generator=generator)


def test_one_window_on_the_networks_grid_is_upsampled_and_thresholded(generator):
    windows = windows_of((16, 16, 16), np.diag([1.5, 1.5, 1.5, 1]))
    logits = smooth(generator)
    upsampled = F.interpolate(logits[None, None], size=16, mode="trilinear")[0, 0]
    found = LogitField(windows, {(0, 0, 0): logits})
    assert np.array_equal(found.mask(), (upsampled > 0).numpy())
    assert np.allclose(found.probs(), upsampled.sigmoid().numpy(), atol=1e-5)


def test_the_mask_is_the_thresholded_field_on_any_grid(generator, monkeypatch):
    affine = np.array([[0, 0, -2.0, 5], [-0.9, 0.1, 0, 1], [0.1, 2.4, 0, 2], [0, 0, 0, 1]])
    windows = windows_of((60, 9, 30), affine)
    logits = {start: smooth(generator) for start in [(0, 0, -1), (8, 8, -1), (24, 0, -1)]}
    found = LogitField(windows, logits)
    probs = found.probs()
    assert np.array_equal(found.mask(), probs > 0.5)
    monkeypatch.setattr(field, "SLAB_VOXELS", 1)
    assert np.array_equal(found.mask(), probs > 0.5)
    assert np.allclose(found.probs(), probs, atol=1e-6)


def test_where_no_window_lies_nothing_is_found(generator):
    windows = windows_of((40, 16, 16), np.diag([1.5, 1.5, 1.5, 1]))
    found = LogitField(windows, {(0, 0, 0): torch.full((4, 4, 4), 9.0)})
    assert found.mask()[:16].all()
    assert not found.mask()[16:].any()
    assert not found.probs()[16:].any()


def test_windows_that_agree_leave_no_seam():
    windows = windows_of((40, 16, 16), np.diag([1.5, 1.5, 1.5, 1]))
    starts = [(0, 0, 0), (8, 0, 0), (16, 0, 0), (24, 0, 0)]
    found = LogitField(windows, {start: torch.full((4, 4, 4), 2.0) for start in starts})
    assert np.allclose(found.probs(), torch.tensor(2.0).sigmoid().item(), atol=1e-6)


def test_the_field_passes_continuously_from_one_window_to_the_next(generator):
    windows = windows_of((24, 16, 16), np.diag([1.5, 1.5, 1.5, 1]))
    both = LogitField(windows, {(0, 0, 0): smooth(generator), (8, 0, 0): smooth(generator)})
    along = np.arange(0, 23.4, 0.01)
    logits, known = both.at([along, np.array([7.3]), np.array([8.1])])
    assert known.all()
    assert float(logits.flatten().diff().abs().max()) < 0.02


def test_nothing_positive_is_an_empty_mask():
    windows = windows_of((16, 16, 16), np.diag([1.5, 1.5, 1.5, 1]))
    assert not LogitField(windows, {(0, 0, 0): torch.full((4, 4, 4), -1.0)}).mask().any()


@pytest.mark.parametrize("spacing", [0.4, 1.5, 4.0])
def test_a_ball_keeps_its_place_and_size_at_every_spacing(spacing):
    side_mm, radius_mm = 48.0, 13.0
    n = round(side_mm / spacing)
    windows = windows_of((n, n, n), np.diag([spacing] * 3 + [1]), side=32)
    cells = torch.stack(torch.meshgrid(*[torch.arange(16)] * 3, indexing="ij")) * 3.0 + 1.5
    logits = radius_mm - (cells - side_mm / 2).norm(dim=0)
    voxels = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij")) * spacing + spacing / 2
    truth = np.linalg.norm(voxels - side_mm / 2, axis=0) < radius_mm
    mask = LogitField(windows, {(0, 0, 0): logits}).mask()
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.95
