"""`make demo`: its data, and its configuration from arguments."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sammed3d_backbone.recipes import demo
from sammed3d_backbone.recipes.prepare_demo_data import GAP_MM, NOTE, write_demo_data

from sammed3d_backbone import encoder
from sammed3d_backbone.data.datasets import read_fold
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.preparation import load_image, prepare_cases
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.loading.checkpoint import write
from sammed3d_backbone.training.finetuning import make_card
from tests.checks.check_challenges import write_layout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The demo's data set, once."""
    folder = tmp_path_factory.mktemp("demo_data")
    write_demo_data(folder)
    return folder


@pytest.fixture
def written(monkeypatch):
    """Folders to which demo data would have been written."""
    folders = []
    monkeypatch.setattr(demo, "write_demo_data", folders.append)
    return folders


def test_the_slabs_are_a_crop_apart_and_hold_both_tissues(data):
    dataset = read_dataset(data)
    fold = read_fold(dataset, 0)
    assert (fold.train, fold.val) == (("back",), ("front",))
    preparation = Preprocessing(None, {"default": "zscore_positive"}, "volume", (1, 1, 1))
    back, front = prepare_cases(dataset, ["back", "front"], preparation, progress=False)
    for case in (back, front):
        assert set(case.label.unique().tolist()) == {0, 1, 2}
    edges = []
    for case in dataset.cases:
        volume = load_image(case)
        first = volume.affine[1, 3]
        edges.append((first, first + volume.shape[1]))
    (_, end_of_back), (start_of_front, _) = sorted(edges)
    assert start_of_front - end_of_back == GAP_MM
    assert GAP_MM >= 32 * 1.5  # the crop of recipes/configs/demo.yaml


def test_the_note_says_what_the_demo_does_not_show(data):
    assert "not how well it generalises" in read_dataset(data).note == NOTE


def test_without_arguments_the_data_are_written_once(runs, written):
    cfg = demo.configure({})
    assert written == [runs / "demo_data"]
    assert (cfg.data, cfg.scratch, cfg.variant) == (str(runs / "demo_data"), False, "tiny")
    (runs / "demo_data").mkdir(parents=True)
    (runs / "demo_data/dataset.json").write_text("{}")
    demo.configure({})
    assert len(written) == 1


def test_your_own_folder_gets_its_own_run_and_no_flips(toy_data, runs, written):
    cfg = demo.configure({"data": str(toy_data)})
    assert (cfg.name, cfg.intensity, cfg.flip_axes) == ("demo_Toy", None, ())
    assert written == []


def test_ct_is_treated_as_ct(toy_data, runs, tmp_path):
    info = json.loads((toy_data / "dataset.json").read_text()) | {"modality": {"0": "CT"}}
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / kind).symlink_to(toy_data / kind)
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    cfg = demo.configure({"data": str(tmp_path)})
    card = make_card(cfg, read_dataset(tmp_path))
    assert card.preprocessing.intensity == {"default": "ct"}


def test_a_folder_that_a_layout_describes_is_taken(tmp_path, runs, root):
    write_layout(tmp_path, root / "recipes/layouts/kits.yaml")
    cfg = demo.configure({"data": str(tmp_path), "layout": "layouts/kits.yaml"})
    assert (cfg.name, cfg.intensity) == ("demo_KiTS23", None)


@pytest.mark.parametrize(
    ("weights", "variant"), [("turbo", "vit_b"), ("hf-hub:someone/else", "vit_b")]
)
def test_weights_choose_their_variant_and_are_not_ignored(toy_data, runs, weights, variant):
    cfg = demo.configure({"data": str(toy_data), "weights": weights})
    assert (cfg.weights, cfg.variant, cfg.scratch) == (weights, variant, False)
    assert cfg.name != demo.configure({"data": str(toy_data)}).name
    assert "/" not in cfg.name


def test_a_local_file_tells_its_own_variant(toy_data, runs, tmp_path):
    write(tmp_path / "mine.safetensors", encoder("tiny", pretrained=False).state_dict(), {})
    cfg = demo.configure({"data": str(toy_data), "weights": str(tmp_path / "mine.safetensors")})
    assert cfg.variant == "tiny"


def test_any_key_of_the_recipe_can_be_given(toy_data, runs):
    cfg = demo.configure({"data": str(toy_data), "steps": "7", "crop_vox": "16"})
    assert (cfg.steps, cfg.crop_vox) == (7, 16)


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [("turbo", "of the form key=value"), ("data=/nowhere", "pass data=FOLDER")],
)
def test_what_cannot_be_done_is_one_line(monkeypatch, capsys, argument, remedy):
    monkeypatch.setattr("sys.argv", ["demo.py", argument])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 2
    assert remedy in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_ends_with_a_figure(runs, toy_data, monkeypatch, capsys):
    small = [
        "steps=2",
        "warmup_steps=0",
        "validate_every=2",
        "crop_vox=16",
        "feature_size=4",
        "cpu=true",
    ]
    monkeypatch.setattr("sys.argv", ["demo.py", f"data={toy_data}", "threads=1", *small])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert not stopped.value.code
    figure = runs / "demo_Toy/results/figure.png"
    printed = capsys.readouterr().out
    assert str(figure) in printed
    assert str(runs / "demo_Toy_data.png") in printed
    assert plt.imread(runs / "demo_Toy_data.png").std() > 0.05  # something is drawn
    ours, theirs = (
        json.loads((runs / name / "results/scores.json").read_text())["mean_dice"]
        for name in ("demo_Toy", "demo_Toy_scratch")
    )
    line = f"{ours:.3f} from the weights of tiny, {theirs:.3f} from random initialisation"
    assert line in printed
    page = (runs / "demo_Toy/results/report.html").read_text()
    assert "Against the baseline" in page
    assert "What to try next" in printed
    assert np.frombuffer(figure.read_bytes()[:4], np.uint8)[1:].tobytes() == b"PNG"
