"""Inputs of public bug reports."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sammed3d_backbone import Predictor, config, encoder, sam
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.volume import Volume

from .tools import (
    SHAPE,
    ball,
    image,
    label,
    nifti,
    nnunet,
    patched,
    score,
    segment,
    tune,
)

pytestmark = pytest.mark.slow
TURNED = np.diag([-1.0, -1, 1, 1])  # axes towards L, P, S
TURNED[:2, 3] = SHAPE[0] - 1, SHAPE[1] - 1


@pytest.fixture
def scan():
    """A predictor with a ball."""
    predictor = Predictor(sam("tiny"))
    predictor.set_volume(ball())
    return predictor


def test_01_a_quaternion_longer_than_1_by_rounding():
    for path, code in (("qform.nii", 0), ("sform.nii", 2)):
        opened = nib.load(ball("good.nii"), mmap=False)
        opened.set_qform(opened.affine, 1)
        opened.set_sform(opened.affine, code)
        nib.save(opened, path)
        patched(path, 256, "<3f", 0.6, 0.8, 0.001)
        assert segment(path, f"{path}.out.nii.gz", "--point", "20,20,20")[0] == 0


def test_02_vox_offset_0():
    good = ball("good.nii")
    Path("zero.nii").write_bytes(good.read_bytes())
    patched("zero.nii", 108, "<f", 0.0)
    assert np.array_equal(Volume.load("zero.nii").array, Volume.load(good).array)


def test_04_spacing_in_metres():
    folder = nnunet("data", affine=np.diag([0.001, 0.001, 0.001, 1]))
    code, said = tune(folder)
    assert (code, "case_0" in said, "spacing" in said) == (2, True, True)
    assert not Path("runs/toy").exists()


def test_06_volumes_of_one_slice():
    code, _ = tune(nnunet("data", shape=(12, 10, 1)))
    assert code == 0
    assert {"figure.png", "report.html"} <= {p.name for p in Path("runs/toy/results").iterdir()}


def test_07_labels_stored_in_another_order_of_voxels(monkeypatch):
    folder = nnunet("data")
    for i in range(6):
        nifti(folder / f"labelsTr/case_{i}.nii.gz", label()[::-1, ::-1].copy(), TURNED)
    code, said = tune(folder, "--dry-run")
    assert (code, "RAS" in said, "LPS" in said) == (2, True, True)
    assert "correct one affine" not in said


def test_08_labels_that_itk_has_made_orthonormal():
    sheared, shape = np.eye(4), (64, 64, 40)
    sheared[:3, :3] = [[0.9996, -0.0023, 0.0297], [0, 0.9971, -0.0766], [-0.0298, 0.0765, 0.9966]]
    u, _, v = np.linalg.svd(sheared[:3, :3])
    rigid = np.eye(4)
    rigid[:3, :3] = u @ v
    folder = nnunet("data", shape=shape, affine=sheared)
    for i in range(6):
        nifti(folder / f"labelsTr/case_{i}.nii.gz", label(shape), rigid)
    assert tune(folder, "--dry-run", "grid_tolerance=0.5")[0] == 0
    code, said = tune(folder, "--dry-run", "grid_tolerance=0.01")
    assert (code, "of a voxel" in said) == (2, True)


@pytest.mark.parametrize(
    "labels",
    [
        '{"background": 0, "head": 1, "tail": 2, "neck": 2}',
        '{"0": "background", "1": "head", "2": "tail", "2": "neck"}',
    ],
)
def test_10_two_names_with_one_value(labels):
    folder = nnunet("data")
    (folder / "dataset.json").write_text(f'{{"channel_names": {{"0": "MR"}}, "labels": {labels}}}')
    with pytest.raises(ValueError, match="2"):
        read_dataset(folder)


def test_12_an_ending_that_is_not_that_of_the_files(monkeypatch):
    for name, given in (("a", {"ending": ".nii"}), ("b", {"file_ending": ".nii"})):
        with pytest.raises(ValueError, match=r"\.nii"):
            read_dataset(nnunet(name, **given))
    folder = nnunet("e")
    for i in range(6):
        nifti(f"pred/case_{i}.nii", label())
    assert score(monkeypatch, "pred", folder.absolute(), "--out", "ev")[0] is None


def test_13_a_channel_that_is_not_named():
    code, said = tune(nnunet("data", channels=2, channel_names={"0": "T1"}), "--dry-run")
    assert (code, "_0001" in said) == (2, True)


def test_15_monais_list_with_a_file_per_channel():
    for i in range(6):
        for modality in ("t1", "flair"):
            nifti(f"data/P{i}/P{i}_{modality}.nii.gz", image(i))
        nifti(f"data/P{i}/P{i}_seg.nii.gz", label())
    training = [
        {
            "fold": i % 2,
            "image": [f"P{i}/P{i}_t1.nii.gz", f"P{i}/P{i}_flair.nii.gz"],
            "label": f"P{i}/P{i}_seg.nii.gz",
        }
        for i in range(6)
    ]
    info = {
        "modality": {"0": "t1", "1": "flair"},
        "labels": {"0": "background", "1": "head", "2": "tail"},
        "training": training,
    }
    Path("data/dataset.json").write_text(json.dumps(info))
    assert tune("data", "--dry-run")[0] == 0


def test_21_healthy_controls():
    folder = nnunet("data", labels={"background": 0, "lesion": 1})
    for i in range(6):
        array = np.minimum(label(), 1) * np.uint8(i > 1)
        nifti(folder / f"labelsTr/case_{i}.nii.gz", array)
    code, said = tune(folder)
    assert (code, "2 of 6" in said) == (0, True)


@pytest.mark.parametrize(("variable", "accumulate"), [("2", 1), ("1", 2)])
def test_22_an_environment_that_wins_over_the_configuration(monkeypatch, variable, accumulate):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", variable)
    code, said = tune(nnunet("data"), accumulate=accumulate)
    assert (code, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in said) == (2, True)


@pytest.mark.parametrize(
    "given",
    [
        "fold=all",
        "mixed_precision=fp16",
        "flip_axes=0",
        "workers=-1",
        "threads=-2",
        "on_foreground=1.5",
        "layer_decay=0",
        "warmup_steps=-5",
        "ema_decay=1.5",
        "clip=0",
    ],
)
def test_25_values_as_users_of_other_programs_give_them(given):
    code, said = tune(nnunet("data"), given)
    assert code == 2
    assert given.partition("=")[0] in said


@pytest.mark.parametrize("given", ["clip=0", "ema_decay=1.5", "zoom=0.5", "flips=[0.5, 0.5, 2]"])
def test_25_the_same_for_pretraining(given):
    from sammed3d_backbone.recipes import pretrain_promptable

    Path("c.yaml").write_text("name: toy\nsources: [synthetic]\nshares: [1]\n")
    with pytest.raises(ValueError, match=given.partition("=")[0]):
        config.load(pretrain_promptable.Config, Path("c.yaml"), [given])


def test_26_weights_trained_in_another_wrapper():
    network = sam("tiny")
    tensors, x = dict(network.state_dict()), torch.randn(1, 1, 64, 64, 64)
    with torch.no_grad():
        expected = encoder("tiny")(x)
        for name, content in {
            "a.ckpt": {"state_dict": {f"model.{n}": t for n, t in tensors.items()}, "epoch": 1},
            "b.ckpt": {
                "state_dict": {
                    **{f"net.{n}": t for n, t in tensors.items()},
                    "criterion.weight": torch.ones(3),
                }
            },
            "c.pth": {"model": tensors, "epoch": 1},
            "d.pt": {"net": tensors},
        }.items():
            torch.save(content, name)
            assert torch.equal(encoder("tiny", weights=name)(x), expected)


def test_30_adapters_and_hooks_on_the_patch_embedding():
    peft = pytest.importorskip("peft")
    x, network, seen = torch.randn(1, 1, 64, 64, 64), encoder("tiny"), []
    names = ("patch_embed.proj", "patch_embed", "blocks.0.attn.qkv", "neck.0")
    for name in names:
        module = network.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        expected = network(x)
        assert sorted(seen) == sorted(names)
        adapted = peft.get_peft_model(
            network, peft.LoraConfig(r=4, target_modules=["qkv", "proj"])
        ).eval()
        assert torch.allclose(adapted(x), expected, atol=1e-5)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        full = adapted(x)
        assert torch.allclose(adapted.merge_and_unload()(x), full, atol=1e-3)
        assert not torch.allclose(full, expected, atol=1e-2)


def test_31_objects_named_by_a_number(scan):
    scan.click((20, 20, 20), object=1)
    scan.click((2, 2, 2), False, object=1)
    assert scan.predict(1).mask.shape == (40, 40, 40)
    scan.save_clicks("c.json")
    scan.load_clicks("c.json")
    assert segment("scan.nii.gz", "o.nii.gz", "--points", "c.json")[0] == 0


@pytest.mark.parametrize("value", [1, 0, -1, 2, "negative", "False", [], None])
def test_32_labels_of_clicks_that_are_not_booleans(scan, value):
    with pytest.raises(TypeError, match="positive"):
        scan.click((3, 3, 3), value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--point", "20,20,20", "--object", "liver"],
        ["--object", "a", "--point", "20,20,20", "--object", "liver"],
        ["--points", "c.json", "--object", "liver"],
    ],
)
def test_33_a_name_behind_its_points(arguments):
    Path("c.json").write_text('{"clicks": [{"object": "a", "point_vox": [20, 20, 20]}]}')
    code, said = segment(ball(), "a.nii.gz", *arguments)
    assert (code, "liver" in said) == (2, True)


def test_34_clicks_saved_into_a_new_folder():
    outputs = ["out/a.nii.gz", "--save-clicks", "clicks/c.json", "--png", "fig/f.png", "--json"]
    assert segment(ball(), *outputs, "--point", "20,20,20")[0] == 0
    assert Path("clicks/c.json").is_file()


def test_35_negative_clicks_only_for_the_last_object(monkeypatch):
    monkeypatch.setattr(Predictor, "predict", lambda *_: pytest.fail("computed"))
    objects = ["--object", "a", "--point", "20,20,20", "--object", "b", "--negative", "1,1,1"]
    code, said = segment(ball(), "out.nii.gz", *objects)
    assert (code, "'b'" in said) == (2, True)
