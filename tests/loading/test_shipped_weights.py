"""Weights that install with the package: what the table, the file and its sums say is one thing."""

import json

import numpy as np
import pytest
import torch

from sammed3d_backbone import encoder, sam
from sammed3d_backbone.data.datasets import read_fold
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.loading.checkpoint import read
from sammed3d_backbone.loading.exposure import seen_in_pretraining
from sammed3d_backbone.loading.hub import locate
from sammed3d_backbone.loading.registry import WEIGHTS, Weights, from_metadata
from sammed3d_backbone.pretraining.click_loss import dice_per_click
from sammed3d_backbone.pretraining.object_crops import (
    Curriculum,
    ObjectStream,
    ScanSource,
    read_scan,
)

SHIPPED = sorted(name for name, record in WEIGHTS.items() if record.repo_id is None)
LARGEST_MB = 24


def stages_of(metadata):
    """What a file says of its training, the last stage first, and of its UNETR decoder's."""
    if "unetr_training" in metadata:
        yield json.loads(metadata["unetr_training"])
    stage = json.loads(metadata["training"])
    while stage is not None:
        yield stage
        stage = stage.get("before")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_is_small_and_stands_in_the_sums(name, root):
    record, path = locate(name)
    assert path.stat().st_size < LARGEST_MB * 1e6
    assert f"{record.sha256}  {path.name}\n" in (root / "weights/SHA256SUMS").read_text()
    assert (root / "weights" / f"{name}.md").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_the_table_says_of_a_file_what_it_says_of_itself(name):
    record, path = locate(name)
    inner = from_metadata(Weights(name="file"), read(path)[1])
    for field in (
        "variant",
        "rel_pos",
        "point_pos",
        "clicks",
        "unetr",
        "preprocessing",
        "pretraining",
        "held_out",
        "undisclosed_sets",
    ):
        assert getattr(record, field) == getattr(inner, field), field


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_what_its_variant_starts_from_whole_and_exact(name, caplog):
    variant = WEIGHTS[name].variant
    tensors, _ = read(locate(name)[1])
    network = sam(variant)
    stored = {key: value.float() for key, value in tensors.items()}
    assert all(torch.equal(value, stored[key]) for key, value in network.state_dict().items())
    assert network.load_report.missing == ()
    assert network.pretrained_cfg == WEIGHTS[name]
    image_encoder = encoder(variant)
    assert image_encoder.pretrained_cfg == WEIGHTS[name]
    kept = network.image_encoder.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in image_encoder.state_dict().items())
    assert not caplog.records


def test_a_copy_of_the_file_is_known_by_its_content(tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(locate("tiny")[1].read_bytes())
    record = sam("tiny", weights=copy).pretrained_cfg
    assert record.licence == WEIGHTS["tiny"].licence
    assert record.status == "local file with the hash of tiny"


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_to_be_transferred_to_was_not_seen(shared_data, name):
    record = WEIGHTS[name]
    assert seen_in_pretraining(record, "hippocampus").verdict == "held out"
    dataset = read_dataset(shared_data / "headneck_ct")
    unseen = {case for fold in (0, 1) for case in read_fold(dataset, fold).val}
    for stage in stages_of(read(locate(name)[1])[1]):
        cases = stage["cases"]
        assert not {name.lower() for name in cases} & {"hippocampus", "voxelmorph_brain"}
        assert not unseen & set(cases["HeadNeckCT"])
        assert not any("hippocampus" in case.lower() for names in cases.values() for case in names)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_click_finds_more_of_an_organ_of_an_unseen_patient_than_before_training(
    shared_data, name
):
    dataset = read_dataset(shared_data / "headneck_ct")
    unseen = read_fold(dataset, 0).val[:1]
    scans = [read_scan(case, "ct") for case in dataset.cases if case.id in unseen]
    crops = ObjectStream(
        [ScanSource("HeadNeckCT", scans, WEIGHTS[name].preprocessing.spacing_mm[0])],
        [1.0],
        64,
        Curriculum((1000, 1000), (1, 1), 0),
        objects=4,
        steps=1,
        samples=2,
        seed=(7,),
    )
    torch.manual_seed(0)
    dice = {}
    for pretrained in (True, False):
        network = sam(WEIGHTS[name].variant, pretrained=pretrained).eval()
        with torch.no_grad():
            found = [
                dice_per_click(network, crop["image"], crop["objects"], 1)
                for crop in map(crops.__getitem__, range(len(crops)))
            ]
        dice[pretrained] = float(np.mean(found))
    assert dice[True] > dice[False] + 0.1, dice
