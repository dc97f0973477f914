"""Scoring a run's model in three ways that must agree."""

import json

import numpy as np
import pytest
from sammed3d_backbone.recipes import evaluate
from sammed3d_backbone.recipes.finetune_unetr import Config
from sammed3d_backbone.recipes.finetune_unetr import main as finetune

from sammed3d_backbone.data.volume import Volume


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script; returns its output, or the error."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def model(fine_tuned):
    """A fine-tuned network of the toy data's classes."""
    return fine_tuned(
        labels={0: "background", 1: "front", 2: "back"}, training={"config": {"scratch": True}}
    )


@pytest.mark.slow
def test_model_predictions_and_run_give_the_same_scores(small, runs, toy_data, tmp_path, command):
    finetune(Config(**small))
    run = runs / "toy"
    expected = (run / "results/scores.csv").read_text()
    fold = ("--fold", 0, "--folds", 3, "--device", "cpu")
    said = command(run / "last.safetensors", toy_data, *fold)
    assert (run / "evaluation/scores.csv").read_text() == expected
    assert "mean Dice" in said
    about = json.loads((run / "evaluation/scores.json").read_text())
    assert about["steps"] == small["steps"]
    assert about["cpu_seconds"] > 0
    assert "training loss" in (run / "evaluation/report.html").read_text()
    command(run / "results/predictions", toy_data, *fold, "--out", tmp_path / "again")
    assert (tmp_path / "again/scores.csv").read_text() == expected
    (run / "results/report.html").unlink()
    assert str(run / "results/report.html") in command(
        run, "--baseline", tmp_path / "again/scores.csv"
    )
    page = (run / "results/report.html").read_text()
    assert "Against the baseline" in page
    assert "training loss" in page
    command(run / "last.safetensors", toy_data, "--out", tmp_path / "all", "--device", "cpu")
    about = json.loads((tmp_path / "all/scores.json").read_text())
    assert about["data_overlap"].startswith("4 of these 6 cases are from the model's own training")
    assert "random initialisation" in about["data_overlap"]
    assert about["cases"] == 6


def test_predictions_of_another_tool_are_scored_as_they_are(toy_data, tmp_path, command):
    for number in range(6):
        label = Volume.load(toy_data / f"labelsTr/case_{number}.nii.gz")
        label.save(tmp_path / f"made/case_{number}.nii.gz")  # float32, as some tools write
    command(tmp_path / "made", toy_data, "--tolerance-mm", 1)
    summary = json.loads((tmp_path / "made_evaluation/scores.json").read_text())
    assert (summary["mean_dice"], summary["cases"], summary["tolerance_mm"]) == (1, 6, 1)
    assert "evaluate.py" in summary["command"]


@pytest.mark.parametrize(
    ("began", "said"),
    [
        ({}, "random initialisation"),
        ({"scratch": False, "pretrained": False}, "random initialisation"),
        ({"scratch": False, "weights": "turbo"}, "AMOS22 was in the pretraining data of turbo"),
        ({"scratch": False, "weights": "sam_2d"}, "not in the published pretraining data"),
        ({"scratch": False, "weights": "own.pth"}, "own.pth"),
        ({"scratch": False, "weights": "/home/me/own.pth"}, "not known"),
    ],
)
def test_the_weights_a_model_began_with_are_named(model, began, said):
    card = evaluate.Segmenter.from_pretrained(model).card
    card.training["config"].update(began)
    assert said in evaluate.pretraining_statement(card, "AMOS22")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["{tmp}", "{data}"], "6 of 6 cases are missing; predict them"),
        (["{model}", "{other}"], "give data with the same classes"),
        (["{model}", "/nowhere"], "pass data=FOLDER"),
        (["{tmp}/none.safetensors", "{data}"], "none.safetensors"),
        (["{tmp}"], r"score the cases with recipes/evaluate.py"),
        (["{tmp}", "--fold", "0", "--out", "{tmp}/out"], "--fold --out"),
        (["{tmp}", "{data}", "--folds", "3"], "--folds"),
        (["{tmp}", "{data}", "--tolerance-mm", "nan"], "--tolerance-mm"),
        (["{tmp}", "{data}", "--grid-tolerance", "-1"], "--grid-tolerance"),
        (["{tmp}", "{data}", "--baseline", "{tmp}/none.csv"], "none.csv"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    command, model, toy_data, tmp_path, arguments, remedy, capsys
):
    other = tmp_path / "other"
    for kind in ("imagesTr", "labelsTr"):
        (other / kind).mkdir(parents=True)
        Volume(np.ones((4, 4, 4), np.float32), np.eye(4)).save(other / kind / "a.nii.gz")
    case = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
    labels = {"0": "background", "1": "toe"}
    (other / "dataset.json").write_text(json.dumps({"labels": labels, "training": [case]}))
    places = {"tmp": tmp_path, "data": toy_data, "model": model, "other": other}
    with pytest.raises(SystemExit) as stopped:
        command(*(argument.format(**places) for argument in arguments))
    assert stopped.value.code == 2
    assert remedy in capsys.readouterr().err


