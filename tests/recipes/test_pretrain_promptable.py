"""Pretraining by clicks from sources to weights, on boxes and synthetic volumes."""

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file
from sammed3d_backbone.recipes import pretrain_decoder, pretrain_promptable
from sammed3d_backbone.recipes.pretrain_promptable import Config, choose_cases, main
from torch import nn

from sammed3d_backbone import config, encoder, sam
from sammed3d_backbone.clickbench.cases import read_click_set
from sammed3d_backbone.data.datasets import read_fold
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.training.runs import OPTIMIZER, Run

RECIPE = Path(pretrain_promptable.__file__)


@pytest.fixture
def small(small_pretraining):
    return Config(**small_pretraining)


def state(folder):
    """Everything that has to be equal after a kill."""
    checkpoint = Run(folder).checkpoints[-1]
    return {
        **load_file(checkpoint / "model.safetensors"),
        **{f"out.{k}": v for k, v in load_file(folder / "last.safetensors").items()},
    }


def first_moments(folder):
    """The running means of all gradients, by the names of the parameters."""
    stored = load_file(Run(folder).checkpoints[-1] / OPTIMIZER)
    return {name: value for name, value in stored.items() if name.endswith("/exp_avg")}


def log(folder):
    clocks = ("seconds", "cpu_seconds", "images_per_s", "memory_gib")
    return [{k: v for k, v in r.items() if k not in clocks} for r in Run(folder).records()]


def test_a_run_leaves_weights_that_load_and_say_what_they_are(small, runs):
    scores = main(small)
    assert {"mean_dice", "dice_1", "dice_3", "dice_5", "dice_1_Toy"} <= set(scores)
    path = runs / "toy/last.safetensors"
    network = sam("tiny", weights=path)
    record = network.pretrained_cfg
    assert (record.point_pos, record.rel_pos, record.preprocessing.crop_vox) == (
        "aligned",
        "axial",
        (16, 16, 16),
    )
    assert [entry.name for entry in record.pretraining] == ["synthetic", "Toy"]
    assert encoder("tiny", weights=path).img_size == (16, 16, 16)
    lines = [line for line in log(runs / "toy") if "loss" in line]
    assert len(lines) == 4
    assert all(0 <= line["soft_dice_first"] <= 1 for line in lines)


NEXT = {  # settings of the configuration of `tiny`
    "rel_pos": "axial",
    "objectives": ("clicks", "dense"),
    "dense_classes": ("front", "back"),
    "interactions": 3,
    "graded": 2,
    "without_point": 0.3,
    "clicks": "all",
    "optimizer": "muon",
    "decay_steps": 1,
    "random_contrast": 0.5,
}


