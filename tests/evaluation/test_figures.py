"""The picture of a run."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation import figures


@pytest.fixture
def drawn(tmp_path, monkeypatch, rng):
    """Draws cases and gives back the figure before it became a PNG."""
    kept = {}
    save = Figure.savefig

    def keep(self, path, **given):
        kept["figure"] = self
        save(self, path, **given)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(label, prediction=None, *, affine=None, cases=1, records=(), **given):
        affine = np.eye(4) if affine is None else affine
        image = Volume(rng.normal(size=label.shape), affine)
        prediction = label if prediction is None else prediction
        shown = [
            figures.Shown(f"case {i}", image, Volume(label, affine), Volume(prediction, affine))
            for i in range(cases)
        ]
        path = tmp_path / "new" / "figure.png"
        figures.run_figure(path, shown, ("head", "tail"), records, title="A title", **given)
        assert path.read_bytes().startswith(b"\x89PNG")
        return kept["figure"]

    return draw


@pytest.fixture
def label():
    array = np.zeros((8, 10, 30), dtype=np.uint8)
    array[2:4, 3:6, 10:14] = 1
    array[4:6, 3:6, 10:14] = 2
    return array


def test_there_are_three_planes_per_case_two_curves_and_a_legend(drawn, label):
    records = [{"step": 5, "loss": 2.0}, {"step": 5, "mean_dice": 0.5}, {"step": 9, "loss": 1.0}]
    figure = drawn(label, cases=2, records=records)
    assert len(figure.axes) == 2 * 3 + 3
    loss, dice = figure.axes[6:8]
    assert loss.lines[0].get_xydata().tolist() == [[5, 2], [9, 1]]
    assert dice.lines[0].get_xydata().tolist() == [[5, 0.5]]


def test_the_note_of_the_data_set_is_on_the_figure(drawn, label):
    assert "only a toy" in drawn(label, note="only a toy").get_suptitle()


@pytest.mark.parametrize(
    "axes", [np.eye(4), np.array([[0, 0, -1, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])]
)
def test_planes_are_drawn_in_ras_whatever_the_file_has(drawn, label, axes):
    figure = drawn(label, affine=axes)
    heights = [axis.images[0].get_array().shape for axis in figure.axes[:3]]
    size = label.shape if axes[0, 0] else (30, 8, 10)
    assert heights == [(size[2], size[1]), (size[2], size[0]), (size[1], size[0])]


def test_the_view_holds_all_that_was_predicted(drawn, label):
    prediction = label.copy()
    prediction[4, 4, 28] = 1  # far from the reference: must not be hidden
    sagittal = drawn(label, prediction, affine=np.diag([1, 1, 4, 1.0])).axes[0]
    assert sagittal.get_ylim() == (7.5, 29.5)


def test_a_class_that_was_not_found_is_drawn_without_it(drawn, label):
    assert drawn(label, np.zeros_like(label), records=[{"step": 1, "mean_dice": None}])


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SAR"])
def test_clicks_are_marked_where_they_lie(tmp_path, monkeypatch, rng, axes):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **given: kept.append(self))
    to_ras = {"RAS": np.eye(4), "LPI": np.diag([-1, -1, -1, 1.0]), "SAR": np.eye(4)[[2, 1, 0, 3]]}
    image = Volume(rng.normal(size=(20, 21, 22)), to_ras[axes])
    mask = np.zeros(image.shape, bool)
    mask[4:9, 5:10, 6:12] = True
    clicked = figures.Clicked("liver", mask, [((6, 7, 8), True), ((14, 7, 8), False)])
    figures.clicks_figure(tmp_path / "f.png", image, [clicked])
    (figure,) = kept
    assert len(figure.axes) == 3
    assert figure.axes[0].get_ylabel() == "liver"
    inside = {"RAS": (6, 7, 8), "LPI": (13, 13, 13), "SAR": (8, 7, 6)}[axes]
    for plane, drawn in enumerate(figure.axes):
        first, second = drawn.lines
        assert first.get_marker() == "+"
        assert second.get_marker() == "x"
        assert first.get_xydata().tolist() == [[n for a, n in enumerate(inside) if a != plane]]
        assert first.get_alpha() == 1
        low, high = sorted(drawn.get_xlim())
        assert low <= second.get_xydata()[0, 0] <= high


def test_the_figure_of_cases_has_three_planes_each_and_names_the_classes(tmp_path, label, rng):
    shown = figures.Shown(
        "one", *(Volume(a, np.eye(4)) for a in (rng.random(label.shape), label, label))
    )
    figures.cases_figure(tmp_path / "new/cases.png", [shown, shown], ("head", "tail"))
    assert (tmp_path / "new/cases.png").read_bytes().startswith(b"\x89PNG")


def drawn_features(monkeypatch, path, image, maps, affine):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **given: kept.append(self))
    figures.features_figure(path, image, maps, affine, title="a volume")
    return kept[0].axes


@pytest.mark.parametrize("axes", [[0, 1, 2], [2, 0, 1]])
def test_features_are_drawn_on_the_grid_of_the_image(tmp_path, monkeypatch, rng, axes):
    image = Volume(rng.normal(size=(8, 12, 16)), np.diag([2.0, 1.5, 1, 1])[[*axes, 3]])
    size = [(8, 12, 16)[axis] for axis in np.argsort(axes).argsort()]
    tokens = torch.randn(5, 4, 4, 4)
    drawn = drawn_features(monkeypatch, tmp_path / "f.png", image, {"block 3": tokens}, np.eye(4))
    assert len(drawn) == 6
    assert [axis.get_ylabel() for axis in drawn] == ["image", "block 3", "", "", "", ""]
    for number, axis in enumerate(drawn):
        across, up = (n for i, n in enumerate(size) if i != number // 2)
        assert axis.images[0].get_array().shape[:2] == (up, across)
        letters = "".join(text.get_text() for text in axis.texts)
        assert letters == ("APIS", "RLIS", "RLPA")[number // 2]
        assert axis.xaxis_inverted()


def test_features_lie_where_their_affine_says(tmp_path, monkeypatch, generator):
    image = Volume(np.indices((20, 20, 20)).sum(0).astype(float), np.diag([-1.0, -1, 1, 1]))
    tokens = 0.1 * torch.randn(6, 5, 5, 5, generator=generator)
    tokens[:, 2, :, 0] += 3  # one column of tokens is unlike all others
    affine = np.array([[4.0, 0, 0, -17.5], [0, 4, 0, -17.5], [0, 0, 4, 1.5], [0, 0, 0, 1]])
    drawn = drawn_features(monkeypatch, tmp_path / "f.png", image, {"block 3": tokens}, affine)
    coronal = np.asarray(drawn[3].images[0].get_array())  # (Z, X, 3), X from left to right in RAS
    unlike = np.abs(coronal - np.median(coronal, axis=(0, 1))).sum(-1)
    z, x = np.unravel_index(unlike.argmax(), unlike.shape)
    assert z < 4
    assert 8 <= x < 12


def test_curves_are_one_svg_with_a_line_per_class():
    records = [
        {"step": 1, "loss": 2.0, "lr": 1e-3},
        {"step": 2, "mean_dice": 0.5, "dice": {"head": 0.6, "tail": None}},
        {"step": 4, "mean_dice": 0.6, "dice": {"head": 0.7, "tail": 0.5}},
    ]
    svg = figures.curves_svg(records)
    assert svg.startswith("<svg")
    assert ">training loss<" in svg
    assert figures.COLOURS[0].lower() in svg
    assert figures.COLOURS[1].lower() in svg
    assert svg == figures.curves_svg(records)


@pytest.mark.parametrize("shape", [(8, 10, 1), (1, 10, 12), (9, 1, 1), (1, 1, 1)])
def test_volumes_of_one_slice_are_drawn(drawn, tmp_path, shape, rng):
    label = np.ones(shape, np.uint8)
    drawn(label)
    image = Volume(rng.normal(size=shape), np.eye(4))
    clicked = figures.Clicked("a", label > 0, [((0, 0, 0), True)])
    figures.clicks_figure(tmp_path / "clicks.png", image, [clicked])
    tokens = torch.from_numpy(rng.normal(size=(4, 2, 2, 2)))
    figures.features_figure(tmp_path / "f.png", image, {"block": tokens}, np.eye(4), title="one")


def test_a_picture_is_whole_or_not_there(drawn, label, monkeypatch, tmp_path):
    def half(self, path, **given):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="full"):
        drawn(label)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
