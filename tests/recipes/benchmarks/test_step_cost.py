"""Memory and time of a fine-tuning step."""

import numpy as np
from sammed3d_backbone.recipes.benchmarks import step_cost

from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.preparation import load_label


def test_every_cube_holds_every_class(tmp_path, monkeypatch):
    monkeypatch.setattr(step_cost, "SIDE", 32)
    step_cost.write_cubes(tmp_path)
    dataset = read_dataset(tmp_path)
    assert len(dataset.labels) == step_cost.CLASSES
    for case in dataset.cases:
        assert set(np.unique(load_label(case).array)) == set(range(step_cost.CLASSES))
