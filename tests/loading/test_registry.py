"""The weights table, and records in the metadata of files."""

import dataclasses
import json
import re

import pytest

from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.loading.calibration import DiceCalibration
from sammed3d_backbone.loading.registry import (
    DEFAULT_WEIGHTS,
    LISTED,
    WEIGHTS,
    Weights,
    default_weights,
    from_metadata,
    to_metadata,
)
from sammed3d_backbone.loading.variants import VARIANTS


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_record_is_complete_and_frozen(name):
    record = WEIGHTS[name]
    assert record.name == name
    assert record.variant in VARIANTS
    assert record.rel_pos in ("sammed3d", "axial")
    assert record.licence
    assert record.citation
    assert record.pretraining
    assert record.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", record.sha256)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.sha256 = ""


def test_the_public_files_are_listed_and_none_is_said_to_have_been_opened():
    public = {r.filename for r in WEIGHTS.values() if r.repo_id == "blueyo0/SAM-Med3D"}
    assert public == {
        "sam_med3d_turbo.pth",
        "sam_med3d_turbo_bbox_init.pth",
        "sam_med3d_turbo_cvpr_coreset.pth",
        "sam_med3d_turbo_cvpr_alldata.pth",
    }
    assert {r.status for r in WEIGHTS.values() if r.filename in public} == {LISTED}


def test_turbo_is_what_a_user_needs_to_know():
    turbo = WEIGHTS["turbo"]
    assert turbo.sha256.startswith("899a46d0")
    assert (turbo.variant, turbo.rel_pos) == ("vit_b", "sammed3d")
    assert turbo.preprocessing == SAM_MED3D


def test_a_printed_record_counts_the_datasets_and_shows_the_preprocessing():
    lines = dict(line.split(": ", 1) for line in str(WEIGHTS["turbo"]).splitlines())
    assert lines["pretraining"] == "58 named sets, 43 beyond stage 1"
    assert lines["spacing_mm"] == "1.5 x 1.5 x 1.5"
    assert lines["statistics"] == "crop"
    assert "repo_id: not known" in str(Weights(name="mine"))


def test_defaults_are_in_the_table_and_belong_to_their_variant():
    assert (default_weights("vit_b"), default_weights("tiny")) == ("turbo", "tiny")
    for variant, name in DEFAULT_WEIGHTS.items():
        assert WEIGHTS[name].variant == variant


def test_a_variant_without_weights_says_how_to_start_at_random():
    with pytest.raises(ValueError, match="pretrained=False"):
        default_weights("vit_h_256")


# --- records in the metadata of files --------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_record_survives_a_files_metadata(name):
    outside = Weights(name="a.safetensors", sha256="1", status="local file")
    inside = from_metadata(outside, to_metadata(WEIGHTS[name]))
    assert inside == dataclasses.replace(
        WEIGHTS[name],
        name="a.safetensors",
        repo_id=None,
        filename=None,
        revision=None,
        sha256="1",
        status=f"local file, made from {name}",
    )


def test_a_record_of_the_table_is_complete():
    record = WEIGHTS["tiny"]
    assert from_metadata(record, to_metadata(Weights(name="other"))) is record


def test_a_file_without_a_record_keeps_the_one_from_outside():
    assert from_metadata(Weights(name="a"), {"format": "pt"}) == Weights(name="a")


def test_a_record_of_a_later_release_is_read_as_far_as_it_is_known():
    entry = json.dumps({"name": "later", "licence": "CC0", "a_new_field": 3})
    record = from_metadata(Weights(name="a"), {"weights_record": entry})
    assert record.licence == "CC0"


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "[]",
        "{}",
        "3",
        '{"name": "a", "pretraining": [{}]}',
        '{"name": "a", "preprocessing": {}}',
        '{"name": "a", "dice_calibration": {"intercept": NaN}}',
        '{"name": "a", "dice_calibration": {"slope": 1e300}}',
    ],
)
def test_metadata_that_is_no_record_is_refused(entry):
    with pytest.raises(ValueError, match="weights_record") as caught:
        from_metadata(Weights(name="a"), {"weights_record": entry})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_calibration_of_large_numbers_stays_between_0_and_1(sign):
    dice = DiceCalibration(sign * 100, 100, sign * 100).expected(0.5, 10**6)
    assert 0 <= dice <= 1
