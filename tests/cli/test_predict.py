"""sammed3d predict: a NIfTI in, labels on its grid out."""

import nibabel as nib
import numpy as np
import pytest
import torch

from sammed3d_backbone import encoder
from sammed3d_backbone.cli import main
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.segmenter import Segmenter
from sammed3d_backbone.loading.checkpoint import read, write

AFFINE = np.array([[0, 0, -2.0, 5], [-1.0, 0, 0, 1], [0, 1.5, 0, 2], [0, 0, 0, 1]])


@pytest.fixture
def model(fine_tuned):
    """A model file with random weights."""
    return fine_tuned(training={"dataset": {"name": "toes"}})


@pytest.fixture
def scan(tmp_path, rng):
    """A turned, anisotropic volume."""
    Volume(rng.normal(100, 20, (12, 20, 14)).astype(np.float32), AFFINE).save(
        tmp_path / "in.nii.gz"
    )
    return str(tmp_path / "in.nii.gz")


def test_info_of_a_model_prints_its_card(model, capsys):
    assert main(["info", model]) == 0
    said = capsys.readouterr().out
    for line in (
        "network: fine-tuned unetr",
        "encoder: variant tiny, in_chans 1, img_size 16",
        "labels: 0 background, 1 head, 2 tail",
        "spacing_mm: 2.0 x 2.0 x 2.0",
        "intensity: default zscore_positive",
        "dataset: toes",
    ):
        assert line in said.splitlines()


def test_a_model_verifies_and_an_altered_one_does_not(model, capsys):
    assert main(["verify", model]) == 0
    assert "tensors of the fine-tuned unetr fit its card" in capsys.readouterr().out
    tensors, metadata = read(model)
    del tensors["out.conv.conv.bias"]
    write(model, tensors, metadata, overwrite=True)
    assert main(["verify", model]) == 1
    assert "out.conv.conv.bias" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("network", "adapter"),
    [
        ("flexible_unet", {"feature_size": 4, "kind": "simple"}),
        ("segresnet", {"feature_size": 4, "kind": "conv_stem"}),
        ("linear_head", {}),
        ("expanding_head", {"feature_size": 4}),
        ("class_prompts", {"variant": "tiny"}),
    ],
)
def test_every_decoder_predicts_from_its_card_alone(network, adapter, fine_tuned, scan, tmp_path):
    model = fine_tuned(network=network, adapter=adapter)
    assert main(["predict", model, scan, str(tmp_path / "out.nii.gz")]) == 0
    assert Volume.load(tmp_path / "out.nii.gz").shape == (12, 20, 14)
    assert encoder("tiny", weights=model).depth == 12


def test_the_encoder_of_a_model_is_taken_without_what_it_lost(model, caplog):
    network = encoder("tiny", weights=model)
    segmenter = Segmenter.from_pretrained(model)
    mine, its = network.state_dict(), segmenter.model.encoder.state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    assert "neck.0.weight" in network.load_report.missing
    assert "did not read neck" in caplog.text
    assert "encoder of a fine-tuned unetr" in network.pretrained_cfg.status
    with pytest.raises(ValueError, match=r"call encoder\('tiny'"):
        encoder("vit_b", weights=model)


def test_a_model_without_an_encoder_is_no_weights(model):
    tensors, metadata = read(model)
    write(model, {"a": tensors["out.conv.conv.bias"]}, metadata, overwrite=True)
    with pytest.raises(ValueError, match=r"without an encoder.*`sammed3d predict`"):
        encoder("tiny", weights=model)


@pytest.mark.parametrize("options", [[], ["--nearest"]])
def test_labels_are_written_on_the_grid_of_the_scan(model, scan, tmp_path, capsys, options):
    target = tmp_path / "new" / "out.nii.gz"
    assert main(["predict", model, scan, str(target), *options]) == 0
    found, given = nib.load(target), nib.load(scan)
    assert found.shape == given.shape
    assert np.array_equal(found.affine, given.affine)
    assert found.get_data_dtype() == np.uint8
    labels = np.asarray(found.dataobj)
    said = capsys.readouterr().out
    count = int((labels == 1).sum())
    assert f"1 head: {count} voxels, {count * 3 / 1000:.2f} ml" in said
    assert str(target) in said


def test_a_sheared_voxels_volume_is_not_the_product_of_its_edges(model, tmp_path, capsys, rng):
    sheared = np.array([[1.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    scan, target = tmp_path / "sheared.nii.gz", tmp_path / "out.nii.gz"
    Volume(rng.normal(100, 20, (16, 16, 16)).astype(np.float32), sheared).save(scan)
    assert main(["predict", model, str(scan), str(target)]) == 0
    said = capsys.readouterr().out
    counts = np.bincount(np.asarray(nib.load(target).dataobj).ravel(), minlength=3)
    for value, name in ((1, "head"), (2, "tail")):
        assert f"{value} {name}: {counts[value]} voxels, {counts[value] / 1000:.2f} ml" in said
    assert counts[1:].max() > 100


def test_an_existing_file_is_kept_unless_forced(model, scan, tmp_path, capsys):
    target = tmp_path / "out.nii.gz"
    target.write_bytes(b"precious")
    assert main(["predict", model, scan, str(target)]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert target.read_bytes() == b"precious"
    assert main(["predict", model, scan, str(target), "--force"]) == 0


def test_the_scan_itself_is_never_written_over(model, scan, tmp_path):
    before = (tmp_path / "in.nii.gz").read_bytes()
    assert main(["predict", model, scan, scan, "--force"]) == 2
    assert (tmp_path / "in.nii.gz").read_bytes() == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scan_with_voxels_that_are_no_number_is_refused(model, scan, tmp_path, capsys, value):
    volume = Volume.load(scan)
    volume.array[3, 3, 3] = value
    volume.save(scan)
    before = sorted(tmp_path.iterdir())
    assert main(["predict", model, scan, str(tmp_path / "out.nii.gz")]) == 2
    assert "replace those voxels" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["{model}", "{tmp}/none.nii.gz", "{tmp}/o.nii.gz"], "check the path"),
        (["{tmp}/none.safetensors", "{scan}", "{tmp}/o.nii.gz"], "none.safetensors"),
        (["{scan}", "{scan}", "{tmp}/o.nii.gz"], "in.nii.gz"),
        (["{model}", "{scan}", "{tmp}/o.tif"], "o.tif"),
        (["{model}", "{scan}", "{tmp}/o.nii.gz", "--device=nonsense"], "try cpu"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    model, scan, tmp_path, capsys, arguments, remedy
):
    filled = [a.format(model=model, scan=scan, tmp=tmp_path) for a in arguments]
    before = sorted(tmp_path.iterdir())
    assert main(["predict", *filled]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sammed3d: error: ")
    assert remedy in line
    assert sorted(tmp_path.iterdir()) == before