def test_predictions_that_hold_no_labels_are_not_rounded_to_some(
    toy_data, tmp_path, command, capsys
):
    strange = {"case_0": 65537, "case_1": 0.6, "case_2": float("nan"), "case_3": 1e30}
    for path in (toy_data / "labelsTr").iterdir():
        label = Volume.load(path)
        label.array[0, 0, 0] = strange.get(path.name.removesuffix(".nii.gz"), 0)
        label.save(tmp_path / "predictions" / path.name)
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path / "predictions", toy_data, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert all(f"{case}.nii.gz" in said for case in strange)
    assert json.loads((tmp_path / "out/scores.json").read_text())["cases"] == 2


LAYOUT = """
name: Toy
channels: [MRI]
classes: [front, back]
images: ["images{split}/{case}.nii.gz"]
label: "labels{split}/{case}.nii.gz"
splits: [Tr, Va]
"""


@pytest.fixture
def published(toy_data, tmp_path):
    """The arguments of a folder with a published split, two cases of which validate."""
    for kind in ("images", "labels"):
        for i, path in enumerate(sorted((toy_data / f"{kind}Tr").iterdir())):
            place = tmp_path / "published" / f"{kind}{'Tr' if i < 4 else 'Va'}" / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    (tmp_path / "layout.yaml").write_text(LAYOUT)
    return tmp_path / "published", "--layout", tmp_path / "layout.yaml"


def test_the_published_validation_cases_of_a_described_folder_are_scored(
    published, tmp_path, command
):
    predictions = published[0] / "labelsVa"
    command(predictions, *published, "--split", "val", "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out/scores.json").read_text())
    assert (summary["mean_dice"], summary["cases"]) == (1, 2)
    assert summary["split"] == "val of the split that came with the data"


@pytest.mark.parametrize("asked", [["--split", "test"], ["--split", "val", "--fold", "0"]])
def test_a_split_that_did_not_come_with_the_data_is_refused(published, command, asked, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(published[0] / "labelsVa", *published, *asked)
    assert "--fold" in capsys.readouterr().err


def test_predictions_are_not_replaced_by_their_own_copies(toy_data, tmp_path, command, capsys):
    made = tmp_path / "predictions"
    for number in range(6):
        label = Volume.load(toy_data / f"labelsTr/case_{number}.nii.gz")
        label.save(made / f"case_{number}.nii.gz")
    before = (made / "case_0.nii.gz").read_bytes()
    for further in ([], ["--force"]):
        with pytest.raises(SystemExit, match="2"):
            command(made, toy_data, "--out", tmp_path, *further)
    assert "case_0.nii.gz" in capsys.readouterr().err
    assert (made / "case_0.nii.gz").read_bytes() == before
