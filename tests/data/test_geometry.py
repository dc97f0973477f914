"""The way to the network's grid and back: every orientation, oblique, anisotropic."""

from dataclasses import replace

import nibabel.orientations as orientations
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sammed3d_backbone.data import geometry as geometry_module
from sammed3d_backbone.data.geometry import Geometry
from tests.checks import geometry_check
from tests.checks.geometry_check import BOUNDS, ORIENTATIONS, Case

TURN = st.one_of(st.sampled_from([0.0, 45.0, -45.0, 90.0]), st.floats(-180, 180))
SPACING = st.floats(0.3, 6.0)
BOX = Case(0, (45.0, 45.0, 45.0), 0.0, (4, 5, 6), (0.7, 1.3, 3.0), (1.0, 1.0, 1.0), 1, 0)


@pytest.mark.parametrize("orientation", range(len(ORIENTATIONS)))
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_volume_comes_back_from_the_network(orientation, data):
    case = data.draw(
        st.builds(
            Case,
            orientation=st.just(orientation),
            turns_degrees=st.tuples(TURN, TURN, TURN),
            shear=st.floats(-0.3, 0.3),
            shape=st.tuples(*[st.integers(1, 11)] * 3),
            native_mm=st.tuples(SPACING, SPACING, SPACING),
            wanted_mm=st.tuples(SPACING, SPACING, SPACING),
            side_vox=st.integers(1, 15),
            seed=st.integers(0, 999),
        )
    )
    errors = geometry_check.errors(case)
    assert errors.keys() == BOUNDS.keys()
    assert {kind: e for kind, e in errors.items() if not e <= BOUNDS[kind]} == {}


@pytest.mark.parametrize("orientation", range(len(ORIENTATIONS)))
def test_the_axes_run_towards_ras(orientation):
    case = replace(BOX, orientation=orientation, turns_degrees=(14.0, 14.0, 0.0))
    found = Geometry.plan(case.shape, case.affine)
    assert orientations.aff2axcodes(found.affine) == ("R", "A", "S")


@pytest.mark.parametrize("noise", [0.0, 1e-9, -1e-9])
def test_rounding_in_a_header_decides_nothing_at_45_degrees(noise):
    straight = Geometry.plan(BOX.shape, BOX.affine)
    turned = replace(BOX, turns_degrees=(45.0 + noise,) * 3)
    noisy = Geometry.plan(turned.shape, turned.affine)
    assert (noisy.axes, noisy.flips) == (straight.axes, straight.flips)


def test_a_thin_volume_with_a_flipped_axis_is_taken():
    flipped = np.flip(np.arange(6.0).reshape(1, 2, 3), (0, 2))
    assert np.array_equal(Geometry.plan((1, 2, 3), np.eye(4)).apply(flipped)[0].numpy(), flipped)


def test_the_extent_is_kept_and_the_spacing_is_that_of_whole_voxels():
    geometry = Geometry.plan((10, 10, 10), np.diag([0.7, 1.5, 5.0, 1.0]), (1.5, 1.5, 1.5))
    assert geometry.resampled_shape == (5, 10, 33)
    assert geometry.spacing_mm == pytest.approx((1.4, 1.5, 50 / 33))


def test_a_thin_volume_keeps_one_voxel():
    geometry = Geometry.plan((1, 4, 4), np.diag([0.2, 1.0, 1.0, 1.0]), (1.5, 1.5, 1.5))
    assert geometry.resampled_shape == (1, 3, 3)
    assert geometry.invert(geometry.apply(np.ones((1, 4, 4)))).shape == (1, 1, 4, 4)


def test_integer_labels_are_not_touched_without_resampling(rng):
    labels = rng.integers(0, 5, (4, 5, 6))
    case = replace(BOX, orientation=7, turns_degrees=(0.0, 0.0, 0.0))
    geometry = Geometry.plan(case.shape, case.affine)
    seen = geometry.resample_labels(labels)
    assert seen.dtype == torch.uint8
    assert np.array_equal(geometry.invert(seen)[0].numpy(), labels)


def test_resampled_labels_take_the_class_with_the_largest_share():
    labels = np.zeros((4, 1, 1), dtype=np.int16)
    labels[1:3] = 300
    geometry = Geometry.plan((4, 1, 1), np.eye(4), (0.5, 1.0, 1.0))
    assert geometry.resample_labels(labels).flatten().tolist() == [0, 0, 300, 300, 300, 300, 0, 0]


@pytest.mark.parametrize(("own", "other"), [(3.0, 1.5), (3.0, 2.0), (1.0, 3.0), (1.0, 1.5)])
def test_a_class_of_one_voxel_is_not_lost(own, other, rng):
    for voxel in rng.integers(1, 4, (20, 3)).tolist():
        labels = np.zeros((8, 8, 8), np.uint8)
        labels[5:8, 5:8, 5:8] = 1
        labels[tuple(voxel)] = 2
        geometry = Geometry.plan(labels.shape, np.diag([own, own, own, 1]), (other,) * 3)
        seen = geometry.resample_labels(labels)
        assert set(seen.unique().tolist()) == {0, 1, 2}
        if own == 2 * other:
            back = geometry.invert_labels(F.one_hot(seen[0].long()).movedim(-1, 0).float())
            assert back[tuple(voxel)] == 2


