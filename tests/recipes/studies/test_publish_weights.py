"""A finished pretraining becomes weights of the package."""

import hashlib
import json

import pytest
import torch
from sammed3d_backbone.recipes.studies import tables
from sammed3d_backbone.recipes.studies.publish_weights import main

from sammed3d_backbone.loading.checkpoint import read, write
from sammed3d_backbone.loading.registry import Weights, from_metadata, to_metadata


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    tensors = {"image_encoder.pos_embed": torch.ones(1, 2, 2, 2, 6)}
    training = {"config": {"clicks": "all"}}
    record = Weights(name="run", variant="toy", rel_pos="axial")
    entries = {"training": json.dumps(training), **to_metadata(record)}
    write(folder / "last.safetensors", tensors, entries)
    (folder / "config.yaml").write_text(f"weights: {folder}/last.safetensors\n")
    lines = [
        {"step": 1, "loss": 2.0, "dice_first": 0.1, "dice_last": 0.2, "patch_error": 0.9},
        {"step": 1, "mean_dice": 0.2, "dice_1": 0.1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_weights_sums_and_curve_lie_where_they_belong(run, tmp_path):
    weights, results = tmp_path / "weights", tmp_path / "results"
    weights.mkdir()
    digest = main([run, run], "toy", weights, results, variant="tiny")
    content = (weights / "toy.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    assert (weights / "SHA256SUMS").read_text() == f"{digest}  toy.safetensors\n"
    tensors, metadata = read(weights / "toy.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    record = from_metadata(Weights(name="file"), metadata)
    assert (record.variant, record.rel_pos, record.clicks) == ("tiny", "axial", "all")
    assert json.loads(metadata["training"])["config"] == {"clicks": "all"}
    assert {path.name for path in results.iterdir()} == {"runs.csv", "curves.csv", "figure.png"}
    stages = tables.read(results, "runs").set_index("run")
    assert json.loads(stages.loc["stage2", "settings"]) == {"weights": "run/last.safetensors"}
    curves = tables.read(results, "curves")
    assert [*curves["run"]] == ["stage1"] * 2 + ["stage2"] * 2
    assert curves["dice_1"].notna().tolist() == [False, True] * 2


def test_a_run_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="let the pretraining get there"):
        main([tmp_path], "toy", tmp_path, tmp_path)
