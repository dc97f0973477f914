"""The study of peers: budget, converted cases, resuming, scores and table; nnU-Net where it is."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from boxes import write_boxes
from sammed3d_backbone.recipes.studies import tables
from sammed3d_backbone.recipes.studies.peers import peers_study, recipe_arm
from sammed3d_backbone.recipes.studies.peers.conversion import RAW, convert
from sammed3d_backbone.recipes.studies.peers.peers_report import verdicts
from sammed3d_backbone.recipes.studies.peers.peers_study import (
    Place,
    Planned,
    Study,
    compare,
    curve_of,
    execute,
    in_order,
    iterations_in,
    main,
    once,
    prepare,
    read_study,
    scored,
)

from sammed3d_backbone.data.datasets import Fold, read_fold
from sammed3d_backbone.data.folders import open_dataset
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import Segmenter

STUDY = Path(peers_study.__file__).with_name("peers_study.yaml")


@pytest.fixture
def study(tmp_path, toy_data):
    """Two arms on boxes, of which nnU-Net's comes first."""
    return Study(
        out=str(tmp_path / "study"),
        tasks={
            "boxes": {
                "nnunet_gb": 0.2,
                "data": str(toy_data),
                "test_subjects": 2,
                "classes": ["back"],
            }
        },
        grid=[{"task": "boxes", "labels": 2, "draw": 0, "arms": ["nnunet", "tiny"]}],
    )


@pytest.fixture
def made(monkeypatch, runs):
    """Names of the runs in their order; invented figures replace training and prediction."""

    class Seen(list):
        limit = 10**6

    seen = Seen()

    def make(run, study, place, _):
        if len(seen) == seen.limit:
            raise KeyboardInterrupt
        seen.append(run.name)
        dice = 0.8 + 0.05 * (run.arm == "tiny")
        rows = [
            {"case": name, "subject": name, "class": "back", "dice": dice, "nsd": dice}
            for name in place.fold.val
        ]
        row = {
            "iterations": 900,
            "cpu_seconds": 1700.0 + 200 * (run.arm == "tiny"),
            "parameters": 2e6,
            "plan": "a plan",
            "start": "random",
            "seen": "no",
            "peak_memory_mb": 100,
            "case_cpu_seconds": 1.5,
            "curve": f"850:{dice - 0.04} 1700:{dice}",
        }
        return row, pd.DataFrame(rows).assign(annotated="yes", truncated="no")

    monkeypatch.setattr(peers_study, "run_nnunet", make)
    monkeypatch.setattr(peers_study, "run_recipe", make)
    return seen


def test_the_iterations_stay_within_the_budget():
    assert iterations_in(1800, 1.5) <= 1200
    assert iterations_in(1800, 1.5) >= 0.95 * 1200
    assert iterations_in(1, 60) == 1


def test_the_committed_study_begins_with_nnunet_and_has_the_split_of_the_transfer_study():
    study = read_study(STUDY)
    assert [run.arm for run in in_order(study)][:2] == ["nnunet", "tiny"]
    assert study.tasks["abdomen_mr"]["test_subjects"] == 10
    folds = {run.draw for run in in_order(study) if run.task == "headneck_ct"}
    assert folds <= {0, 1}  # what the weights did not see


def test_an_unknown_arm_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "out: x\ntasks: {a: {}}\ngrid: [{task: a, labels: 8, draw: 0, arms: [unknown]}]"
    )
    with pytest.raises(ValueError, match="unknown"):
        read_study(path)


def test_converted_cases_keep_their_voxels_and_their_geometry(toy_data, tmp_path):
    dataset = open_dataset(str(toy_data))
    ids = [case.id for case in dataset.cases]
    convert(dataset, Fold(tuple(ids[:4]), tuple(ids[4:]), ""), tmp_path)
    raw = open_dataset(str(tmp_path / RAW))  # by the rules of nnU-Net's format
    assert [case.id for case in raw.cases] == ids[:4]
    assert raw.classes == dataset.classes
    for case in dataset.cases:
        part = "Tr" if case.id in ids[:4] else "Ts"
        for source, copied in (
            (case.images[0], tmp_path / RAW / f"images{part}" / f"{case.id}_0000.nii.gz"),
            (case.label, tmp_path / RAW / f"labels{part}" / f"{case.id}.nii.gz"),
        ):
            assert copied.read_bytes() == source.read_bytes()


