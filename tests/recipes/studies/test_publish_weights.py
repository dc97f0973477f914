"""A finished pretraining becomes weights of the package."""

import hashlib
import json
from dataclasses import astuple

import pandas as pd
import pytest
import torch
from sammed3d_backbone.recipes.studies import tables
from sammed3d_backbone.recipes.studies.publish_weights import main

from sammed3d_backbone.loading.calibration import DiceCalibration
from sammed3d_backbone.loading.checkpoint import read, write
from sammed3d_backbone.loading.registry import UnetrDecoder, Weights, from_metadata, to_metadata


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


@pytest.fixture
def decoder(run, tmp_path):
    """A run of a decoder on the weights of the other run."""
    folder = tmp_path / "decoder"
    folder.mkdir()
    tensors, metadata = read(run / "last.safetensors")
    tensors["unetr.stem.weight"] = torch.ones(4).half()
    record = Weights(name="decoder", variant="toy", unetr=UnetrDecoder(4, 8, (0, 1)))
    about = {"training": metadata["training"], "unetr_training": "{}", **to_metadata(record)}
    write(folder / "last.safetensors", tensors, about)
    for name in ("config.yaml", "metrics.jsonl"):
        (folder / name).write_bytes((run / name).read_bytes())
    (folder / "curve.png").write_bytes(b"png")
    return folder


def test_a_decoder_is_added_to_published_weights(run, decoder, tmp_path):
    weights, results = tmp_path / "weights", tmp_path / "results/toy"
    weights.mkdir()
    main([run], "toy", weights, results)
    digest = main([], "toy", weights, results, decoder=decoder)
    assert (weights / "SHA256SUMS").read_text() == f"{digest}  toy.safetensors\n"
    tensors, metadata = read(weights / "toy.safetensors")
    assert "unetr.stem.weight" in tensors
    record = from_metadata(Weights(name="file"), metadata)
    assert (record.clicks, record.unetr) == ("all", UnetrDecoder(4, 8, (0, 1)))
    assert {path.name for path in (tmp_path / "results/toy_decoder").iterdir()} == {
        "runs.csv",
        "curves.csv",
        "figure.png",
    }


def test_a_decoder_of_another_encoder_is_refused(run, decoder, tmp_path):
    tensors, metadata = read(run / "last.safetensors")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    write(run / "last.safetensors", changed, metadata, overwrite=True)
    with pytest.raises(ValueError, match="another encoder"):
        main([run], "toy", tmp_path, tmp_path / "toy", decoder=decoder)


def test_a_run_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="let the pretraining get there"):
        main([tmp_path], "toy", tmp_path, tmp_path)


def test_a_calibration_is_fitted_to_the_clicks_of_the_weights(run, tmp_path):
    weights, study = tmp_path / "weights", tmp_path / "study"
    weights.mkdir()
    true = DiceCalibration(0.5, 1.5, 0.25)
    pairs = [(0.1 * tenths, step) for tenths in range(2, 9) for step in (1, 3, 10)]
    scores = pd.DataFrame(pairs, columns=["predicted_dice", "step"])
    scores["dice"] = [true.expected(*pair) for pair in pairs]
    scores = scores.assign(case="a", **{"class": "x"})
    tables.add(study, {"run": "newest"}, scores=scores.assign(dice=0.1))
    tables.add(study, {"run": "all"}, scores=scores)
    main([run], "toy", weights, tmp_path / "results")
    main([], "toy", weights, tmp_path / "results", calibration=study)
    _, metadata = read(weights / "toy.safetensors")
    found = from_metadata(Weights(name="file"), metadata).dice_calibration
    assert astuple(found) == pytest.approx(astuple(true), abs=1e-3)
