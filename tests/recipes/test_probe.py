"""The probe of frozen encoders: voxels, order, table."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from boxes import write_boxes
from sammed3d_backbone.recipes import finetune_unetr, probe
from sammed3d_backbone.recipes.probe import Config, gain_of, main, voxels_of
from sammed3d_backbone.recipes.studies import tables

from sammed3d_backbone import config, encoder
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.evaluation.probes import PROBES
from sammed3d_backbone.inference.segmenter import Segmenter, build_network
from sammed3d_backbone.loading.checkpoint import write
from sammed3d_backbone.training.finetuning import make_card


@pytest.fixture
def make_run(small, runs):
    """Writes the files of a run that the recipe reads, without training; returns the folder."""

    def make(**changes):
        cfg = finetune_unetr.Config(**small | changes)
        dataset, _ = finetune_unetr.choose_cases(cfg)
        card = make_card(cfg, dataset)
        folder = runs / cfg.name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config.dump(cfg))
        Segmenter(build_network(card), card).save(folder / "last.safetensors")
        return folder

    return make


@pytest.fixture
def cfg(make_run, tmp_path, monkeypatch):
    """A quick probe: few voxels of boxes, with pretrained weights."""
    monkeypatch.setattr(probe, "PROBES", {kind: PROBES[kind] for kind in ("knn", "prototype")})
    make_run()
    weights = tmp_path / "tiny.safetensors"
    write(weights, encoder("tiny", pretrained=False, img_size=16).state_dict(), {})
    return Config("toy", str(weights), per_class=10, out=str(tmp_path / "out"), threads=1)


@pytest.fixture
def probed(monkeypatch):
    """Names of the encoders in order; the fourth computation is stopped."""
    seen, real = [], probe.voxels_of

    def noted(*args, desc):
        if len(seen) == 3:
            seen.append("stopped")
            raise KeyboardInterrupt
        seen.append(desc)
        found = real(*args, desc=desc)
        return {block: found[block] for block in (0, 1)}

    monkeypatch.setattr(probe, "voxels_of", noted)
    return seen


@pytest.mark.slow
def test_a_stopped_probe_resumes_and_ends_with_table_and_figure(cfg, probed, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        main(cfg)
    assert [*tables.read(out, "runs")["run"]] == ["random"]
    main(cfg)
    main(replace(cfg, weights=None))
    rest = ("placed", "scratch", "pretrained")
    assert probed[4:] == [f"{name}, {side}" for name in rest for side in ("bank", "asked")]
    assert [*tables.read(out, "runs")["run"]] == ["random", *rest]
    blocks = tables.read(out, "blocks")
    assert (blocks["low"] <= blocks["mean"]).all()
    # Boxes differ in brightness, which any tokens tell.
    assert (blocks.query("block == 0 and probe == 'knn'")["mean"] > 0.6).all()
    accuracies, gains = (out / "table.md").read_text().split("Gain over the random")
    assert "| random | 1 |" in accuracies
    assert "| random | 1 |" not in gains
    assert "| pretrained | 1 |" in gains
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_other_weights_and_other_voxels_are_probed_again(cfg, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(probe, "voxels_of", lambda *_, desc: calls.append(desc) or {})
    monkeypatch.setattr(probe, "write_report", lambda *_: None)
    main(cfg)
    network = encoder("tiny", pretrained=False, img_size=16)
    write(tmp_path / "tiny.safetensors", network.state_dict(), {}, overwrite=True)
    main(cfg)
    assert calls[8:] == ["pretrained, bank", "pretrained, asked"]
    main(replace(cfg, per_class=11))
    assert len(calls) == 10 + 8


def test_gains_are_paired_by_subject():
    rows = pd.DataFrame({"subject": ["a", "b"], "accuracy": [0.4, 0.8], "run": "random"})
    rows = rows.assign(block=0, probe="knn")
    found = gain_of(rows.assign(run="scratch", accuracy=rows["accuracy"] + 0.1), rows)
    assert [*found["shown"]] == ["+10.0 (+10.0 to +10.0)"]


def test_every_encoder_is_asked_about_the_same_voxels(toy_data):
    dataset, cfg = read_dataset(toy_data), Config("toy", per_class=5)
    preparation = Preprocessing(
        (1.5, 1.5, 1.5), {"default": "zscore_positive"}, "volume", (16, 16, 16)
    )
    one, other = (
        voxels_of(
            encoder("tiny", pretrained=False, img_size=16).eval(),
            dataset.cases[:2],
            dataset,
            preparation,
            cfg,
            desc="",
        )
        for _ in range(2)
    )
    assert len(one) == 12
    assert np.array_equal(one[0].values, other[11].values)
    assert np.array_equal(one[0].values, np.tile(np.repeat([0, 1, 2], 5), 2))
    assert (
        one[0].subjects.tolist() == np.repeat([c.subject for c in dataset.cases[:2]], 15).tolist()
    )
    assert not np.array_equal(one[0].features, other[0].features)


def test_what_was_not_looked_for_does_not_pass_for_background(tmp_path):
    write_boxes(tmp_path, cases=2, partly=True)
    dataset = read_dataset(tmp_path)
    network = encoder("tiny", pretrained=False, img_size=16).eval()
    preparation = Preprocessing(None, {"default": "zscore_positive"}, "volume", (16, 16, 16))
    found = voxels_of(
        network, dataset.cases, dataset, preparation, Config("toy", per_class=5), desc=""
    )
    whole, partly = (found[0].values[found[0].subjects == c.subject] for c in dataset.cases)
    assert {*whole.tolist()} == {0, 1, 2}
    assert {*partly.tolist()} == {1}


def test_a_run_that_has_not_ended_is_refused(runs):
    with pytest.raises(FileNotFoundError, match="let the run end, or pass run=NAME"):
        main(Config("toy"))


def test_a_run_from_trained_weights_is_refused(make_run):
    make_run(scratch=False)
    with pytest.raises(ValueError, match="pass one with scratch=true"):
        main(Config("toy"))


def test_wrong_weights_are_refused_before_anything_is_probed(cfg, probed):
    with pytest.raises(ValueError, match="unknown weights 'nowhere'"):
        main(replace(cfg, weights="nowhere"))
    assert not probed
