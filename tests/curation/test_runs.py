"""Whole runs: the same files for any number of workers, interrupted or not."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from blocks import SHAPE, block

from sammed3d_backbone.curation import runs
from sammed3d_backbone.curation.rules import PRESETS, CurationRules
from sammed3d_backbone.curation.runs import curate
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.preparation import load_image, load_label, prepare_cases
from sammed3d_backbone.data.preprocessing import Preprocessing

NAMES = {1: "liver", 2: "cyst"}


@pytest.fixture
def folder(raw):
    """Two data sets; of the first, one case keeps both masks, one loses one, one loses all."""
    raw({1: "colon"}, "other", d=block())
    return raw(
        NAMES,
        a=block(1) + block(2, start=20),
        b=block(1) + block(2, start=20, size=3),
        c=block(2, size=3),
    )


def run(folder, out, **workers):
    return curate(folder, out, PRESETS["default"], **workers)[1]


def content(out):
    """Every file of a result folder."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def test_the_result_is_a_data_set_without_what_was_dropped(folder, tmp_path):
    decisions = run(folder, tmp_path / "out")
    assert [(d["place"], d["case"], d["class"], d["verdict"]) for d in decisions] == [
        ("other", "d", "colon", "kept"),
        ("set", "a", "liver", "kept"),
        ("set", "a", "cyst", "kept"),
        ("set", "b", "liver", "kept"),
        ("set", "b", "cyst", "dropped"),
        ("set", "c", "cyst", "dropped"),
    ]
    lines = (tmp_path / "out/decisions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == decisions
    dataset = read_dataset(tmp_path / "out/set")
    assert (dataset.name, dataset.classes, dataset.channels) == ("set", ("liver", "cyst"), ("CT",))
    assert [case.id for case in dataset.cases] == ["a", "b"]
    expected = block(1) + block(2, start=20)
    assert np.array_equal(load_label(dataset.cases[0]).array, expected)
    plain = Preprocessing(None, {"default": "zscore_positive"}, "volume", (1, 1, 1))
    prepared = prepare_cases(dataset, ["a", "b"], plain, progress=False)
    assert [case.annotated.tolist() for case in prepared] == [[True] * 3, [True, True, False]]


def test_all_channels_of_a_case_come_along(nnunet, tmp_path, labels):
    out = tmp_path.parent / f"{tmp_path.name}-out"
    rules = CurationRules(source="a test", min_ml=0, min_side_mm=0)
    curate(nnunet(), out, rules)
    dataset = read_dataset(out)
    assert dataset.channels == ("T1", "FLAIR")
    assert load_image(dataset.cases[0]).channels == 2
    assert np.array_equal(load_label(dataset.cases[0]).array, labels)


def test_subjects_splits_and_marks_of_the_raw_data_come_along(decathlon, tmp_path, write_volume):
    folder = decathlon(
        training=[
            {
                "image": f"imagesTr/case_{i}.nii.gz",
                "label": f"labelsTr/case_{i}.nii.gz",
                "subject": f"person {i // 2}",
                "annotated": ["head"],
                "truncated": ["head"],
            }
            for i in range(4)
        ],
        licence="CC0",
    )
    for i in range(4):
        size = 8 if i < 3 else 3
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        write_volume(f"imagesTr/case_{i}.nii.gz", shape=SHAPE, affine=affine)
        write_volume(
            f"labelsTr/case_{i}.nii.gz", block(1, size=size) + block(2, start=20), affine=affine
        )
    folds = [{"train": ["case_0", "case_1"], "val": ["case_2", "case_3"]}]
    (folder / "splits.json").write_text(json.dumps({"rule": "by hand", "folds": folds}))
    out = tmp_path.parent / f"{tmp_path.name}-out"
    decisions = run(folder, out)
    assert {d["verdict"] for d in decisions if d["class"] == "tail"} == {"dropped"}
    assert "not annotated" in next(d["why"][0] for d in decisions if d["class"] == "tail")
    dataset = read_dataset(out)
    assert dataset.about == {"licence": "CC0"}
    assert [case.subject for case in dataset.cases] == ["person 0", "person 0", "person 1"]
    assert {(case.annotated, case.truncated) for case in dataset.cases} == {(("head",), ("head",))}
    splits = json.loads((out / "splits.json").read_text())
    assert splits["folds"] == [{"train": ["case_0", "case_1"], "val": ["case_2"]}]


def test_two_backends_give_the_same_files(folder, tmp_path):
    run(folder, tmp_path / "alone")
    run(folder, tmp_path / "processes", backend="loky", jobs=2)
    run(folder, tmp_path / "threads", backend="threading", jobs=2)
    alone, processes, threads = (content(tmp_path / n) for n in ("alone", "processes", "threads"))
    assert any(name.endswith("masks/cyst.nii.gz") for name in alone)
    assert alone == processes == threads


def test_the_raw_files_stay_as_they_are(folder, tmp_path):
    before = content(folder)
    run(folder, tmp_path / "out")
    assert content(folder) == before


def test_a_finished_case_is_not_done_again_unless_its_files_change(
    folder, tmp_path, monkeypatch, write_volume
):
    run(folder, tmp_path / "out")
    done = []
    real = runs.curate_case
    monkeypatch.setattr(
        runs, "curate_case", lambda raw, *rest: (done.append(raw.case.id), real(raw, *rest))
    )
    run(folder, tmp_path / "out")
    assert done == []
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    write_volume("raw/set/c_seg.nii.gz", block(1), affine=affine)
    decisions = run(folder, tmp_path / "out")
    assert done == ["c"]
    assert decisions[-1]["class"] == "liver"


def test_a_killed_run_goes_on_to_the_same_files(folder, tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from sammed3d_backbone.cli import main\n"
        "from sammed3d_backbone.data.volume import Volume\n"
        "save, saved = Volume.save, []\n"
        "def dying(self, path):\n"
        "    save(self, path); saved.append(path)\n"
        "    if len(saved) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Volume.save = dying\n"
        "main(sys.argv[1:])"
    )
    arguments = ["curate", str(folder), str(tmp_path / "killed")]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed/set/cases/.a.partial/masks/liver.nii.gz").is_file()
    assert not (tmp_path / "killed/set/cases/a").exists()
    run(folder, tmp_path / "killed")
    run(folder, tmp_path / "whole")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_files_that_change_during_the_run_are_noticed(folder, tmp_path, monkeypatch, write_volume):
    def curate_and_change(raw, *rest):
        real(raw, *rest)
        write_volume("raw/set/c_seg.nii.gz", block(1), affine=np.diag([2.0, 2.0, 2.0, 1.0]))

    real = runs.curate_case
    monkeypatch.setattr(runs, "curate_case", curate_and_change)
    with pytest.raises(ValueError, match="c changed while it was curated; start again"):
        run(folder, tmp_path / "out")


def test_other_rules_want_another_folder(folder, tmp_path):
    run(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"run\.json"):
        curate(folder, tmp_path / "out", PRESETS["paper"])


def test_a_kill_in_the_first_save_is_no_other_file(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.1a2b3c4d.run.json").write_text("{")
    run(folder, tmp_path / "out")
    assert (tmp_path / "out/run.json").is_file()


def test_a_folder_with_other_files_is_refused(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("")
    with pytest.raises(ValueError, match="holds other files; choose a new folder"):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize("place", ["set", "inside"])
def test_nothing_is_written_among_the_raw_data(folder, place):
    with pytest.raises(ValueError, match="choose a folder outside of "):
        run(folder, folder / place)


@pytest.mark.parametrize(
    ("workers", "remedy"),
    [
        ({"jobs": 0}, "give 1 or more, or -1 for all cores"),
        ({"backend": "slurm"}, "slurm.* is not known"),
        ({"backend": "ray"}, "pip install ray"),
    ],
)
def test_workers_that_joblib_does_not_have_are_refused(folder, tmp_path, workers, remedy):
    with pytest.raises(ValueError, match=remedy):
        run(folder, tmp_path / "out", **workers)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "id",
    [
        "{tmp}/victim/photos",  # absolute
        "a/../../../../victim/photos",  # relative, once there is a case a
        "..\\victim",
        "..",
        ".",
        "",
        ".a.partial",  # where case a is made
        "a\0b",
        "a" * 201,
    ],
)
def test_case_ids_that_are_no_file_names_are_refused(decathlon, tmp_path, id):
    (tmp_path / "victim/photos").mkdir(parents=True)
    (tmp_path / "victim/photos/a.txt").write_text("precious")
    raw = tmp_path / "raw"
    raw.mkdir()
    decathlon()
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).rename(raw / name)
    id = id.replace("{tmp}", str(tmp_path))
    entry = {"images": ["imagesTr/case_0.nii.gz"], "label": "labelsTr/case_0.nii.gz"}
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "head": 1, "tail": 2},
        "dataset": {"a": entry, id: entry},
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="case id"):
        run(raw, tmp_path / "out")
    assert (tmp_path / "victim/photos/a.txt").read_text() == "precious"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["photo.jpg", "masks/photo.jpg", "masks/more/liver.nii.gz"])
def test_nothing_is_removed_that_curate_has_not_written(folder, tmp_path, name):
    run(folder, tmp_path / "out")
    other = tmp_path / "out/set/cases/b" / name
    other.parent.mkdir(exist_ok=True)
    other.write_text("precious")
    before = content(tmp_path / "out/set/cases/b")
    os.utime(folder / "set/b.nii.gz", (0, 0))  # so that the case is curated again
    with pytest.raises(FileExistsError, match="curate"):
        run(folder, tmp_path / "out")
    assert content(tmp_path / "out/set/cases/b") == before


def test_links_are_not_followed_when_a_case_is_made_again(folder, tmp_path):
    run(folder, tmp_path / "out")
    case = tmp_path / "out/set/cases/b"
    case.rename(tmp_path / "elsewhere")
    case.symlink_to(tmp_path / "elsewhere")
    before = content(tmp_path / "elsewhere")
    os.utime(folder / "set/b.nii.gz", (0, 0))
    with pytest.raises(FileExistsError, match="curate"):
        run(folder, tmp_path / "out")
    assert content(tmp_path / "elsewhere") == before
