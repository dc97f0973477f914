"""Whether a data set was among the pretraining data: names of editions, tasks and series."""

import json

import pytest

from sammed3d_backbone.loading.exposure import seen_in_pretraining
from sammed3d_backbone.loading.registry import SA_MED3D_140K, SA_MED3D_HELD_OUT, WEIGHTS, Weights


def test_the_pretraining_list_has_the_published_counts():
    assert len(SA_MED3D_140K) == 58
    assert sum(entry.stages == (1, 2) for entry in SA_MED3D_140K) == 43
    assert sum(entry.stages == (1,) for entry in SA_MED3D_140K) == 15
    assert len(SA_MED3D_HELD_OUT) == 12
    assert len({entry.name for entry in SA_MED3D_140K} | set(SA_MED3D_HELD_OUT)) == 70


@pytest.mark.parametrize(
    ("asked", "verdict", "names"),
    [
        ("AMOS22", "seen", ["AMOS22 (stage 1 and 2)"]),
        ("amos", "seen", ["AMOS22"]),
        ("MSD_Hippocampus", "seen", ["MSD_Hippocampus (stage 1)"]),
        ("Task04_Hippocampus", "seen", ["MSD_Hippocampus"]),
        ("Dataset004_Hippocampus", "seen", ["MSD_Hippocampus"]),
        ("MSD_Task03_Liver", "seen", ["MSD_Liver"]),
        ("Hippocampus", "seen", ["MSD_Hippocampus (stage 1)"]),
        ("Liver", "seen", ["MSD_Liver (stage 1 and 2)"]),
        ("BRATS", "seen", ["MSD_BrainTumour (stage 1 and 2)", "BraTS21"]),
        ("LeftAtrium", "seen", ["MSD_Heart (stage 1)"]),
        ("BrainTumour", "seen", ["MSD_BrainTumour"]),
        ("Heart", "seen", ["MSD_Heart"]),
        ("PROSTATE", "seen", ["MSD_Prostate"]),
        ("Lung", "seen", ["MSD_Lung"]),
        ("Pancreas", "seen", ["MSD_Pancreas"]),
        ("Hepatic Vessel", "seen", ["MSD_HepaticVessel"]),
        ("Spleen", "seen", ["MSD_Spleen"]),
        ("Colon", "seen", ["MSD_Colon"]),
        ("MSD", "seen", ["MSD_Colon", "MSD_Spleen", "MSD_Lung (stage 1 and 2)"]),
        ("TotalSegmentator", "seen", ["Totalsegmentator"]),
        ("TotalSegmentator v2", "related", ["Totalsegmentator"]),
        ("BraTS", "seen", ["BraTS13 (stage 1)", "BraTS21 (stage 1 and 2)"]),
        ("BraTS 2021", "related", ["BraTS21"]),
        ("BraTS23", "related", ["BraTS13", "BraTS21"]),
        ("KiTS23", "related", ["KiTS19", "KiTS21"]),
        ("ISLES22", "related", ["ISLESSISS"]),
        ("Dataset218_AMOS2022_postChallenge_task1", "related", ["AMOS22"]),
        ("BTCV", "held out", ["BTCV"]),
        ("BTCV_Cervix", "seen", ["BTCV_Cervix"]),
        ("SEG.A. 2023", "held out", ["SEG.A.2023"]),
        ("FeTA", "held out", ["FeTA21, FeTA22"]),
        ("FeTA24", "related", ["FeTA21 (held out)"]),
        ("CAS2023", "not listed", ["24 further sets are not public"]),
        ("ACDC", "not listed", ["24 further sets are not public"]),
        ("OpenKBP", "not listed", ["24 further sets are not public"]),
        ("Dataset501_Liver", "not listed", ["Dataset501_Liver is not in"]),
    ],
)
def test_turbo_and_a_dataset(asked, verdict, names):
    exposure = seen_in_pretraining(WEIGHTS["turbo"], asked)
    assert exposure.verdict == verdict
    for name in names:
        assert name in str(exposure)


def test_the_decathlons_own_name_for_a_task_is_known(shared_data):
    content = (shared_data / "hippocampus" / "dataset.json").read_text(encoding="utf-8")
    exposure = seen_in_pretraining(WEIGHTS["turbo"], json.loads(content)["name"])
    assert (exposure.verdict, "MSD_Hippocampus" in str(exposure)) == ("seen", True)


def test_challenge_weights_claim_nothing_about_what_their_list_leaves_out():
    exposure = seen_in_pretraining(WEIGHTS["cvpr_alldata"], "BTCV")
    assert exposure.verdict == "not listed"
    assert "the list is incomplete" in str(exposure)


@pytest.mark.parametrize(
    ("record", "verdict", "said"),
    [
        (None, "none", "random initialisation"),
        (Weights(name="mine"), "not known", "the pretraining data of mine are not known"),
        (Weights(name="mine", pretraining=(), undisclosed_sets=0), "not listed", "complete"),
    ],
)
def test_weights_without_a_list_say_so(record, verdict, said):
    exposure = seen_in_pretraining(record, "AMOS22")
    assert exposure.verdict == verdict
    assert said in str(exposure)
