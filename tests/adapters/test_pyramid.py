"""Feature maps at strides 2, 4, 8 and 16, from any encoder with one token grid."""

import pytest
import torch
from foreign import ConvEncoder

from sammed3d_backbone.adapters.pyramid import KINDS, Halve, pyramid


def volume_for(encoder, generator):
    return torch.randn(2, encoder.in_chans, *encoder.img_size, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch_size", [4, 8, 16, 32])
def test_maps_have_the_declared_strides_and_channels(patch_size, kind, generator):
    maps = pyramid(ConvEncoder(patch_size, in_chans=2, img_size=64), kind, feature_size=2)
    assert maps.strides == (2, 4, 8, 16)
    assert maps.out_channels == (4, 8, 16, 32)
    found = maps(volume_for(maps.encoder, generator))
    assert [tuple(m.shape) for m in found] == [
        (2, 4, 32, 32, 32),
        (2, 8, 16, 16, 16),
        (2, 16, 8, 8, 8),
        (2, 32, 4, 4, 4),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_at_full_resolution_comes_on_request(kind, generator):
    maps = pyramid(ConvEncoder(), kind, feature_size=2, full_resolution=True)
    assert maps.strides == (1, 2, 4, 8, 16)
    assert maps.out_channels == (2, 4, 8, 16, 32)
    assert tuple(maps(volume_for(maps.encoder, generator))[0].shape) == (2, 2, 16, 16, 16)


def test_simple_reads_the_last_block_and_taps_read_four():
    assert pyramid(ConvEncoder(depth=6)).out_indices == (5,)
    assert pyramid(ConvEncoder(depth=6), "multi_level").out_indices == (0, 2, 3, 5)
    assert pyramid(ConvEncoder(depth=6), out_indices=[1]).encoder.depth == 2


@pytest.mark.parametrize("patch_size", [8, 16])
def test_a_graft_adds_nothing_before_the_first_step_and_then_learns(patch_size, generator):
    torch.manual_seed(0)
    simple = pyramid(ConvEncoder(patch_size, img_size=32), "simple", feature_size=2)
    torch.manual_seed(0)
    conv_stem = pyramid(ConvEncoder(patch_size, img_size=32), "conv_stem", feature_size=2)
    conv_stem.load_state_dict(simple.state_dict(), strict=False)  # the branch keeps its own values
    volume = volume_for(simple.encoder, generator)
    assert all(map(torch.equal, conv_stem(volume), simple(volume)))

    optimizer = torch.optim.SGD(conv_stem.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(m.square().mean() for m in conv_stem(volume)).backward()
        optimizer.step()
    learns = [p.grad.any() for p in conv_stem.branch.parameters()]
    assert len(conv_stem.branch) == len(conv_stem.joins) == {8: 2, 16: 3}[patch_size]
    assert all(learns)
    assert not all(map(torch.equal, conv_stem(volume), simple(volume)))


@pytest.mark.parametrize(("cells", "halved"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (7, 3)])
def test_halving_a_grid_rounds_down_and_sees_every_cell(cells, halved):
    grid = torch.zeros(1, 2, cells, cells, cells, requires_grad=True)
    out = Halve(2)(grid)
    assert tuple(out.shape) == (1, 2, halved, halved, halved)
    out.sum().backward()
    assert grid.grad.all()


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"kind": "fpn"}, "use one of simple, multi_level, conv_stem"),
        ({"out_indices": [1, 2]}, "expected 1 ascending"),
        ({"out_indices": []}, "expected 1 ascending"),
        (
            {"kind": "multi_level", "out_indices": [0, 1, 2, 6]},
            "out_indices=",
        ),
    ],
    ids=["kind", "many", "none", "deep"],
)
def test_what_does_not_fit_is_refused_with_the_remedy(arguments, remedy):
    with pytest.raises(ValueError, match=remedy):
        pyramid(ConvEncoder(), **arguments)
