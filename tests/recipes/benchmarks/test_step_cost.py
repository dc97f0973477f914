"""Memory and time of a step: the committed figures, and the data they are taken on."""

import json

import numpy as np
import pytest
from sammed3d_backbone.recipes.benchmarks import step_cost

from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.preparation import load_label


@pytest.fixture(scope="module")
def committed(root):
    return json.loads((root / "recipes/benchmarks/step_cost.json").read_text())


@pytest.mark.parametrize("way", step_cost.WAYS)
def test_the_memory_of_a_step_was_foreseen_within_15_percent(committed, way):
    row = committed["ways"][way]
    assert row["expected_bytes"] == pytest.approx(row["peak_bytes"], rel=0.15)


def test_recomputing_saves_memory(committed):
    for way in ("float32", "bf16"):
        kept, recomputed = (committed["ways"][w] for w in (way, f"{way}, recomputed"))
        assert recomputed["peak_bytes"] < kept["peak_bytes"]


def test_the_readme_shows_the_table_of_the_committed_figures(committed, root):
    assert step_cost.table(committed) in (root / "recipes/README.md").read_text()


def test_every_cube_holds_every_class(tmp_path, monkeypatch):
    monkeypatch.setattr(step_cost, "SIDE", 32)
    step_cost.write_cubes(tmp_path)
    dataset = read_dataset(tmp_path)
    assert len(dataset.labels) == step_cost.CLASSES
    for case in dataset.cases:
        assert set(np.unique(load_label(case).array)) == set(range(step_cost.CLASSES))
