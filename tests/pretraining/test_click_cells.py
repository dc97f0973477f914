"""Clicks of training against the plain strategies, on masks of the decoder's grid."""

import numpy as np
import pytest
import torch

from sammed3d_backbone.pretraining.click_cells import deepest_cells, next_points, shares_of_cells
from sammed3d_backbone.strategies import Draws, Errors, deepest, uniform

SIDE, CELLS = 8, 4


@pytest.fixture
def objects():
    """Random lumps in voxels, and masks in cells."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(6, SIDE, SIDE, SIDE, generator=generator) < 0.4
    truth[:, 2:6, 1:7, 2:6] = True
    mask = torch.rand(6, CELLS, CELLS, CELLS, generator=generator) < 0.4
    return truth, mask


def enlarged(mask):
    return mask.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


def clicks(truth, mask, deep_share, number):
    """Many clicks on one object: (voxel, label)."""
    many = truth.expand(number, -1, -1, -1), mask.expand(number, -1, -1, -1)
    share = shares_of_cells(many[0], (CELLS,) * 3)
    draws = torch.rand(number, 3, generator=torch.Generator().manual_seed(1))
    points, labels = next_points(many[0], share, many[1], draws, deep_share)
    assert points.shape == (number, 1, 3)
    found = zip(points[:, 0].tolist(), labels[:, 0].tolist(), strict=True)
    return [(*point, label) for point, label in found]


def plain(strategy, truth, mask, number):
    found = [
        strategy(Errors(truth.numpy(), mask.numpy(), np.eye(4), Draws(name)))
        for name in range(number)
    ]
    return {(*click.point_vox, int(click.positive)) for click in found}


def test_shares_are_means_over_cells(objects):
    truth, _ = objects
    wanted = torch.nn.functional.avg_pool3d(truth[:, None].float(), 2)[:, 0]
    torch.testing.assert_close(shares_of_cells(truth, (CELLS,) * 3), wanted)


def test_random_clicks_are_those_of_the_plain_strategy(objects):
    for truth, mask in zip(*objects, strict=True):
        ours = clicks(truth, mask, 0.0, 4000)
        wrong = int((truth ^ enlarged(mask[None])[0]).sum())
        assert set(ours) == plain(uniform, truth, enlarged(mask[None])[0], 3000)
        counts = np.unique(np.array(ours), axis=0, return_counts=True)[1]
        assert counts.max() < 3 * 4000 / wrong  # each as likely


def test_deep_clicks_are_those_of_the_plain_strategy_on_cells(objects):
    truth, mask = objects
    inside = truth[:, ::2, ::2, ::2]  # objects of whole cells
    whole = enlarged(inside)
    for cells, voxels, other in zip(inside, whole, mask, strict=True):
        ours = {(x // 2, y // 2, z // 2, n) for x, y, z, n in clicks(voxels, other, 1.0, 600)}
        assert ours == plain(deepest, cells, other, 600)


def test_depth_is_the_chessboard_distance():
    region = torch.zeros(2, 7, 7, 7, dtype=torch.bool)
    region[0, 1:6, 0:5, 1:6] = True
    cells, depth = deepest_cells(region)
    assert cells[0].nonzero().tolist() == [[3, 2, 3]]
    assert depth.tolist() == [3, 0]
    assert not cells[1].any()


@pytest.mark.parametrize("deep_share", [0.0, 1.0])
def test_where_nothing_is_wrong_the_object_is_clicked(deep_share):
    truth = torch.zeros(SIDE, SIDE, SIDE, dtype=torch.bool)
    truth[2:4, 4:6, 6:8] = True
    mask = truth[::2, ::2, ::2]
    found = clicks(truth, mask, deep_share, 200)
    assert len(set(found)) == 8
    assert all(truth[place] and label == 1 for *xyz, label in found for place in [tuple(xyz)])


@pytest.mark.parametrize("deep_share", [0.0, 1.0])
def test_objects_thinner_than_cells_are_clicked(deep_share):
    truth = torch.zeros(SIDE, SIDE, SIDE, dtype=torch.bool)
    truth[3, 3, :] = True
    found = clicks(truth, torch.zeros(CELLS, CELLS, CELLS, dtype=torch.bool), deep_share, 200)
    assert {tuple(xyz) for *xyz, _ in found} == {(3, 3, z) for z in range(SIDE)}
    assert all(label == 1 for *_, label in found)
