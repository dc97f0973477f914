"""Distillation from a folder of scans to weights, on boxes, with small networks."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from balls import answer_balls
from safetensors import safe_open
from safetensors.torch import load_file
from sammed3d_backbone.recipes import distill, finetune_unetr, pretrain_promptable
from sammed3d_backbone.recipes.distill import Config, main

from sammed3d_backbone import Predictor, Volume, config, sam
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.loading.checkpoint import read, write
from sammed3d_backbone.loading.registry import PretrainingSet, Weights, to_metadata
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.training import engine


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """A file of a network that sees 24 voxels of 0.75 mm; networks answer balls around clicks."""
    monkeypatch.setattr(Sam3D, "decode", answer_balls)
    torch.manual_seed(0)
    network = sam("nano", pretrained=False, img_size=24)
    preprocessing = replace(SAM_MED3D, spacing_mm=(0.75,) * 3, crop_vox=(24,) * 3)
    record = Weights(
        name="nano",
        variant="nano",
        rel_pos="axial",
        clicks="all",
        licence="of its owner",
        preprocessing=preprocessing,
        pretraining=(PretrainingSet("Abdomen", (1,)),),
        held_out=("Toy", "Brain"),
        undisclosed_sets=3,
    )
    training = json.dumps({"cases": {"Abdomen": ["a"]}})
    path = tmp_path / "teacher.safetensors"
    write(path, network.state_dict(), {"training": training, **to_metadata(record)})
    return path


@pytest.fixture
def small(small_pretraining, teacher):
    """A run of a few steps."""
    mine = {field.name for field in fields(Config)}
    kept = {key: value for key, value in small_pretraining.items() if key in mine}
    return Config(
        **{**kept, "shares": ()},
        teacher=str(teacher),
        student="nano",
        spacing_mm=1.0,
        crops=8,
        teacher_clicks=3,
    )


@pytest.fixture
def scans(toy_data, tmp_path):
    """A folder of three scans without labels."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for path in sorted((toy_data / "imagesTr").glob("*.nii.gz"))[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def network_of(path):
    """The tensors of a run's weights."""
    return load_file(path / "last.safetensors")


def test_a_run_leaves_weights_with_lineage_and_licence(small, runs, toy_data):
    scores = main(small)
    assert {"mean_dice", "dice_1_Toy"} <= scores.keys()
    path = runs / "toy/last.safetensors"
    record = sam("nano", weights=path).pretrained_cfg
    assert record.licence == "of its owner"
    assert record.distilled_from.startswith("teacher.safetensors (sha256 ")
    stages = {entry.name: entry.stages for entry in record.pretraining}
    assert stages == {"Abdomen": (1,), "synthetic": (2,), "Toy": (2,)}
    assert (record.held_out, record.undisclosed_sets) == (("Toy", "Brain"), 3)
    with safe_open(path, "pt") as file:
        training = json.loads(file.metadata()["training"])
    assert training["teacher"]["training"] == {"cases": {"Abdomen": ["a"]}}
    assert len(training["cases"]["Toy"]) == 4
    assert distill.trained_before(str(path))["teacher"]["licence"] == "of its owner"
    predictor = Predictor(sam("nano", weights=path))
    predictor.set_volume(Volume.load(next((toy_data / "imagesTr").glob("*.nii.gz"))))
    predictor.click((5, 5, 5))
    assert predictor.predict().clicks == 1


def test_a_folder_without_labels_is_enough(small, runs, scans):
    small = replace(small, sources=(), data=str(scans), val_cases=1)
    scores = main(small)
    assert 0 <= scores["dice_1_scans"] <= 1
    record = sam("nano", weights=runs / "toy/last.safetensors").pretrained_cfg
    assert [entry.name for entry in record.pretraining] == ["Abdomen", "scans"]


