"""The study of pretraining: its arms, its scores, its table."""

from dataclasses import replace

import pytest
from sammed3d_backbone.recipes import pretrain_promptable
from sammed3d_backbone.recipes.studies import pretrain_study
from sammed3d_backbone.recipes.studies.pretrain_study import (
    Config,
    Score,
    as_markdown,
    main,
    read_scores,
    run_config,
)

from sammed3d_backbone import config


@pytest.fixture
def study(small_pretraining, tmp_path):
    """Two arms, in seconds."""
    base = pretrain_promptable.Config(**small_pretraining | {"steps": 2, "validate_every": 1})
    (tmp_path / "base.yaml").write_text(config.dump(base))
    return Config(
        base=str(tmp_path / "base.yaml"),
        arms=("clicks", "hidden objectives=[reconstruction] steps=3"),
        out=str(tmp_path / "study"),
        crops=4,
    )


def test_the_committed_study_differs_in_one_thing_per_arm(root):
    cfg = config.load(Config, root / "recipes/studies/pretrain_study.yaml")
    made = {name: run_config(name, cfg) for name in pretrain_study.arms_of(cfg)}
    first = made["clicks"]
    apart = {name: config.differences(first, run).keys() - {"name"} for name, run in made.items()}
    assert apart == {
        "clicks": set(),
        "axial": {"rel_pos"},
        "swapped": {"point_pos"},
        "reconstruction": {"objectives", "rehearsal_steps", "steps", "curriculum_steps"},
    }
    assert {"hippocampus"} <= {*first.exclude}
    assert all(run.curriculum_steps == run.steps for run in made.values())


@pytest.mark.slow
def test_arms_are_trained_once_and_scored_on_the_same_crops(study, tmp_path, monkeypatch):
    main(study)
    out = tmp_path / "study"
    rows = {name: read_scores(out / name / "scores.csv") for name in ("clicks", "hidden")}
    places = {name: [(s.crop, s.source) for s in of] for name, of in rows.items()}
    assert places["clicks"] == places["hidden"]
    assert {s.crop for s in rows["clicks"]} == {0, 1, 2, 3}
    assert all(0 <= dice <= 1 for of in rows.values() for s in of for dice in s.dice)
    text = (out / "table.md").read_text()
    assert "| hidden | objectives=('reconstruction',), steps=3 | 3 |" in text
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(pretrain_promptable, "main", lambda _: pytest.fail("trained again"))
    main(study)
    with pytest.raises(ValueError, match=r"other values of \['lr'\]; give another out="):
        main(replace(study, settings=("lr=0.5",)))
    with pytest.raises(ValueError, match="is of 4 crops, not 5; give another out="):
        main(replace(study, crops=5))
    (out / "hidden/scores.csv").unlink()
    main(study, report=True)
    assert "| hidden |" not in (out / "table.md").read_text()


def test_gains_are_over_the_first_arm_on_the_same_objects(study):
    scores = {
        "clicks": [Score(n, "Toy", (0.5, 0.5, n / 10)) for n in range(4)],
        "hidden": [Score(n, "Toy", (0.4, 0.5, 0.1 + n / 10)) for n in range(4)],
    }
    line = {"step": 2, "loss": 1.0, "cpu_seconds": 60, "memory_gib": 1.0}
    table = as_markdown(
        scores,
        {name: [line] for name in scores},
        {name: run_config(name, study) for name in scores},
    )
    hidden = table.splitlines()[-1]
    assert "40.0 (40.0 to 40.0)<br>-10.0 (-10.0 to -10.0)" in hidden
    assert "+10.0 (+10.0 to +10.0)" in hidden
    assert "<br>" not in table.splitlines()[-2]


def test_two_arms_of_one_name_are_refused(study):
    with pytest.raises(ValueError, match="name one twice"):
        main(replace(study, arms=("clicks", "clicks lr=0.1")))
