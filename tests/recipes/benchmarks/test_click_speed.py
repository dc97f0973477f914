"""The click benchmark compares two equivalent procedures."""

import numpy as np
import pytest
import torch
from sammed3d_backbone.recipes.benchmarks import click_speed as benchmark_clicks
from standin import StandIn

from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.inference.interactive.windows import Windows

AFFINE = np.array([[0, 0, -2.0, 60], [-1.9, 0, 0, 90], [0, 2.2, 0, -70], [0, 0, 0, 1]])


@pytest.fixture
def scan(tmp_path):
    """A bright ball and two small parts near it, in a file with turned, anisotropic axes."""
    i, j, k = np.ogrid[:90, :70, :60]
    label = np.zeros((90, 70, 60), np.uint8)
    label[(i - 40) ** 2 + (j - 36) ** 2 + (k - 30) ** 2 < 14**2] = 4
    label[60:64, 36:40, 30:34] = 7
    label[38:42, 56:60, 30:34] = 9
    Volume(np.where(label == 4, 300, 20).astype(np.int16), AFFINE).save(tmp_path / "scan.nii.gz")
    Volume(label, AFFINE).save(tmp_path / "label.nii.gz")
    return tmp_path / "scan.nii.gz", tmp_path / "label.nii.gz"


def test_both_procedures_bring_the_object_back_to_the_scans_grid(scan):
    torch.manual_seed(0)
    truth = Volume.load(scan[1]).array == 4
    network = StandIn(benchmark_clicks.SIDE)
    theirs = benchmark_clicks.reference_mask(network, *scan, 4)
    predictor = Predictor(network, follow=False)
    ours = benchmark_clicks.our_masks(predictor, scan[0], {"4": (40, 36, 30)})["4"]
    for mask in (theirs, ours):
        assert mask.shape == truth.shape
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.85


def test_all_clicks_lie_in_their_structures_and_in_one_window(scan):
    clicks = benchmark_clicks.clicks_in_one_window(*scan, 3)
    label = Volume.load(scan[1]).array
    assert {str(int(label[point])) for point in clicks.values()} == clicks.keys()
    windows = Windows(Volume.load(scan[0]), SAM_MED3D, "ct")
    first, *others = (windows.grid_point(point) for point in clicks.values())
    anchor = windows.around(first, None)
    assert {windows.around(place, anchor) for place in others} == {anchor}
    with pytest.raises(ValueError, match="holds 4 structures, at most 3"):
        benchmark_clicks.clicks_in_one_window(*scan, 4)


def test_later_clicks_are_timed_one_by_one(scan):
    predictor = Predictor(StandIn(benchmark_clicks.SIDE), follow=False)
    times = benchmark_clicks.later_clicks(predictor, scan[0], (40, 36, 30))
    assert len(times) == benchmark_clicks.LATER_CLICKS
    assert min(times) > 0


def test_the_table_tells_ratios():
    def times(reference, ours):
        return {"reference": {"median_s": reference}, "ours": {"median_s": ours}}

    result = {
        "clicks": {str(n): [0, 0, 0] for n in range(13)},
        "one": times(10.0, 1.0),
        "many": times(130.0, 2.0),
        "later": {"median_s": 0.05},
        "peak": {
            "reference": {"bytes": 2**30},
            "ours": {"bytes": 2**28},
            "large": {"bytes": 2**28, "set_volume_s": 0.5, "first_s": 1.0, "later_s": 0.1},
        },
        **dict.fromkeys(("processor", "threads", "torch", "commit"), "x"),
        "date": "2026-11-24 12:00 UTC",
    }
    said = benchmark_clicks.table(result)
    assert "| 1 object, from the file to masks on its grid | 10.0 s | 1.00 s | 10 x |" in said
    assert "| 13 objects, from the file to masks on its grid | 130.0 s | 2.00 s | 65 x |" in said
    assert "50 ms, 5% of the first" in said
    assert "peak memory, 1 object | 1024 MiB | 256 MiB | 4.0 x |" in said
    assert "512 x 512 x 800 voxels in memory" in said
