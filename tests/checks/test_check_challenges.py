"""Every challenge config, tried on made-up files in the challenge's layout."""

import json

import check_challenges
import pytest
from check_challenges import DECATHLON, LOOKS, challenge_configs, check, remark
from sammed3d_backbone.recipes.finetune_unetr import Config

from sammed3d_backbone import config
from sammed3d_backbone.loading.registry import WEIGHTS, seen_in_pretraining

SMALL = {
    "variant": "tiny",
    "img_size": 16,
    "feature_size": 4,
    "spacing_mm": [3, 3, 3],
    "batch": 1,
    "overlap": 0,
    "mixed_precision": "no",
}
PAPER = {"amos", "amos_mr", "cas2023", "sega2023", "totalsegmentator"}


@pytest.mark.parametrize("name", challenge_configs())
def test_a_challenge_is_read_built_trained_and_predicted(name):
    path = challenge_configs()[name]
    found = check(path, SMALL)
    asked = config.load(Config, path)
    assert found["classes"] >= 1
    assert found["flip_axes"] == asked.flip_axes


def test_the_other_edition_of_brats_is_a_layout_away():
    found = check(challenge_configs()["brats"], {**SMALL, "layout": "layouts/brats2021.yaml"})
    assert (found["name"], found["classes"], len(found["channels"])) == ("BraTS21", 3, 4)


def test_every_layout_is_tried_and_every_task_of_the_decathlon_has_a_config(root):
    assert {path.stem for path in (root / "recipes/layouts").iterdir()} == set(LOOKS)
    configs = [config.load(Config, path) for path in challenge_configs().values()]
    assert {cfg.data for cfg in configs if cfg.layout is None} == set(DECATHLON)


@pytest.mark.parametrize("stem", LOOKS)
def test_a_layout_says_whom_to_cite_and_what_may_be_done(stem):
    layout = check_challenges.layout_of(stem)
    assert len(layout.citation) > 20
    assert layout.licence
    assert (layout.group == "paper_table6") == (stem in PAPER)


def test_left_and_right_are_never_mirrored_into_each_other():
    for path in challenge_configs().values():
        cfg = config.load(Config, path)
        if cfg.layout is not None:
            classes = check_challenges.layout_of(cfg.layout.split("/")[1][:-5]).classes
            assert not (0 in cfg.flip_axes and any("left" in one for one in classes))


def test_the_committed_figures_are_of_these_configs(root):
    result = json.loads((root / "tests/checks/results/challenges.json").read_text())
    assert set(result["configs"]) == set(challenge_configs())
    for name, row in result["configs"].items():
        cfg = config.load(Config, challenge_configs()[name])
        for knob in ("spacing_mm", "flip_axes", "img_size", "batch", "intensity"):
            asked = getattr(cfg, knob)
            assert row[knob] == (list(asked) if isinstance(asked, tuple) else asked)
        assert remark(row) in challenge_configs()[name].read_text()
        assert row["seen"] == seen_in_pretraining(WEIGHTS["turbo"], row["name"]).verdict
    assert check_challenges.table(result) in (root / "recipes/README.md").read_text()