def test_our_recipe_reads_the_same_cases_with_the_test_cases_as_its_split(toy_data, tmp_path):
    dataset = open_dataset(str(toy_data))
    ids = [case.id for case in dataset.cases]
    convert(dataset, Fold(tuple(ids[2:]), tuple(ids[:2]), ""), tmp_path)
    fold = read_fold(open_dataset(str(tmp_path / "all")), 0)
    assert (fold.train, fold.val) == (tuple(ids[2:]), tuple(ids[:2]))


def test_only_the_named_classes_are_kept_and_numbered_in_their_order(toy_data, tmp_path):
    dataset = open_dataset(str(toy_data))
    case = dataset.cases[0]
    convert(dataset, Fold((case.id,), (), ""), tmp_path, ["back"])
    before = Volume.load(case.label)
    after = Volume.load(tmp_path / RAW / "labelsTr" / f"{case.id}.nii.gz")
    np.testing.assert_array_equal(after.array, before.array == 2)
    np.testing.assert_array_equal(after.affine, before.affine)
    described = json.loads((tmp_path / RAW / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "back": 1}


def test_a_class_that_is_not_annotated_in_every_case_is_refused(tmp_path):
    write_boxes(tmp_path / "data", partly=True)
    dataset = open_dataset(str(tmp_path / "data"))
    ids = tuple(case.id for case in dataset.cases)
    convert(dataset, Fold(ids, (), ""), tmp_path / "front", ["front"])
    with pytest.raises(ValueError, match="annotated"):
        convert(dataset, Fold(ids, (), ""), tmp_path / "both")


def test_all_arms_of_a_draw_have_the_same_cases_and_draws_others(study, runs):
    first = prepare(Planned("boxes", 2, 0, "nnunet"), study)
    again = prepare(Planned("boxes", 2, 0, "tiny"), study)
    other = prepare(Planned("boxes", 2, 1, "tiny"), study)
    assert first.fold == again.fold
    assert first.fold.val == other.fold.val  # split once
    assert first.fold.train != other.fold.train
    assert first.dataset.classes == ("back",)


def test_a_stopped_study_is_resumed_with_the_runs_that_are_missing(study, made):
    made.limit = 1
    with pytest.raises(KeyboardInterrupt):
        main(study)
    made.limit = 10**6
    main(study)
    assert made == ["boxes_2_draw0_nnunet", "boxes_2_draw0_tiny"]
    main(study)
    assert len(made) == 2
    with pytest.raises(ValueError, match="config"):
        main(replace(study, budget_cpu_seconds=60.0))


def test_the_table_has_the_difference_to_nnunet_and_says_what_does_not_count(study, made):
    main(study)
    out = Path(study.out)
    text = (out / "table.md").read_text()
    assert "+5.00" in text
    assert "850/1700" in text  # where the curve is as high as nnU-Net's at its end
    assert "1900 (over the budget)" in text
    assert "1700," in text
    assert "does not count, 900 iterations" in text
    assert (out / "figure.png").is_file()
    runs = tables.read(out, "runs").assign(iterations=1000)
    assert "- boxes, 2 subjects: counts, 1,000 iterations" in verdicts(
        runs, study.counted_iterations
    )


def test_a_finished_stage_is_not_repeated(tmp_path):
    assert once(tmp_path / "stage.json", lambda: {"a": 1}) == {"a": 1}
    assert once(tmp_path / "stage.json", pytest.fail) == {"a": 1}


def test_the_cost_of_a_command_has_its_workers_in_it(tmp_path):
    spend = "import time\nwhile time.process_time() < 0.4: pass\n"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spend!r}])"
    code += "; print('words'); print('{\"iterations\": 3}')"
    found = execute([sys.executable, "-c", code], tmp_path / "log.txt")
    assert found["iterations"] == 3
    assert found["command"]["cpu_seconds"] > 0.4
    assert found["command"]["peak_memory_mb"] > 1