@pytest.fixture
def other_precision():
    """Lets a run choose its precision, which accelerate fixes for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"objectives": ("clicks", "reconstruction", "contrast")}, NEXT]
)
def test_a_killed_run_ends_with_the_same_bits(small, runs, tmp_path, changes):
    small = replace(small, **changes)
    main(small)
    killed = replace(small, name="killed")
    path = tmp_path / "killed.yaml"
    path.write_text(config.dump(killed))
    run = subprocess.Popen(
        [sys.executable, str(RECIPE), str(path)],
        env=os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while run.poll() is None and not Run(runs / "killed").checkpoints:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    main(killed)
    whole, again = state(runs / "toy"), state(runs / "killed")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert log(runs / "toy") == log(runs / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [("clicks",), ("clicks", "reconstruction", "contrast")])
def test_two_processes_and_accumulation_train_as_one_process_does(
    small, runs, tmp_path, objectives
):
    # AdamW divides a gradient by its own size. A few elements of the decoder's queries and keys get
    # a first gradient of 3e-9, which is rounding (sums in another order differ by 5e-9, where the
    # tensor has 2e-5), and move by a share of the rate either way: by 1.03e-4 at the default of
    # 5e-4. The gradients agree, hence their moments are compared as well, which are linear in them.
    small = replace(
        small, variant="nano", steps=3, validate_every=3, objectives=objectives, lr=3e-4
    )
    main(replace(small, batch=2))
    main(replace(small, name="accumulated", accumulate=2))
    path = tmp_path / "two.yaml"
    path.write_text(config.dump(replace(small, name="two")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, RECIPE, path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole = log(runs / "toy")
    for other in ("two", "accumulated"):
        for ours, theirs in zip(log(runs / other), whole, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        again = load_file(runs / other / "last.safetensors")
        for name, value in load_file(runs / "toy/last.safetensors").items():
            torch.testing.assert_close(again[name], value, rtol=0, atol=1e-4)
        again = first_moments(runs / other)
        for name, value in first_moments(runs / "toy").items():
            torch.testing.assert_close(again[name], value, rtol=1e-4, atol=2e-7)


@pytest.mark.slow
def test_fine_tuning_starts_from_weights_and_keeps_their_form(small, runs):
    main(replace(small, steps=2))
    start = runs / "toy/last.safetensors"
    main(replace(small, name="tuned", steps=2, weights=str(start), img_size=None, clicks="all"))
    with safe_open(runs / "tuned/last.safetensors", "pt") as file:
        training = json.loads(file.metadata()["training"])
    assert training["initial_weights"] == "last.safetensors"
    assert len(training["cases"]["Toy"]) == 4
    assert (training["crops"], training["objects"], training["most_clicks"]) == (2, 4, 8)
    assert training["before"]["initial_weights"] == "random initialisation"
    record = sam("tiny", weights=runs / "tuned/last.safetensors").pretrained_cfg
    assert {entry.name: entry.stages for entry in record.pretraining} == {
        "synthetic": (1, 2),
        "Toy": (1, 2),
    }


@pytest.mark.slow
def test_a_later_stage_scores_no_case_that_an_earlier_one_trained_on(small, runs):
    small = replace(small, warmup_steps=0)
    main(replace(small, steps=1, exclude=("hippocampus",), seed=1))
    weights = str(runs / "toy/last.safetensors")
    with pytest.raises(ValueError, match="val_cases="):
        main(replace(small, name="later", weights=weights, img_size=None, val_cases=4))
    main(replace(small, name="later", weights=weights, img_size=None, steps=1, seed=1))
    record = sam("tiny", weights=runs / "later/last.safetensors").pretrained_cfg
    assert record.held_out == ("hippocampus",)


@pytest.mark.slow
def test_the_decoder_of_a_network_from_scratch_can_be_warmed_up_first(small, runs, capsys):
    main(replace(small, decoder_warmup_steps=2, steps=2))
    assert "warm-up of the decoder" in capsys.readouterr().out
    main(replace(small, decoder_warmup_steps=2, steps=2))
    assert "warm-up of the decoder" not in capsys.readouterr().out  # a resumed run has begun before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objectives", "figure"),
    [
        (("reconstruction",), "patch_error"),
        (("contrast",), "nearest_same"),
        (("clicks", "reconstruction"), "patch_error"),
        (("clicks", "contrast"), "nearest_same"),
    ],
)
def test_other_objectives_stand_instead_of_clicks_or_beside_them(small, runs, objectives, figure):
    scores = main(replace(small, objectives=objectives, steps=2))
    assert scores[figure] >= 0
    encoder("tiny", weights=runs / "toy/last.safetensors")
    with safe_open(runs / "toy/last.safetensors", "pt") as file:
        training = json.loads(file.metadata()["training"])
    clicks = 8 if "clicks" in objectives else 0
    assert (training["crops"], training["most_clicks"]) == (2, clicks)
    lines = [line for line in log(runs / "toy") if "loss" in line]
    assert all(figure in line for line in lines)
    assert all(("soft_dice_first" in line) == ("clicks" in objectives) for line in lines)


def test_excluded_sets_are_refused(small, toy_data):
    with pytest.raises(ValueError, match="leave it out of sources="):
        choose_cases(replace(small, exclude=("toy",)), str(toy_data))


def test_excluded_and_held_out_cases_are_on_no_side(small, toy_data):
    everything = choose_cases(small, str(toy_data))
    ids = [[entry.case.id for entry in side] for side in everything[1:]]
    assert [len(side) for side in ids] == [4, 2]
    without = choose_cases(replace(small, exclude=(ids[0][0],)), str(toy_data))
    assert ids[0][0] not in [entry.case.id for side in without[1:] for entry in side]
    held = choose_cases(replace(small, held_out_folds=(0,), val_cases=0), str(toy_data))
    assert len(held[1]) < 6
    assert not held[2]


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"objects": 0}, "objects=0; give 1 or more"),
        ({"graded": 4}, "graded=4"),
    ],
)
def test_impossible_knobs_are_refused(small, changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        replace(small, **changes)


@pytest.mark.slow
def test_the_configuration_for_a_gpu_runs_in_bfloat16_and_compiled(
    small, runs, monkeypatch, other_precision
):
    # The graph is traced and cut for the backward pass, but not turned into machine code.
    traced = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", traced)
    cfg = config.load(Config, RECIPE.parent / "configs/pretrain/tiny_gpu.yaml")
    assert cfg.compiled
    assert cfg.mixed_precision == "bf16"
    kept = ("name", "sources", "shares", "val_cases", "val_crops", "img_size", "threads", "cpu")
    changes = {key: getattr(small, key) for key in kept}
    cfg = replace(cfg, **changes, variant="nano", batch=2, steps=2, decay_steps=1, workers=0)
    cfg = replace(cfg, scored=(), smallest_vox=(100, 50), validate_every=2, log_every=1)
    scores = main(replace(cfg, warmup_steps=0, decoder_warmup_steps=0))
    assert 0 <= scores["dice_5"] <= 1
    sam("nano", weights=runs / "toy/last.safetensors", rel_pos="axial")


def voxels_sha256(path):
    """A hash of an image's stored voxels, whatever its header and compression."""
    return hashlib.sha256(np.asanyarray(nib.load(path).dataobj).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def kept_out(shared_data):
    """Hashes and subjects of all data that pretraining must not see."""
    entries = [
        entry
        for name in ("hippocampus", "abdomen_mr", "singles/voxelmorph_brain")
        for entry in read_click_set(shared_data / name).cases
    ]
    folder = shared_data / "headneck_ct"
    dataset = read_dataset(folder)
    ids = {name for fold in (0, 1) for name in read_fold(dataset, fold).val}
    entries += [entry for entry in read_click_set(folder).cases if entry.case.id in ids]
    hashes = {voxels_sha256(path) for entry in entries for path in entry.case.images}
    return hashes, {entry.case.subject for entry in entries}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny_gpu", "decoder"])
def test_what_is_to_be_transferred_to_is_in_no_pretraining(
    name, kept_out, shared_data, monkeypatch
):
    monkeypatch.setenv("SAMMED3D_DATA", str(shared_data))
    arguments = pretrain_decoder.Config if name == "decoder" else Config
    cfg = config.load(arguments, RECIPE.parent / f"configs/pretrain/{name}.yaml")
    hashes, subjects = kept_out
    seen = [
        entry
        for source in cfg.sources
        if source != "synthetic"
        for side in choose_cases(cfg, source)[1:]
        for entry in side
    ]
    assert len(seen) > 40
    assert not {entry.case.subject for entry in seen} & subjects
    assert not {voxels_sha256(path) for entry in seen for path in entry.case.images} & hashes
