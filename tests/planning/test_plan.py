"""sammed3d plan: what is found in a folder, what is chosen, and a configuration that runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sammed3d_backbone.recipes.finetune_unetr import Config

from sammed3d_backbone import config
from sammed3d_backbone.cli import main
from sammed3d_backbone.data.datasets import DatasetError
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.loading.registry import WEIGHTS
from sammed3d_backbone.planning.findings import find_suspicious
from sammed3d_backbone.planning.fingerprint import fingerprint
from sammed3d_backbone.planning.rules import (
    choose_flips,
    choose_model,
    choose_spacing,
    find_modality,
    from_data,
    from_machine,
    step_gib,
)

SHAPE = (40, 24, 20)
CASES = 6


def boxes(left=(6, 14), right=(26, 34)):
    """Labels of a left and a right block, at 1.5 mm; axis 0 runs to the patient's right."""
    label = np.zeros(SHAPE, np.uint8)
    label[slice(*left), 8:16, 6:14] = 1
    label[slice(*right), 8:16, 6:14] = 2
    return label


@pytest.fixture
def make_set(tmp_path):
    """Writes a folder of two kidneys; changes are by number of the case."""

    def make(labels=None, spacings=None, images=None, names=None, **info):
        labels, spacings, images = labels or {}, spacings or {}, images or {}
        for i in range(CASES):
            rng = np.random.default_rng(images.get(i, i))
            affine = np.diag([*spacings.get(i, (1.5, 1.5, 1.5)), 1])
            label = labels.get(i, boxes())
            image = rng.normal(300, 20, SHAPE).astype(np.float32)
            Volume(image, affine).save(tmp_path / f"set/imagesTr/case_{i}.nii.gz")
            Volume(label, affine).save(tmp_path / f"set/labelsTr/case_{i}.nii.gz")
        entries = [
            {
                "image": f"imagesTr/case_{i}.nii.gz",
                "label": f"labelsTr/case_{i}.nii.gz",
                "subject": f"person_{i}",
            }
            for i in range(CASES)
        ]
        described = {
            "name": "Toy",
            "modality": {"0": "MRI"},
            "labels": names or {"0": "background", "1": "LeftKidney", "2": "RightKidney"},
            "training": entries,
        }
        (tmp_path / "set/dataset.json").write_text(json.dumps(described | info))
        return tmp_path / "set"

    return make


def looked_at(folder):
    """The fingerprint of a folder, and its findings as text."""
    found = fingerprint(read_dataset(folder))
    return found, [str(finding) for finding in find_suspicious(found, 5)]


def test_a_plain_set_has_nothing_suspicious(make_set):
    assert looked_at(make_set())[1] == []


def test_the_decoder_with_weights_is_for_few_subjects_and_classes(make_set):
    found = looked_at(make_set())[0]
    crowd = [
        replace(c, case=replace(c.case, subject=f"{n}")) for n, c in enumerate(found.cases * 3)
    ]
    many = {**found.dataset.labels, **{n: f"class_{n}" for n in range(3, 20)}}
    assert choose_model(found).value == "class_prompts"
    assert choose_model(replace(found, cases=tuple(crowd))).value == "segresnet"
    crowded = replace(found, dataset=replace(found.dataset, labels=many))
    assert choose_model(crowded).value == "segresnet"


def without(value):
    label = boxes()
    label[label == value] = 0
    return label


@pytest.mark.parametrize(
    ("changes", "token", "case"),
    [
        ({"labels": {3: boxes(left=(0, 8))}}, "border", "case_3"),
        ({"spacings": {2: (15.0, 15.0, 15.0)}}, "spacing", "case_2"),
        ({"labels": {4: boxes(left=(26, 34), right=(6, 14))}}, "named right", "case_4"),
        ({"images": {5: 1}}, "same scan", "case_1, case_5"),
        ({"labels": {i: without(2) for i in range(5)}}, "fold", "case_5"),
        ({"labels": {i: without(2) for i in range(6)}}, "RightKidney has no voxel in any", ""),
    ],
)
def test_each_suspicious_thing_is_found_where_it_is(make_set, changes, token, case):
    said = [line for line in looked_at(make_set(**changes))[1] if token in line]
    assert len(said) == 1
    assert case in said[0]


def test_a_mirrored_case_is_found_without_names_of_sides(make_set):
    names = {"0": "background", "1": "liver", "2": "spleen"}
    folder = make_set(labels={4: boxes()[::-1]}, names=names)
    said = [line for line in looked_at(folder)[1] if "mirrored" in line]
    assert len(said) == 1
    assert "case_4" in said[0]


