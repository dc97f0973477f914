"""Counts of known decisions, and their page."""

import json

import numpy as np
import pytest

from sammed3d_backbone.curation.report import count_decisions, write_curation_report
from sammed3d_backbone.curation.rules import PRESETS
from sammed3d_backbone.curation.runs import curate
from sammed3d_backbone.data.volume import Volume

NAMES = {1: "liver", 2: "cyst", 3: "kidneys", 4: "colon"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a mask of every verdict and a refused case."""
    folder = tmp_path_factory.mktemp("curation")
    label = np.zeros((60, 60, 60), np.uint8)
    label[2:14, 2:14, 2:14] = 1
    label[30:33, 2:5, 2:5] = 2
    label[2:11, 20:29, 2:11] = label[40:49, 20:29, 2:11] = 3
    label[2:14, 40:52, 2:14] = 4
    label[[20, 24, 28, 32, 36], 50, 50] = 4
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    entries = []
    for name, array in (("fine", label), ("bad", label + 9)):
        image = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
        Volume(image, affine).save(folder / "raw/set" / f"{name}.nii.gz")
        Volume(array, affine).save(folder / "raw/set" / f"{name}_seg.nii.gz")
        entries.append(
            {
                "image": f"{name}.nii.gz",
                "label": f"{name}_seg.nii.gz",
                "labels": NAMES,
                "modality": "CT",
                "mask": "model",
            }
        )
    (folder / "raw/set/labels.json").write_text(json.dumps(entries))
    found = curate(folder / "raw", folder / "out", PRESETS["default"])
    report = write_curation_report(
        folder / "out", *found, PRESETS["default"], {"preset": "default"}
    )
    return folder / "out", found[1], report.read_text(encoding="utf-8")


def test_masks_are_counted_by_verdict_and_step(finished):
    summary = count_decisions(finished[1])
    assert summary["masks"] == {
        "masks": 5,  # the kidneys are two
        "kept": 1,
        "changed": 3,
        "dropped": 1,
        "dropped, 1 size": 1,
        "more than 99 % background": 5,
    }
    assert summary["refused_cases"] == 1
    assert summary["steps"]["3 islands"] == {
        "kept": 4,
        "changed": 1,
        "dropped": 0,
        "dropped by this only": 0,
    }
    assert summary["steps"]["4 left and right"]["changed"] == 2
    assert summary["class"]["cyst"]["dropped, 1 size"] == 1
    assert summary["modality"]["CT"] == summary["data set"]["set"] == summary["masks"]


def test_a_rule_that_drops_alone_is_told_from_one_that_agrees_with_others(finished):
    cyst = next(d for d in finished[1] if d["class"] == "cyst")
    sparse = {**cyst, "steps": {**cyst["steps"], "background": {"did": "dropped"}}}
    steps = count_decisions([cyst, sparse])["steps"]
    assert steps["1 size"]["dropped by this only"] == 1
    assert steps["2 background"]["dropped by this only"] == 0


def test_the_page_shows_examples_and_both_counts(finished):
    folder, _, text = finished
    assert "Masks of more than 99 % background: 5 of 5, kept by this preset." in text
    assert "values [9, 10, 11, 12, 13] are not declared" in text
    assert "set: masks: model" in text
    assert {path.name for path in (folder / "examples").iterdir()} == {
        "size.png",
        "background.png",
        "islands.png",
        "sides.png",
    }
    assert text.count("data:image/png;base64,") == 4
    assert "http" not in text.replace("http://www.w3.org", "")


def test_the_summary_is_written_beside_it(finished):
    folder, decisions, _ = finished
    written = json.loads((folder / "summary.json").read_text())
    assert written["preset"] == "default"
    assert written["rules"]["max_background"] is None
    assert written["masks"] == count_decisions(decisions)["masks"]