def test_a_command_that_fails_is_named_with_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"log\.err"):
        execute([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log.txt")


def test_a_curve_has_the_training_time_at_each_validation():
    records = [
        {"step": 10, "cpu_seconds": 5.0},
        {"step": 12, "mean_dice": 0.5},
        {"step": 20, "cpu_seconds": 15.0},
        {"step": 20, "mean_dice": 0.6},
    ]
    assert curve_of(records) == [(7.0, 0.5), (15.0, 0.6)]


@pytest.fixture
def predicted(toy_data, tmp_path):
    """Predictions that are right, shifted and empty, in a place of the study."""
    dataset = open_dataset(str(toy_data))
    ids = tuple(case.id for case in dataset.cases)
    convert(dataset, Fold(ids[:3], ids[3:], ""), tmp_path)
    dataset = open_dataset(str(tmp_path / "all"))
    for number, name in enumerate(ids[3:]):
        truth = Volume.load(tmp_path / RAW / "labelsTs" / f"{name}.nii.gz")
        moved = np.roll(truth.array, number, axis=0) * (number < 2)
        replace(truth, array=moved).save(tmp_path / "predictions" / f"{name}.nii.gz")
    return Place("toy", tmp_path, tmp_path, dataset, read_fold(dataset, 0))


def test_another_evaluation_that_differs_is_refused(predicted):
    scores = scored(predicted.arm / "predictions", predicted)
    theirs = {f"{score.case}.nii.gz": {} for score in scores}
    for score in scores:
        value = {"front": "1", "back": "2"}[score.name]
        theirs[f"{score.case}.nii.gz"][value] = score["dice"]
    compare(scores, theirs, predicted.dataset)
    theirs[f"{scores[0].case}.nii.gz"]["1"] += 1e-5
    with pytest.raises(ValueError, match="nnU-Net"):
        compare(scores, theirs, predicted.dataset)


@pytest.mark.skipif("NNUNET_PYTHON" not in os.environ, reason="needs a Python with nnU-Net")
def test_nnunets_own_evaluation_gives_the_same_dice(predicted):
    words = ["evaluate", predicted.folder / RAW / "labelsTs", predicted.arm / "predictions"]
    command = [os.environ["NNUNET_PYTHON"], peers_study.TRAINER, *words]
    scores = scored(predicted.arm / "predictions", predicted)
    assert {score["dice"] for score in scores} >= {0.0, 1.0}
    compare(scores, execute(command, predicted.arm / "log.txt"), predicted.dataset)


@pytest.mark.parametrize("side", [24, 32])
def test_monais_network_fits_the_crop_of_the_plan(side):
    network, card = recipe_arm.segresnet(_card(side), "toy")
    outputs = network.train()(torch.zeros(1, 1, side, side, side))
    assert outputs[0].shape == (1, 3, side, side, side)
    assert len(outputs) > 1
    assert "MONAI" in card.training["start"]["weights"]


def test_a_trained_network_of_monai_predicts_a_folder(toy_data, tmp_path):
    network, card = recipe_arm.segresnet(_card(24), "toy")
    Segmenter(network, card).save(tmp_path / "last.safetensors")
    dataset = open_dataset(str(toy_data))
    case = dataset.cases[0]
    convert(dataset, Fold((), (case.id,), ""), tmp_path)
    source = tmp_path / RAW / "imagesTs"
    found = recipe_arm.predict(tmp_path / "last.safetensors", source, tmp_path / "predictions")
    assert found["cases"] == 1
    labels = Volume.load(tmp_path / "predictions" / f"{case.id}.nii.gz")
    assert labels.array.shape == Volume.load(case.label).array.shape


def _card(side):
    return Card(
        network="basicunet",
        encoder={},
        adapter={},
        labels={0: "background", 1: "front", 2: "back"},
        channels=("MRI",),
        preprocessing=replace(SAM_MED3D, crop_vox=(side,) * 3, spacing_mm=(1.0, 1.0, 1.0)),
    )
