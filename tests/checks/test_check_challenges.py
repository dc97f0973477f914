"""Every challenge config, on synthetic files in the challenge's layout."""

import pytest
from sammed3d_backbone.recipes.finetune_unetr import Config

from sammed3d_backbone import config
from tests.checks.check_challenges import DECATHLON, LOOKS, challenge_configs, check, layout_of

SMALL = {
    "variant": "tiny",
    "crop_vox": 16,
    "feature_size": 4,
    "spacing_mm": [3, 3, 3],
    "batch": 1,
    "overlap": 0,
    "mixed_precision": "no",
}
PAPER = {"amos", "amos_mr", "cas2023", "sega2023", "totalsegmentator"}


QUICK = ("kits", "msd_04_hippocampus")  # one with a layout, one with a dataset.json


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in challenge_configs()
    ],
)
def test_a_challenge_is_read_built_trained_and_predicted(name):
    path = challenge_configs()[name]
    assert check(path, SMALL).classes


@pytest.mark.slow
def test_the_other_edition_of_brats_is_a_layout_away():
    found = check(challenge_configs()["brats"], {**SMALL, "layout": "layouts/brats2021.yaml"})
    assert (found.name, len(found.classes), len(found.channels)) == ("BraTS21", 3, 4)


def test_every_layout_is_tried_and_every_task_of_the_decathlon_has_a_config(root):
    assert {path.stem for path in (root / "recipes/layouts").iterdir()} == set(LOOKS)
    configs = [config.load(Config, path) for path in challenge_configs().values()]
    assert {cfg.data for cfg in configs if cfg.layout is None} == set(DECATHLON)


@pytest.mark.parametrize("stem", LOOKS)
def test_a_layout_says_whom_to_cite_and_what_may_be_done(stem):
    layout = layout_of(stem)
    assert len(layout.citation) > 20
    assert layout.licence
    assert (layout.group == "paper_table6") == (stem in PAPER)


def test_left_and_right_are_never_mirrored_into_each_other():
    for path in challenge_configs().values():
        cfg = config.load(Config, path)
        if cfg.layout is not None:
            classes = layout_of(cfg.layout.split("/")[1][:-5]).classes
            assert not (0 in cfg.flip_axes and any("left" in one for one in classes))
