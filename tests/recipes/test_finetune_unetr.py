"""The fine-tuning recipe from data set to figure, on boxes."""

import csv
import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sammed3d_backbone.recipes import finetune_unetr
from sammed3d_backbone.recipes.finetune_unetr import (
    Config,
    augmentation,
    main,
    make_card,
    make_model,
)

from sammed3d_backbone import config, encoder
from sammed3d_backbone.data.crops import CropStream
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.preparation import prepare_cases
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.segmenter import (
    Segmenter,
    init_from_checkpoint,
)
from sammed3d_backbone.loading.checkpoint import write
from sammed3d_backbone.loading.variants import VARIANTS
from sammed3d_backbone.training import engine
from sammed3d_backbone.training.runs import Run

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes/configs").glob("*.yaml"))


@pytest.fixture(scope="session", autouse=True)
def threads():
    """The recipe sets the number of threads; what other tests see is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_weights(tmp_path):
    """A file of trained values, so to speak."""
    torch.manual_seed(3)
    tensors = encoder("tiny", pretrained=False, img_size=16).state_dict()
    write(tmp_path / "tiny.safetensors", tensors, {})
    return str(tmp_path / "tiny.safetensors")


def test_a_run_leaves_scores_predictions_networks_and_a_figure(small, runs, toy_data, capsys):
    summary = main(Config(**small))
    run = runs / "toy"
    assert set(summary["dice"]) == {"front", "back"}
    written = json.loads((run / "results/scores.json").read_text())
    assert written["mean_dice"] == summary["mean_dice"]
    assert written["steps"] == 4
    assert written["config"]["name"] == "toy"
    with (run / "results/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    cases = sorted({row["case"] for row in rows})
    assert [(row["case"], row["class"]) for row in rows] == [
        (case, name) for case in cases for name in ("front", "back")
    ]
    assert (run / "results/figure.png").read_bytes().startswith(b"\x89PNG")
    report = (run / "results/report.html").read_text()
    for part in (
        "random weights, as asked",
        "no dataset was seen",
        "training loss",
        "made of boxes",
    ):
        assert part in report
    start = Segmenter.from_pretrained(run / "last.safetensors").card.training["start"]
    assert start["parameters"]["all"] > start["parameters"]["encoder"] > 0
    for case in cases:
        image = Volume.load(toy_data / f"imagesTr/{case}.nii.gz")
        predicted = Volume.load(run / f"results/predictions/{case}.nii.gz")
        assert np.array_equal(predicted.affine, image.affine)
        again = Segmenter.from_pretrained(run / "last.safetensors").predict(image)
        assert np.array_equal(again.array, predicted.array)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "mean_dice" in line] == [2, 4]
    said = capsys.readouterr().out
    for part in ("feature_size: 4", "random weights, as asked", "parameters", "dealt by subject"):
        assert part in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model": "basicunet", "img_size": 32},
        {"control": "zero_encoder"},
        {"rel_pos": "axial"},
        {"model": "flexible_unet", "pyramid": "multi_level"},
        {"model": "segresnet", "checkpointing": True},
        {"model": "linear_head", "control": "zero_encoder"},
        {"model": "expanding_head"},
    ],
    ids=["basicunet", "zero_encoder", "axial", "flexible_unet", "segresnet", "linear", "expanding"],
)
def test_every_arm_of_the_comparison_is_the_same_script(small, runs, changes):
    assert main(Config(**small | {"steps": 2} | changes))["cases"] == 2
    assert (runs / "toy/last.safetensors").is_file() == ("control" not in changes)


def test_what_is_wrong_with_the_data_is_said_without_a_traceback(runs, monkeypatch):
    script = str(ROOT / "recipes/finetune_unetr.py")
    asked = [str(ROOT / "recipes/configs/hippocampus.yaml"), "data=/nowhere", "cpu=true"]
    asked.append("mixed_precision=no")  # as the runs of this process
    monkeypatch.setattr(sys, "argv", [script, *asked])
    with pytest.raises(SystemExit, match=r"^error: .*/nowhere"):
        runpy.run_path(script, run_name="__main__")
    assert not runs.exists()  # so that the name is still free


@pytest.mark.slow
def test_a_dry_run_tells_everything_and_writes_nothing(small, runs, tiny_weights, capsys):
    warm = {"scratch": False, "weights": tiny_weights, "freeze": "decoder_first"}
    found = main(Config(**small | warm | {"freeze_steps": 2, "accumulate": 2}), dry_run=True)
    assert not runs.exists()
    assert len(found["step_seconds"]) == 3
    said = capsys.readouterr().out
    for part in (
        "freeze: decoder_first",
        "hash of what counts: ",
        "Toy: 4 cases to train on",
        "matched: ",
        "it cannot be said whether Toy was among them",
        "encoder.blocks.0.*",
        "GiB on cpu",
        "for 4 steps, validation left out",
    ):
        assert part in said


def test_weights_bring_layer_decay_and_scratch_its_own_rate(small, tiny_weights, monkeypatch):
    seen = {}

    class Stop(Exception):
        pass

    def spy(model, lr, *, layer_decay, weight_decay):
        seen.update(lr=lr, layer_decay=layer_decay, weight_decay=weight_decay)
        raise Stop

    monkeypatch.setattr(finetune_unetr.optim, "layer_decayed", spy)
    with pytest.raises(Stop):
        main(Config(**small))
    assert (seen["lr"], seen["layer_decay"]) == (1e-3, 1.0)
    with pytest.raises(Stop):
        main(Config(**small | {"scratch": False, "weights": tiny_weights, "name": "warm"}))
    assert (seen["lr"], seen["layer_decay"]) == (3e-4, 0.75)


@pytest.mark.parametrize(
    ("freeze", "kept"),
    [({"freeze": "encoder"}, True), ({"freeze": "decoder_first", "freeze_steps": 1}, False)],
    ids=["encoder", "decoder_first"],
)
def test_a_frozen_encoder_ends_as_it_began(small, runs, tiny_weights, monkeypatch, freeze, kept):
    monkeypatch.setattr(finetune_unetr, "evaluate", lambda *_: {})
    warm = {"scratch": False, "weights": tiny_weights, "steps": 2, "checkpointing": True}
    main(Config(**small | warm | freeze))
    stored, ended = load_file(tiny_weights), load_file(runs / "toy/last.safetensors")
    encoder_stays = [
        torch.equal(tensor, stored[name.removeprefix("encoder.")])
        for name, tensor in ended.items()
        if name.startswith("encoder.")
    ]
    assert all(encoder_stays) == kept


@pytest.mark.slow
def test_a_run_goes_on_with_channels_last_in_memory_and_differs_by_rounding(
    small, runs, monkeypatch
):
    monkeypatch.setattr(finetune_unetr, "evaluate", lambda *_: {})
    main(Config(**small))
    save, network = Run.save, []

    def stop(run, *args):
        save(run, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            main(Config(**small | {"name": "last"}))
    monkeypatch.setattr(
        finetune_unetr.Segmenter, "save", lambda segmenter, _: network.append(segmenter.model)
    )
    main(Config(**small | {"name": "last", "channels_last": True}))
    kernels = [p for p in network[-1].parameters() if p.dim() == 5 and p.shape[1] > 1]
    assert any(p.is_contiguous(memory_format=torch.channels_last_3d) for p in kernels)
    losses = [
        [line["loss"] for line in Run(runs / name).records() if "loss" in line]
        for name in ("toy", "last")
    ]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {"channel_gains": (1.0, 0.0)},
        {"channels": "shared"},
        {"patch_size": 4},
        {"peft": "lora", "peft_size": 2},
        {"peft": "bottleneck", "channels": "shared"},
    ],
    ids=["gains", "shared", "patch", "lora", "bottleneck-shared"],
)
def test_a_model_of_two_channels_is_plain_to_read(
    small, runs, two_channels, tiny_weights, monkeypatch, capsys, knobs
):
    monkeypatch.setattr(finetune_unetr, "evaluate", lambda *given: given[3])
    warm = {"scratch": False, "weights": tiny_weights, "data": str(two_channels), "steps": 2}
    trained = main(Config(**small | warm | knobs))
    image = Volume.load(two_channels / "imagesTr/case_0.nii.gz")
    read = Segmenter.from_pretrained(runs / "toy/last.safetensors")
    assert not any("lora" in name for name in read.model.state_dict())
    prepared, _ = read.card.preprocessing.image(image)
    torch.testing.assert_close(read.logits(prepared), trained.logits(prepared))
    parameters = read.card.training["start"]["parameters"]
    assert (parameters["trained"] < parameters["all"]) == ("peft" in knobs)
    assert "'trained': " in capsys.readouterr().out


def test_the_encoder_of_a_shared_model_serves_as_weights(small, two_channels, tmp_path):
    cfg = Config(**small | {"data": str(two_channels), "channels": "shared"})
    card = make_card(cfg, read_dataset(two_channels))
    network, _ = make_model(cfg, card, "Toy")
    Segmenter(network, card).save(tmp_path / "shared.safetensors")
    taken = encoder("tiny", weights=tmp_path / "shared.safetensors")
    tensor = "blocks.3.attn.qkv.weight"
    assert torch.equal(taken.state_dict()[tensor], network.encoder.encoder.state_dict()[tensor])


def test_an_encoder_with_bottlenecks_is_no_weights(small, toy_data, tiny_weights, tmp_path):
    knobs = {"scratch": False, "weights": tiny_weights, "peft": "bottleneck"}
    cfg = Config(**small | knobs)
    card = make_card(cfg, read_dataset(toy_data))
    network, _ = make_model(cfg, card, "Toy")
    Segmenter(network, card).save(tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="pass the weights that it began with"):
        encoder("tiny", weights=tmp_path / "narrow.safetensors")


def test_trained_values_arrive_in_the_network_and_are_reported(small, toy_data, tiny_weights):
    cfg = Config(**small | {"scratch": False, "weights": tiny_weights})
    model, start = make_model(cfg, make_card(cfg, read_dataset(toy_data)), "Toy")
    stored = load_file(tiny_weights)
    name = "blocks.3.attn.qkv.weight"
    assert torch.equal(model.encoder.state_dict()[name], stored[name])
    assert "matched: " in start["weights"]
    assert "weights from tiny.safetensors" in start["weights"]


def test_scratch_ignores_the_weights(small, toy_data, tiny_weights):
    cfg = Config(**small | {"weights": tiny_weights})
    model, start = make_model(cfg, make_card(cfg, read_dataset(toy_data)), "Toy")
    stored = load_file(tiny_weights)["blocks.3.attn.qkv.weight"]
    assert not torch.equal(model.encoder.blocks[3].attn.qkv.weight, stored)
    assert "random weights" in start["weights"]


def test_the_control_loads_nothing_and_says_so(small, toy_data, tiny_weights):
    zeros = {"scratch": False, "weights": tiny_weights, "control": "zero_encoder"}
    cfg = Config(**small | zeros)
    _, start = make_model(cfg, make_card(cfg, read_dataset(toy_data)), "Toy")
    assert "random weights" in start["weights"]
    assert start["contamination"] == "random start: no dataset was seen in pretraining"


@pytest.fixture
def model_of_toys(small, toy_data, tmp_path):
    """A fine-tuned model of the toy data that was trained on case_0, and its card."""
    cfg = Config(**small)
    card = make_card(cfg, read_dataset(toy_data))
    network, start = make_model(cfg, card, "Toy")
    card = replace(card, training={**card.training, "start": start, "cases": ["case_0"]})
    Segmenter(network, card).save(tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors"), card


def test_training_goes_on_from_a_fine_tuned_model(small, model_of_toys):
    path, card = model_of_toys
    model, _ = make_model(Config(**small), card, "Toy")
    told, cases = init_from_checkpoint(model, card, path, ["case_1"])
    stored = load_file(path)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert told["weights"] == "all values of the fine-tuned model.safetensors"
    assert told["contamination"] == card.training["start"]["contamination"]
    assert cases == ("case_0",)


@pytest.mark.slow
def test_what_an_earlier_model_was_trained_on_stays_known(small, model_of_toys, runs):
    path, card = model_of_toys
    earlier = Segmenter.from_pretrained(path)
    names = {**card.training, "cases": ["of_another_hospital"]}
    Segmenter(earlier.model, replace(card, training=names)).save(Path(path))
    main(Config(**small | {"init": path}))
    training = Segmenter.from_pretrained(runs / "toy/last.safetensors").card.training
    assert "of_another_hospital" in training["cases"]
    assert len(training["cases"]) == 5
    assert training["start"]["weights"] == "all values of the fine-tuned model.safetensors"


def test_a_card_names_files_but_not_the_folders_they_lie_in(small, toy_data, tiny_weights):
    cfg = Config(**small | {"scratch": False, "weights": tiny_weights})
    card = make_card(cfg, read_dataset(toy_data))
    _, start = make_model(cfg, card, "Toy")
    card = replace(card, training={**card.training, "start": start})
    assert card.training["config"]["data"] == toy_data.name
    assert "tiny.safetensors" in json.dumps(card.to_dict())
    for folder in (toy_data.parent, Path(tiny_weights).parent):
        assert str(folder) not in json.dumps(card.to_dict())


@pytest.mark.parametrize(
    ("knobs", "labels", "val", "remedy"),
    [
        ({}, {1: "front"}, [], "pass it as weights= to take its encoder only"),
        ({}, {}, ["case_0"], "trained on 1 of the cases to validate on, case_0 for one"),
        ({"feature_size": 8}, {}, [], "give the variant=, img_size= and feature_size="),
    ],
    ids=["classes", "cases", "sizes"],
)
def test_a_model_that_cannot_be_trained_on_is_refused(
    small, toy_data, model_of_toys, knobs, labels, val, remedy
):
    cfg = Config(**small | knobs)
    card = make_card(cfg, read_dataset(toy_data))
    model, _ = make_model(cfg, card, "Toy")
    card = replace(card, labels={0: "background", **labels} if labels else card.labels)
    with pytest.raises(ValueError, match=remedy):
        init_from_checkpoint(model, card, model_of_toys[0], val)


def test_flips_happen_on_the_allowed_axes_only(small, toy_data):
    """The front stays in front: a flip along Y would turn one class into the other."""
    cfg = Config(**small | {"flip_axes": (0, 2)})
    dataset = read_dataset(toy_data)
    cases = prepare_cases(
        dataset, ["case_0", "case_1"], make_card(cfg, dataset).preprocessing, progress=False
    )
    stream = CropStream(cases, 16, samples=40, seed=0, augment=augmentation(cfg))
    for i in range(40):
        label = stream[i]["label"][0]
        centre = [torch.nonzero(label == value).float()[:, 1].mean() for value in (1, 2)]
        if not any(c.isnan() for c in centre):
            assert centre[0] > centre[1]


def test_flips_do_happen(small):
    ramp = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 4, 4)
    flips = augmentation(Config(**small | {"flip_axes": (0,)})).transforms[0]
    flipped = 0
    for seed in range(40):
        flips.set_random_state(seed)
        out = flips({"image": ramp.clone(), "label": ramp.clone()})["image"]
        flipped += bool(out[0, 0, 0, 0] == 3)
    assert 10 < flipped < 30


@pytest.mark.slow
def test_a_class_that_was_not_looked_for_gets_no_score(small, toy_data, tmp_path):
    info = json.loads((toy_data / "dataset.json").read_text())
    for entry in info["training"]:
        entry["annotated"] = ["front"]
        entry["image"] = str(toy_data / entry["image"])
        entry["label"] = str(toy_data / entry["label"])
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    summary = main(Config(**small | {"data": str(tmp_path)}))
    assert summary["dice"]["back"] is None
    assert summary["mean_dice"] == summary["dice"]["front"]


def test_few_labels_are_those_of_whole_subjects(small, toy_data, tmp_path, monkeypatch, capsys):
    subjects = tmp_path / "subjects.json"
    subjects.write_text(json.dumps({f"case_{i}": f"person_{i // 2}" for i in range(6)}))
    splits = {"folds": [{"train": [f"case_{i}" for i in range(4)], "val": ["case_4", "case_5"]}]}
    for part in ("imagesTr", "labelsTr", "dataset.json"):
        (tmp_path / part).symlink_to(toy_data / part)
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    monkeypatch.setattr(finetune_unetr, "evaluate", lambda *_: {})
    main(Config(**small | {"data": str(tmp_path), "subjects": str(subjects), "labels": 1}))
    assert "Toy: 2 cases to train on, 2 to validate on" in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_read_and_its_sizes_fit_its_network(path):
    cfg = config.load(Config, path)
    assert cfg.img_size % VARIANTS[cfg.variant].patch_size == 0
    assert engine.Schedule(
        cfg.steps, cfg.validate_every, cfg.lr, cfg.warmup_steps, cfg.clip, 1, 1, 1
    ).next_stop(0)
    assert cfg.warmup_steps < cfg.steps


@pytest.mark.parametrize(
    ("knob", "remedy"),
    [
        ({"batch": 0}, "batch=0; give 1 or more"),
        ({"validate_every": 0}, "validate_every=0; give 1 or more"),
        ({"scratch_lr": 0.0}, r"scratch_lr=0\.0; give a number above 0"),
        ({"foreground_weight": -1.0}, r"foreground_weight=-1\.0; give a number above 0"),
        ({"lr": math.nan}, "lr=nan; give a number above 0"),
        ({"overlap": 1.0}, "give 0 or more, and less than 1"),
        ({"accumulate": 0}, "accumulate=0; give 1 or more"),
        ({"freeze": "decoder_first"}, "give decoder_first 1 or more freeze_steps"),
        ({"freeze": "decoder_first", "freeze_steps": 9, "steps": 9}, "fewer than steps"),
        ({"freeze_steps": 9}, "and others none"),
        ({"model": "basicunet", "freeze": "encoder"}, "take model=unetr"),
        ({"model": "basicunet", "checkpointing": True}, "take model=unetr"),
        ({"model": "basicunet", "channels": "shared"}, "leave out .* channels="),
        ({"peft": "lora", "peft_size": 0}, "give a peft_size of 1 or more"),
        ({"peft": "lora", "freeze": "encoder"}, "leave out freeze="),
        ({"peft": "bottleneck", "scratch": True}, "leave out freeze=, scratch="),
        ({"peft": "lora", "init": "MODEL"}, "pass init= as weights="),
        ({"flip_axes": (3,)}, r"give axes among \[0, 1, 2\]"),
    ],
    ids=str,
)
def test_knobs_out_of_range_are_refused_before_anything_is_read(knob, remedy):
    with pytest.raises(ValueError, match=remedy):
        Config(name="toy", data="nowhere", **knob)
