"""Curation from a shell."""

import json

import numpy as np
import pytest

from sammed3d_backbone.cli import main
from sammed3d_backbone.data.volume import Volume


@pytest.fixture
def raw(tmp_path):
    """A folder in a layout of its own."""
    label = np.zeros((20, 20, 20), np.uint8)
    label[2:12, 2:12, 2:12] = 1
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    Volume(label.astype(np.float32), affine).save(tmp_path / "raw/img/a.nii.gz")
    Volume(label, affine).save(tmp_path / "raw/seg/a.nii.gz")
    (tmp_path / "layout.yaml").write_text(
        "name: Mine\nchannels: [CT]\nclasses: [liver]\n"
        "images: ['img/{case}.nii.gz']\nlabel: 'seg/{case}.nii.gz'\n"
    )
    return tmp_path / "raw"


def curate(*arguments):
    return main(["curate", *map(str, arguments)])


def test_a_run_writes_everything_and_prints_the_counts(raw, tmp_path, capsys):
    layout = ("--layout", tmp_path / "layout.yaml")
    assert curate(raw, tmp_path / "out", *layout, "--jobs", 2, "--backend", "threading") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "run.json",
        "cases",
        "dataset.json",
        "decisions.jsonl",
        "summary.json",
        "report.html",
    }
    out = capsys.readouterr().out
    assert "1 kept, 0 changed, 0 dropped; 0 cases refused" in out
    assert str(tmp_path / "out/report.html") in out
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["command"].startswith("sammed3d curate ")
    assert {"commit", "date", "numpy"} <= summary.keys()


def test_the_smallest_side_may_be_another_one(raw, tmp_path, capsys):
    arguments = ("--layout", tmp_path / "layout.yaml", "--min-side-mm", 21)
    assert curate(raw, tmp_path / "out", *arguments) == 0
    assert "0 kept, 0 changed, 1 dropped" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert "--min-side-mm 21.0" in summary["command"]
    assert summary["rules"]["min_side_mm"] == 21


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ((), "describe it with --layout FILE"),
        (("--preset", "strict"), "choose one of default, paper, author-list"),
        (("--jobs", "0"), "give 1 or more"),
    ],
)
def test_what_cannot_run_says_what_to_do(raw, tmp_path, capsys, arguments, remedy):
    assert curate(raw, tmp_path / "out", *arguments) == 2
    assert remedy in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