def test_a_box_pads_with_one_value_per_channel_and_crops():
    geometry = Geometry.plan((2, 2, 2), np.eye(4)).boxed((-1, 0, 1), (4, 2, 3))
    seen = geometry.apply(np.ones((2, 2, 2, 2)), fill=torch.tensor([5.0, 7.0]))
    assert seen[:, :, 0, 0].tolist() == [[5, 1, 1, 5], [7, 1, 1, 7]]
    assert seen[:, 1, 0].tolist() == [[1, 5, 5], [1, 7, 7]]
    back = geometry.invert(seen, fill=-1.0)
    assert back[0, 0, 0].tolist() == [-1, 1]


def test_a_box_beside_the_volume_holds_only_padding():
    geometry = Geometry.plan((2, 2, 2), np.eye(4)).boxed((5, 5, 5), (2, 2, 2))
    assert bool((geometry.apply(np.ones((2, 2, 2)), fill=-3.0) == -3).all())
    assert geometry.invert_labels(torch.ones(1, 2, 2, 2)).sum() == 0


def test_outside_the_box_is_background():
    geometry = Geometry.plan((4, 1, 1), np.eye(4)).boxed((1, 0, 0), (2, 1, 1))
    probs = torch.tensor([0.1, 0.9]).reshape(2, 1, 1, 1).expand(2, 2, 1, 1)
    assert geometry.invert_labels(probs).flatten().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("spacing", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("planes", [1, 5, 100])
@pytest.mark.parametrize(("start", "more"), [((0, 0, 0), 0), ((-2, -1, 0), 3), ((2, 1, 3), -4)])
def test_labels_are_those_of_the_most_likely_class_however_the_planes_come(
    spacing, planes, start, more, generator
):
    affine = np.diag([-1.0, 1, 1, 1])[[2, 0, 1, 3]]
    geometry = Geometry.plan((21, 40, 13), affine, (spacing,) * 3)
    geometry = geometry.boxed(start, tuple(max(1, n + more) for n in geometry.resampled_shape))
    probs = torch.rand(5, *geometry.box_shape, generator=generator).softmax(0)
    whole = torch.cat([geometry.invert(p[None], fill=float(k == 0)) for k, p in enumerate(probs)])
    found = geometry.invert_labels(iter(probs.split(planes, dim=1)))
    assert torch.equal(found.long(), whole.argmax(0))


def test_parts_that_are_not_the_whole_box_are_refused(generator):
    geometry = Geometry.plan((4, 4, 4), np.eye(4))
    with pytest.raises(ValueError, match="planes"):
        geometry.invert_labels([torch.rand(2, 3, 4, 4, generator=generator)])


def test_an_array_of_another_grid_is_refused():
    geometry = Geometry.plan((2, 2, 2), np.eye(4))
    with pytest.raises(ValueError, match="plan a geometry from that array's own shape"):
        geometry.apply(np.zeros((2, 2, 3)))


def test_values_of_another_box_are_refused():
    geometry = Geometry.plan((2, 2, 2), np.eye(4))
    with pytest.raises(ValueError, match=r"give \(K, 2, 2, 2\)"):
        geometry.invert(torch.zeros(1, 2, 2, 3))


@pytest.mark.parametrize("spacing", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, np.nan, 1.0)])
def test_a_spacing_that_is_none_is_refused(spacing):
    with pytest.raises(ValueError, match="spacing_mm"):
        Geometry.plan((2, 2, 2), np.eye(4), spacing)


def test_an_affine_without_direction_is_refused():
    with pytest.raises(ValueError, match="affine"):
        Geometry.plan((2, 2, 2), np.diag([1.0, 1.0, 0.0, 1.0]))


def test_a_tie_between_classes_goes_to_the_smaller_one():
    geometry = Geometry.plan((2, 1, 1), np.eye(4), (2.0, 1.0, 1.0))
    for pair in ([3, 1], [1, 3]):
        labels = np.array(pair, np.uint8).reshape(2, 1, 1)
        assert geometry.resample_labels(labels).flatten().tolist() == [1]


def test_many_classes_cost_no_more_than_few(monkeypatch, rng):
    """Each place compares its eight neighbours, whatever is elsewhere."""
    compared = []
    heaviest = geometry_module._heaviest
    monkeypatch.setattr(
        geometry_module, "_heaviest", lambda v, w: compared.append(v.shape) or heaviest(v, w)
    )
    geometry = Geometry.plan((6, 6, 6), np.eye(4), (0.7, 0.7, 0.7))
    geometry.resample_labels(rng.integers(0, 200, (6, 6, 6)))
    geometry.resample_labels(np.zeros((6, 6, 6), np.uint8))
    assert [shape[0] for shape in compared] == [8]