def test_later_epochs_and_runs_take_the_answers_from_disk(small, runs, monkeypatch):
    main(small)

    def refuse(*_given):
        raise AssertionError("the teacher is asked again")

    monkeypatch.setattr(distill, "answer_crop", refuse)
    main(replace(small, name="again"))
    first, again = (network_of(runs / name) for name in ("toy", "again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    with pytest.raises(AssertionError, match="asked again"):
        main(replace(small, name="other", teacher_clicks=2))


def test_without_labels_their_content_does_not_matter(small, runs, toy_data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(toy_data, other)
    for path in (other / "labelsTr").glob("*.nii.gz"):
        label = Volume.load(path)
        Volume(label.array[::-1].astype(np.uint8), label.affine).save(path)
    results = []
    for name, folder in (("one", toy_data), ("two", other)):
        main(replace(small, name=name, sources=(), data=str(folder), labels=False))
        results.append(network_of(runs / name))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bits(small, runs, monkeypatch):
    main(small)
    whole = network_of(runs / "toy")
    (runs / "toy").rename(runs / "whole")
    train = engine.train
    calls = []

    def once(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        train(*given)

    monkeypatch.setattr(engine, "train", once)
    with pytest.raises(KeyboardInterrupt):
        main(small)
    main(small)
    resumed = network_of(runs / "toy")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher": "turbi"}, "turbi"),
        ({"student": "minute"}, "minute"),
        ({"sources": (), "data": "/nowhere"}, "/nowhere"),
        ({"exclude": ("toy",)}, "exclude="),
    ],
)
def test_what_cannot_be_used_is_named(small, changes, named):
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        main(replace(small, **changes))


def test_a_folder_without_scans_is_refused(small, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        main(replace(small, sources=(), data=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="data=FOLDER"):
        replace(small, sources=())


def test_cases_that_the_teacher_was_trained_on_are_not_scored(small, teacher, toy_data):
    cases = sorted(path.name.split(".")[0] for path in (toy_data / "imagesTr").glob("*.nii.gz"))
    tensors, metadata = read(teacher)
    training = json.dumps({"cases": {"Toy": cases}})
    write(teacher, tensors, metadata | {"training": training}, overwrite=True)
    with pytest.raises(ValueError, match="val_cases="):
        main(small)


@pytest.mark.slow
def test_the_command_distils_on_synthetic_volumes(small, runs, teacher, tmp_path):
    path = tmp_path / "synthetic.yaml"
    path.write_text(config.dump(replace(small, sources=("synthetic",), crops=3, cache=None)))
    done = subprocess.run(
        [sys.executable, distill.__file__, path, "name=command", f"cache={tmp_path / 'answers'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 3 crops have objects" in done.stdout
    assert len(list((tmp_path / "answers").glob("*.safetensors"))) == 3
    sam("nano", weights=runs / "command/last.safetensors")
    refused = subprocess.run(
        [sys.executable, distill.__file__, path, "teacher=turbi"], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "turbi" in refused.stderr.splitlines()[-1]


def test_cases_and_folders_that_are_excluded_are_not_used(small, runs, scans):
    small = replace(small, sources=(), data=str(scans), val_cases=1)
    names = sorted(path.name.split(".")[0] for path in scans.iterdir())
    main(replace(small, exclude=(names[0].upper(),)))
    with safe_open(runs / "toy/last.safetensors", "pt") as file:
        used = json.loads(file.metadata()["training"])["cases"]["scans"]
    assert len(used) == 1
    assert names[0] not in used
    with pytest.raises(ValueError, match="exclude="):
        main(replace(small, name="other", exclude=("Scans",)))
    with pytest.raises(ValueError, match="two or more"):
        main(replace(small, name="other", exclude=tuple(names[:2])))


def test_another_modality_asks_the_teacher_again(small, runs, scans, tmp_path):
    small = replace(small, sources=(), data=str(scans), val_cases=1, cache=str(tmp_path / "cache"))
    main(small)
    number = len(list((tmp_path / "cache").iterdir()))
    main(replace(small, name="ct", modality="ct"))
    assert len(list((tmp_path / "cache").iterdir())) == 2 * number


def test_a_modality_beside_a_data_set_is_refused(small):
    with pytest.raises(ValueError, match="modality="):
        main(replace(small, modality="ct"))


def test_a_folder_that_is_given_is_used_before_a_data_set_of_its_name(
    small, runs, scans, toy_data, monkeypatch
):
    monkeypatch.setenv("SAMMED3D_DATA", str(toy_data.parent))
    scans.rename(scans.with_name(toy_data.name))
    monkeypatch.chdir(scans.parent)
    scores = main(replace(small, sources=(), data=toy_data.name, val_cases=1))
    assert f"dice_1_{toy_data.name}" in scores


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scan_with_voxels_that_are_not_finite_is_named(small, scans, value):
    for path in scans.iterdir():
        scan = Volume.load(path)
        scan.array[3, 3, 3] = value
        Volume(scan.array, scan.affine).save(path)
    with pytest.raises(ValueError, match="non-finite"):
        main(replace(small, sources=(), data=str(scans), val_cases=1))


@pytest.mark.parametrize("recipe", [Config, finetune_unetr.Config, pretrain_promptable.Config])
def test_a_seed_below_0_is_named(recipe):
    known = {field.name for field in fields(recipe)}
    given = {"name": "x", "data": "y", "sources": [], "shares": []}
    with pytest.raises(ValueError, match="seed=-1"):
        config.build(recipe, {k: v for k, v in given.items() if k in known} | {"seed": -1})
