"""The fine-tuning recipe from data set to figure, on boxes."""

import csv
import json
import math
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sammed3d_backbone.recipes import finetune_unetr
from sammed3d_backbone.recipes.finetune_unetr import Config, choose_cases, main, train
from sammed3d_backbone.recipes.studies.arms import ArmConfig, fine_tune

from sammed3d_backbone import config, encoder
from sammed3d_backbone.adapters.controls import ZeroedEncoder
from sammed3d_backbone.data.crops import CropStream
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.preparation import prepare_cases
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.segmenter import Segmenter
from sammed3d_backbone.loading.checkpoint import write
from sammed3d_backbone.loading.registry import WEIGHTS, Weights, to_metadata
from sammed3d_backbone.loading.variants import VARIANTS
from sammed3d_backbone.training import engine, finetuning
from sammed3d_backbone.training.augmentation import augmentation
from sammed3d_backbone.training.engine import Schedule
from sammed3d_backbone.training.finetuning import init_from_checkpoint, make_card
from sammed3d_backbone.training.runs import Run

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes/configs").glob("*.yaml"))


@pytest.fixture(scope="session", autouse=True)
def threads():
    """Restores the number of threads, which the recipe sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(cfg, card):
    """The network to train and its start."""
    build = cfg.build if isinstance(cfg, ArmConfig) else finetuning.build_model
    network, card = build(card, "Toy", scratch=cfg.scratch, weights=cfg.weights)
    return network, finetuning.record_start(card, network, SimpleNamespace(train=[], val=[]))


@pytest.fixture
def tiny_weights(tmp_path):
    """A file of weights of the tiny encoder."""
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
        "random initialisation",
        "data set",
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
    for part in ("feature_size: 4", "random initialisation", "parameters", "folds by subject"):
        assert part in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model": "basicunet", "crop_vox": 32, "feature_size": None},
        {"rel_pos": "axial"},
        {"model": "flexible_unet", "pyramid": "multi_level"},
        {"model": "segresnet", "checkpointing": True},
        {"model": "linear_head", "feature_size": None},
        {"model": "expanding_head"},
        {"model": "class_prompts", "feature_size": None},
    ],
    ids=["basicunet", "axial", "flexible_unet", "segresnet", "linear", "expanding", "prompts"],
)
def test_every_arm_of_the_comparison_is_the_same_script(small, runs, changes):
    assert fine_tune(ArmConfig(**small | {"steps": 2} | changes))["cases"] == 2
    assert (runs / "toy/last.safetensors").is_file()


def test_what_is_wrong_with_the_data_is_said_without_a_traceback(runs, monkeypatch, capsys):
    script = str(ROOT / "recipes/finetune_unetr.py")
    asked = [str(ROOT / "recipes/configs/hippocampus.yaml"), "data=/nowhere", "cpu=true"]
    asked.append("mixed_precision=no")  # as the runs of this process
    monkeypatch.setattr(sys, "argv", [script, *asked])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(script, run_name="__main__")
    assert "/nowhere" in capsys.readouterr().err
    assert not runs.exists()  # so that the name is still free


@pytest.mark.slow
def test_a_dry_run_tells_everything_and_writes_nothing(small, runs, tiny_weights, capsys):
    warm = {"scratch": False, "weights": tiny_weights, "freeze": 2}
    found = main(Config(**small | warm | {"accumulate": 2}), dry_run=True)
    assert not runs.exists()
    assert len(found["step_seconds"]) == 3
    said = capsys.readouterr().out
    for part in (
        "freeze: 2",
        "config digest: ",
        "Toy: 4 cases to train on",
        "matched: ",
        "data_overlap: ",
        "encoder.blocks.0.*",
        "GiB on cpu",
        "for 4 steps (measured",
        "of 6 cases in all",
    ):
        assert part in said


def test_a_dry_run_downloads_nothing_and_fills_no_cache(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetuning, "report", lambda *_: {})
    monkeypatch.setattr(finetuning, "needs_download", lambda _: True)
    cache = tmp_path / "cache"
    changes = {"scratch": False, "weights": "hf-hub:some/where", "cache": str(cache)}
    main(Config(**small | changes), dry_run=True)
    assert "hf-hub:some/where are not downloaded" in capsys.readouterr().out
    assert not cache.exists()


def test_a_dry_run_of_all_folds_measures_the_first(small, runs):
    found = train(Config(**small | {"fold": "all", "steps": 2}), dry_run=True)
    assert len(found["step_seconds"]) == 2
    assert not runs.exists()


@pytest.mark.parametrize(
    ("changes", "lr", "layer_decay"),
    [({}, 1e-3, 1.0), ({"lr": 2e-3}, 2e-3, 1.0), ({"scratch": False}, 3e-4, 0.75)],
    ids=["scratch", "given", "pretrained"],
)
def test_pretrained_weights_bring_layer_decay_and_a_smaller_rate(
    small, tiny_weights, monkeypatch, changes, lr, layer_decay
):
    monkeypatch.setattr(finetuning, "report", lambda *_: {})
    seen = {}
    whole = finetune_unetr.optim.layer_decayed

    def spy(model, **given):
        seen.update(given)
        return whole(model, **given)

    monkeypatch.setattr(finetune_unetr.optim, "layer_decayed", spy)
    monkeypatch.setattr(
        finetune_unetr.engine,
        "Schedule",
        lambda **given: seen.update(given) or Schedule(**given),
    )
    weights = {} if changes.get("scratch", True) else {"weights": tiny_weights}
    main(Config(**small | {"steps": 2} | changes | weights), dry_run=True)
    assert (seen["lr"], seen["layer_decay"]) == (lr, layer_decay)


def test_weights_beside_scratch_are_an_error(tiny_weights):
    with pytest.raises(ValueError, match="scratch"):
        Config(name="toy", data="nowhere", scratch=True, weights=tiny_weights)


def test_statistics_of_crops_and_of_volumes_train_differently(small, runs, monkeypatch):
    monkeypatch.setattr(finetuning, "report", lambda *_: {})
    losses = []
    for statistics in ("volume", "crop"):
        main(Config(**small | {"name": statistics, "statistics": statistics, "steps": 2}))
        losses.append([line["loss"] for line in Run(runs / statistics).records() if "lr" in line])
        card = Segmenter.from_pretrained(runs / statistics / "last.safetensors").card
        assert card.preprocessing.statistics == statistics
    assert losses[0] != losses[1]


def test_a_study_replaces_the_encoder_and_draws_subjects(small, runs, monkeypatch, capsys):
    monkeypatch.setattr(finetuning, "report", lambda *_: {})
    build = partial(finetuning.build_model, wrap=ZeroedEncoder)
    draw = ArmConfig(**small, num_subjects=1).draw
    main(Config(**small | {"steps": 2}), draw=draw, build=build)
    assert "1 cases to train on" in capsys.readouterr().out
    tensors = load_file(runs / "toy/last.safetensors")
    assert not any(name.startswith("encoder.") for name in tensors)


@pytest.mark.parametrize(
    ("freeze", "kept"),
    [({"freeze": "encoder"}, True), ({"freeze": 1}, False)],
    ids=["for good", "one step"],
)
def test_a_frozen_encoder_ends_as_it_began(small, runs, tiny_weights, monkeypatch, freeze, kept):
    monkeypatch.setattr(finetuning, "report", lambda *_: {})
    warm = {"scratch": False, "weights": tiny_weights, "steps": 3, "checkpointing": True}
    main(Config(**small | warm | freeze))
    stored, ended = load_file(tiny_weights), load_file(runs / "toy/last.safetensors")
    encoder_stays = [
        torch.equal(tensor, stored[name.removeprefix("encoder.")])
        for name, tensor in ended.items()
        if name.startswith("encoder.")
    ]
    assert all(encoder_stays) == kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {"channels": "shared"},
        {"patch_size": 4},
        {"peft": "lora", "peft_size": 2},
        {"peft": "bottleneck", "channels": "shared"},
    ],
    ids=["shared", "patch", "lora", "bottleneck-shared"],
)
def test_a_model_of_two_channels_is_plain_to_read(
    small, runs, two_channels, tiny_weights, monkeypatch, capsys, knobs
):
    monkeypatch.setattr(finetuning, "report", lambda *given: given[2])
    warm = {"scratch": False, "weights": tiny_weights, "data": str(two_channels), "steps": 2}
    trained = fine_tune(ArmConfig(**small | warm | knobs))
    image = Volume.load(two_channels / "imagesTr/case_0.nii.gz")
    read = Segmenter.from_pretrained(runs / "toy/last.safetensors")
    assert not any("lora" in name for name in read.model.state_dict())
    prepared, _ = read.card.preprocessing.image(image)
    torch.testing.assert_close(read.logits(prepared), trained.logits(prepared))
    parameters = read.card.training["start"]["parameters"]
    assert (parameters["trained"] < parameters["all"]) == ("peft" in knobs)
    assert "'trained': " in capsys.readouterr().out


def test_the_encoder_of_a_shared_model_serves_as_weights(small, two_channels, tmp_path):
    cfg = ArmConfig(**small | {"data": str(two_channels), "channels": "shared"})
    network, card = made(cfg, make_card(cfg, read_dataset(two_channels)))
    Segmenter(network, card).save(tmp_path / "shared.safetensors")
    taken = encoder("tiny", weights=tmp_path / "shared.safetensors")
    tensor = "blocks.3.attn.qkv.weight"
    assert torch.equal(taken.state_dict()[tensor], network.encoder.encoder.state_dict()[tensor])


def test_an_encoder_with_bottlenecks_cannot_be_weights(small, toy_data, tiny_weights, tmp_path):
    knobs = {"scratch": False, "weights": tiny_weights, "peft": "bottleneck"}
    cfg = ArmConfig(**small | knobs)
    network, card = made(cfg, make_card(cfg, read_dataset(toy_data)))
    Segmenter(network, card).save(tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="bottleneck"):
        encoder("tiny", weights=tmp_path / "narrow.safetensors")


def test_trained_values_arrive_in_the_network_and_are_reported(small, toy_data, tiny_weights):
    cfg = Config(**small | {"scratch": False, "weights": tiny_weights})
    model, card = made(cfg, make_card(cfg, read_dataset(toy_data)))
    start = card.training["start"]
    stored = load_file(tiny_weights)
    name = "blocks.3.attn.qkv.weight"
    assert torch.equal(model.encoder.state_dict()[name], stored[name])
    assert "matched: " in start["weights"]
    assert "weights from tiny.safetensors" in start["weights"]


@pytest.mark.parametrize("rel_pos", ["axial", "sammed3d"])
def test_a_model_is_rebuilt_with_the_positions_of_its_weights(small, toy_data, tmp_path, rel_pos):
    torch.manual_seed(0)
    tensors = encoder("tiny", pretrained=False, img_size=16, rel_pos=rel_pos).state_dict()
    tensors = {k: torch.randn_like(t) if "rel_pos" in k else t for k, t in tensors.items()}
    record = Weights(name="positions", variant="tiny", rel_pos=rel_pos)
    write(tmp_path / "weights.safetensors", tensors, to_metadata(record))
    path = str(tmp_path / "weights.safetensors")
    cfg = Config(**small | {"scratch": False, "weights": path})
    network, card = made(cfg, make_card(cfg, read_dataset(toy_data)))
    Segmenter(network.eval(), card).save(tmp_path / "model.safetensors")
    read = Segmenter.from_pretrained(tmp_path / "model.safetensors").model
    volume = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(read(volume), network(volume))


@pytest.fixture
def model_of_toys(small, toy_data, tmp_path):
    """A fine-tuned model of the toy data that was trained on case_0, and its card."""
    cfg = Config(**small)
    network, card = made(cfg, make_card(cfg, read_dataset(toy_data)))
    card = replace(card, training={**card.training, "cases": ["case_0"]})
    Segmenter(network, card).save(tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors"), card


def test_training_continues_from_a_fine_tuned_model(small, model_of_toys):
    path, card = model_of_toys
    model, _ = made(Config(**small), card)
    origin, cases = init_from_checkpoint(model, card, path, ["case_1"])
    stored = load_file(path)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert origin["weights"] == "all values of the fine-tuned model.safetensors"
    assert origin["data_overlap"] == card.training["start"]["data_overlap"]
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
    cfg = Config(**small | {"scratch": False, "weights": tiny_weights, "cache": "ward/kept"})
    _, card = made(cfg, make_card(cfg, read_dataset(toy_data)))
    assert card.training["config"]["data"] == toy_data.name
    assert card.training["config"]["cache"] == "kept"  # not there yet, so only the key says path
    assert "tiny.safetensors" in json.dumps(card.to_dict())
    for folder in (toy_data.parent, Path(tiny_weights).parent):
        assert str(folder) not in json.dumps(card.to_dict())


@pytest.mark.parametrize(
    ("knobs", "labels", "val", "remedy"),
    [
        ({}, {1: "front"}, [], "labels"),
        ({}, {}, ["case_0"], "case_0"),
        ({"feature_size": 8}, {}, [], "feature_size"),
    ],
    ids=["classes", "cases", "sizes"],
)
def test_a_model_that_cannot_be_trained_on_is_refused(
    small, toy_data, model_of_toys, knobs, labels, val, remedy
):
    cfg = Config(**small | knobs)
    card = make_card(cfg, read_dataset(toy_data))
    model, _ = made(cfg, card)
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
    stream = CropStream(
        cases,
        make_card(cfg, dataset).preprocessing,
        samples=40,
        seed=0,
        augment=augmentation(cfg.flip_axes),
    )
    for i in range(40):
        label = stream[i]["label"][0]
        centre = [torch.nonzero(label == value).float()[:, 1].mean() for value in (1, 2)]
        if not any(c.isnan() for c in centre):
            assert centre[0] > centre[1]


def test_flips_do_happen():
    ramp = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 4, 4)
    flips = augmentation((0,)).transforms[0]
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


def test_few_subjects_are_whole_subjects(small, toy_data, tmp_path, monkeypatch, capsys):
    subjects = tmp_path / "subjects.json"
    subjects.write_text(json.dumps({f"case_{i}": f"person_{i // 2}" for i in range(6)}))
    splits = {"folds": [{"train": [f"case_{i}" for i in range(4)], "val": ["case_4", "case_5"]}]}
    for part in ("imagesTr", "labelsTr", "dataset.json"):
        (tmp_path / part).symlink_to(toy_data / part)
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    monkeypatch.setattr(finetuning, "report", lambda *_: {})
    few = small | {"data": str(tmp_path), "subjects": str(subjects), "num_subjects": 1}
    fine_tune(ArmConfig(**few))
    assert "Toy: 2 cases to train on, 2 to validate on" in capsys.readouterr().out


def test_a_draw_leaves_the_tested_subjects_and_the_others_apart(small, toy_data):
    dataset = read_dataset(toy_data)
    everything = {case.id for case in dataset.cases}
    tested = set()
    for seed in range(4):
        arm = ArmConfig(**small, test_subjects=3, num_subjects=1, seed=seed)
        fold = choose_cases(arm, arm.draw)[1]
        others = choose_cases(arm, replace(arm, part="others").draw)[1]
        inside = choose_cases(arm, replace(arm, part="inside").draw)[1]
        assert (len(fold.train), len(fold.val), len(others.train)) == (1, 3, 2)
        assert {*fold.train, *fold.val, *others.train} == everything
        assert (inside.train, inside.val) == (fold.train, others.train)
        tested.add(fold.val)
    assert len(tested) == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_read_and_its_sizes_fit_its_network(path):
    cfg = config.load(Config, path)
    assert (cfg.crop_vox or 64) % VARIANTS[cfg.variant].patch_size == 0
    assert cfg.warmup_steps < cfg.steps


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"batch": 0}, "batch"),
        ({"validate_every": 0}, "validate_every"),
        ({"foreground_weight": -1.0}, "foreground_weight"),
        ({"lr": math.nan}, "lr"),
        ({"lr": 0.0}, "lr"),
        ({"overlap": 1.0}, "overlap"),
        ({"accumulate": 0}, "accumulate"),
        ({"freeze": -1}, "freeze"),
        ({"freeze": "decoder"}, "freeze"),
        ({"freeze": 9, "steps": 9}, "freeze"),
        ({"model": "basicunet", "freeze": "encoder"}, "basicunet"),
        ({"model": "basicunet", "checkpointing": True}, "basicunet"),
        ({"model": "basicunet", "weights": "tiny"}, "basicunet"),
        ({"model": "basicunet", "channels": "shared"}, "basicunet"),
        ({"model": "basicunet", "peft": "lora"}, "basicunet"),
        ({"peft": "lora", "peft_size": 0}, "peft_size"),
        ({"peft": "lora", "freeze": "encoder"}, "freeze"),
        ({"peft": "bottleneck", "scratch": True}, "scratch"),
        ({"peft": "lora", "init": "MODEL"}, "init"),
        ({"flip_axes": (3,)}, "flip_axes"),
        ({"flip_axes": (0, 0)}, "flip_axes"),
        ({"part": "others"}, "num_subjects"),
    ],
    ids=str,
)
def test_knobs_out_of_range_are_refused_before_anything_is_read(knobs, named):
    with pytest.raises(ValueError, match=named) as refused:
        config.build(ArmConfig, {"name": "toy", "data": "nowhere", **knobs})
    assert "\n" not in str(refused.value)


def test_the_preprocessing_is_the_weights_unless_overridden(small, toy_data, capsys):
    dataset = read_dataset(toy_data)
    free = {"spacing_mm": None, "crop_vox": None, "statistics": None, "intensity": None}
    card = make_card(Config(**small | free), dataset)
    assert card.preprocessing.statistics == WEIGHTS["tiny"].preprocessing.statistics
    assert card.preprocessing.crop_vox == WEIGHTS["tiny"].preprocessing.crop_vox
    assert card.preprocessing.spacing_mm == WEIGHTS["tiny"].preprocessing.spacing_mm
    assert "instead of" not in capsys.readouterr().out
    card = make_card(Config(**small | free | {"spacing_mm": (0, 0, 0), "intensity": "mr"}), dataset)
    assert card.preprocessing.spacing_mm is None
    assert card.preprocessing.intensity == {"default": "mr"}
    assert capsys.readouterr().out.count("instead of") == 2
    ct = replace(dataset, channels=("CT",))
    assert make_card(Config(**small | free), ct).preprocessing.intensity == {"default": "ct"}


@pytest.mark.slow
def test_all_folds_score_every_case_once_and_leave_an_ensemble(small, runs):
    cfg = Config(**{**small, "fold": "all", "steps": 2})
    summary = train(cfg)
    assert summary["cases"] == 6
    members = sorted(path.name for path in (runs / "toy/ensemble").iterdir())
    assert members == [f"fold_{n}.safetensors" for n in range(3)]
    assert len(Segmenter.from_pretrained(runs / "toy/ensemble").files) == 3
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("last.safetensors")}
    assert train(cfg) == summary  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("last.safetensors")} == before


@pytest.mark.slow
def test_compiled_training_resumes_to_the_numbers_of_plain_training(small, runs, monkeypatch):
    """Tensors in another memory format go through checkpoints, averages and files."""

    def losses(name):
        lines = (runs / name / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    main(Config(**small))
    compiled = Config(**{**small, "name": "compiled", "compiled": True})

    def stop(meter, state):
        if meter.progress.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.Meter, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            main(compiled)
    main(compiled)
    assert losses("compiled") == pytest.approx(losses("toy")[2:], rel=1e-3)
    plain, made = (load_file(runs / name / "last.safetensors") for name in ("toy", "compiled"))
    assert all(torch.allclose(made[name], value, atol=1e-3) for name, value in plain.items())