def test_the_plan_is_the_same_twice_and_the_recipe_reads_it(make_set, tmp_path, monkeypatch):
    folder = make_set()
    monkeypatch.chdir(tmp_path)
    given = ["plan", str(folder), "--memory", "8GB", "--precision", "no", "--steps", "50"]
    assert main(given) == 0
    first = (tmp_path / "Toy.plan.yaml").read_bytes()
    assert main([*given, "--out", "again.yaml"]) == 0
    again = (tmp_path / "again.yaml").read_bytes()
    assert first.replace(b"Toy.plan.yaml", b"again.yaml") == again
    cfg = config.load(Config, tmp_path / "Toy.plan.yaml")
    assert (cfg.steps, cfg.data) == (50, str(folder))
    assert "flip_axes" in (tmp_path / "Toy.plan.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in folder.iterdir()) == [
        "dataset.json",
        "imagesTr",
        "labelsTr",
    ]


def test_an_unclear_modality_names_the_option(make_set):
    found, _ = looked_at(make_set(modality={"0": "image"}))
    with pytest.raises(ValueError, match="--modality"):
        find_modality(found)
    assert find_modality(found, "us")[0] == "us"


def test_flips_need_names_without_sides_and_classes_without_an_order(make_set):
    found, _ = looked_at(make_set())
    assert choose_flips(found).value == [1, 2]
    names = {"0": "background", "1": "liver", "2": "spleen"}
    assert choose_flips(looked_at(make_set(names=names))[0]).value == [1, 2]
    mixed = {i: boxes()[::-1] for i in range(0, CASES, 2)}
    assert choose_flips(looked_at(make_set(mixed, names=names))[0]).value == [0, 1, 2]


def test_thin_classes_ask_for_a_finer_spacing_but_none_finer_than_the_scans(make_set):
    found, _ = looked_at(make_set())
    expected = WEIGHTS["tiny"].preprocessing
    assert choose_spacing(found, expected).value == [1.5, 1.5, 1.5]  # no finer than the scans
    finer = dict.fromkeys(range(CASES), (0.5, 0.5, 0.5))
    (mm, *_) = choose_spacing(looked_at(make_set(spacings=finer))[0], expected).value
    assert mm == 0.5


def test_less_memory_takes_smaller_steps_and_too_little_is_refused(make_set):
    found, _ = looked_at(make_set())
    data = from_data(found, "vit_b", None, 5)

    def chosen(gib):
        return {choice.key: choice.value for choice in from_machine(found, data, gib, 100, "no")}

    needed = step_gib({choice.key: choice.value for choice in data}, found, 2, False, "no")
    assert (chosen(needed)["batch"], chosen(needed)["accumulate"]) == (2, 1)
    assert (chosen(0.99 * needed)["batch"], chosen(0.99 * needed)["accumulate"]) == (1, 2)
    with pytest.raises(ValueError, match="--memory"):
        chosen(0.5)


def test_no_workers_are_not_all_cores(make_set, tmp_path, capsys):
    given = ["plan", str(make_set()), "--jobs", "0", "--out", str(tmp_path / "x.plan.yaml")]
    assert main(given) == 2
    assert "jobs" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_is_planned_for_before_training(make_set, tmp_path, monkeypatch, capsys):
    folder = make_set()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMMED3D_RUNS", str(tmp_path / "runs"))
    assert main(["train", str(folder), "--steps", "1", "--dry-run"]) == 0
    assert "planning first" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_hours_become_steps_by_the_speed_of_this_machine(make_set, tmp_path, monkeypatch, capsys):
    folder = make_set()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sammed3d_backbone.recipes.finetune_unetr.cores", lambda: 1)
    given = ["plan", str(folder), "--memory", "8GB", "--precision", "no"]
    assert main([*given, "--hours", "0.00001"]) == 2
    assert "--hours" in capsys.readouterr().err
    steps = []
    for number, hours in enumerate((0.1, 1)):
        assert main([*given, "--hours", str(hours), "--out", f"{number}.yaml"]) == 0
        steps.append(config.load(Config, tmp_path / f"{number}.yaml").steps)
    assert 0 < 3 * steps[0] < steps[1]
    assert "digest" not in capsys.readouterr().out  # the dry run says nothing by itself
    assert "measured on this machine" in (tmp_path / "1.yaml").read_text()


def test_a_recipe_is_copied_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", "copy", "finetune_unetr"]) == 0
    assert "class Config" in (tmp_path / "finetune_unetr.py").read_text()
    assert main(["recipe", "copy", "finetune_unetr"]) == 2
    assert main(["recipe", "copy", "nothing"]) == 2
    assert "finetune_unetr" in capsys.readouterr().err


def test_a_scan_of_one_value_is_refused_before_it_is_planned_for(make_set):
    folder = make_set()
    path = folder / "imagesTr/case_2.nii.gz"
    Volume(np.full(SHAPE, 7, np.float32), Volume.load(path).affine).save(path)
    with pytest.raises(DatasetError, match=r"case_2\.nii\.gz"):
        looked_at(folder)


def test_a_key_and_its_value_may_follow_an_option(tmp_path, capsys):
    plan = tmp_path / "x.plan.yaml"
    plan.write_text("name: x\ndata: nowhere\n")
    assert main(["train", str(plan), "--dry-run", "lr=fast"]) == 2
    assert "lr='fast'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", str(plan), "--dry-run", "--fast"])
    assert "--fast" in capsys.readouterr().err
