"""A UNETR decoder on a frozen encoder: from sources to one file that holds both."""

from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file
from sammed3d_backbone.recipes import pretrain_decoder
from sammed3d_backbone.recipes.pretrain_decoder import Config, main

from sammed3d_backbone import encoder, sam, unetr
from sammed3d_backbone.loading.checkpoint import write
from sammed3d_backbone.loading.registry import Weights, to_metadata


@pytest.fixture
def small(small_pretraining, tmp_path):
    """A run of a few steps on the weights of a randomly initialised network."""
    torch.manual_seed(0)
    network = sam("nano", pretrained=False, img_size=16)
    record = Weights(name="nano", variant="nano", rel_pos="axial", clicks="all")
    write(tmp_path / "nano.safetensors", network.state_dict(), to_metadata(record))
    mine = {field.name for field in fields(Config)}
    return Config(
        **{key: value for key, value in small_pretraining.items() if key in mine},
        weights=str(tmp_path / "nano.safetensors"),
        feature_size=4,
        dense_classes=("front|Front", "back"),
        random_contrast=0.3,
        rendered=0.4,
    )


def test_a_run_leaves_one_file_for_encoder_clicks_and_decoder(small, runs):
    scores = main(small)
    assert {"mean_dice", "dice_scanned", "dice_rendered"} <= scores.keys()
    path = runs / "toy/last.safetensors"
    before, after = load_file(small.weights), load_file(path)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    network = unetr(encoder("nano", weights=path), 2, feature_size=4, weights=path)
    assert len(network.load_report.missing) == 2  # the last layer
    record = sam("nano", weights=path).pretrained_cfg
    assert (record.clicks, record.unetr.feature_size) == ("all", 4)
    assert record.unetr.classes == ("front|Front", "back")
    assert "Toy" in {entry.name for entry in record.pretraining}
    assert (runs / "toy/curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bits(small, runs, monkeypatch):
    main(small)
    whole = load_file(runs / "toy/last.safetensors")
    (runs / "toy").rename(runs / "whole")
    train = pretrain_decoder.engine.train
    calls = []

    def once(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        train(*given)

    monkeypatch.setattr(pretrain_decoder.engine, "train", once)
    with pytest.raises(KeyboardInterrupt):
        main(small)
    main(small)
    resumed = load_file(runs / "toy/last.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
