"""The study of pretraining: its arms, its scores, its table."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from sammed3d_backbone.recipes import pretrain_promptable
from sammed3d_backbone.recipes.studies import pretrain_study, tables
from sammed3d_backbone.recipes.studies.pretrain_study import DICE, Study, main, main_table

from sammed3d_backbone import config


@pytest.fixture
def study(small_pretraining, tmp_path):
    """Two arms, in seconds."""
    base = pretrain_promptable.Config(**small_pretraining | {"steps": 2, "validate_every": 1})
    (tmp_path / "base.yaml").write_text(config.dump(base))
    return Study(
        base=str(tmp_path / "base.yaml"),
        out=str(tmp_path / "study"),
        arms={"clicks": {}, "hidden": {"objectives": ["reconstruction"], "steps": 3}},
        crops=4,
    )


def test_every_arm_of_the_committed_study_is_a_valid_pretraining():
    here = Path(pretrain_study.__file__).parent
    study = tables.load(Study, here / "pretrain_study.yaml")
    base = vars(config.load(pretrain_promptable.Config, here / study.base))
    for own in study.arms.values():
        values = {**base, **study.settings, **own}
        made = config.build(pretrain_promptable.Config, values)
        assert made.curriculum_steps == made.steps
        assert "hippocampus" in made.exclude


@pytest.mark.slow
def test_arms_are_trained_once_and_scored_on_the_same_crops(study, tmp_path, monkeypatch):
    main(study)
    out = tmp_path / "study"
    scores = dict([*tables.read(out, "scores").groupby("run")])
    places = [[*zip(own["crop"], own["source"], strict=True)] for own in scores.values()]
    assert len(places) == 2
    assert places[0] == places[1]
    assert {crop for crop, _ in places[0]} == {0, 1, 2, 3}
    assert scores["clicks"][DICE].stack().between(0, 1).all()
    text = (out / "table.md").read_text()
    assert "| hidden | objectives: [reconstruction], steps: 3 | 3 |" in text
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(pretrain_promptable, "main", lambda _: pytest.fail("trained again"))
    main(study)
    for changed in (replace(study, settings={"lr": 0.5}), replace(study, crops=5)):
        with pytest.raises(ValueError, match="clicks"):
            main(changed)


def test_gains_are_over_the_first_arm_on_the_same_objects():
    runs = pd.DataFrame({"run": ["clicks", "hidden"], "settings": "{}"})
    runs = runs.assign(steps=2, cpu_seconds=60.0, memory_gib=1.0)
    scores = pd.DataFrame({"run": ["clicks"] * 4 + ["hidden"] * 4, "dice_3": 0.5, "source": "Toy"})
    scores = scores.assign(subject=["0", "1", "2", "3"] * 2)
    scores["dice_1"] = [0.5] * 4 + [0.4] * 4
    scores["dice_5"] = [0.0, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.4]
    curves = pd.DataFrame({"run": ["hidden"], "patch_error": [0.5]})
    first, hidden = main_table(runs, scores, curves).to_dict("records")
    assert hidden["1 click, Toy"] == "40.0 (40.0 to 40.0)<br>-10.0 (-10.0 to -10.0)"
    assert hidden["5 clicks, Toy"].endswith("<br>+10.0 (+10.0 to +10.0)")
    assert hidden["error of hidden patches"] == "0.500"
    assert "<br>" not in first["1 click, Toy"]
