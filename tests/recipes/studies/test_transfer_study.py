"""The study of transfer: its order, its files, its tables."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from sammed3d_backbone.recipes import finetune_unetr
from sammed3d_backbone.recipes.studies import tables, transfer_study
from sammed3d_backbone.recipes.studies.arms import ArmConfig
from sammed3d_backbone.recipes.studies.transfer_study import (
    Study,
    admission,
    class_table,
    in_order,
    main,
    read_study,
    recipe_config,
    settings_of,
    steps_to_reach,
)

from sammed3d_backbone import config

STUDIES = sorted(Path(transfer_study.__file__).parent.glob("*.yaml"))
OF_TRANSFER = [path for path in STUDIES if "grid" in yaml.safe_load(path.read_text())]


@pytest.fixture
def study(tmp_path, small):
    """Two draws of two arms on boxes."""
    task = tmp_path / "boxes.yaml"
    task.write_text(config.dump(ArmConfig(**small, lr=3e-4)))
    return Study(
        out=str(tmp_path / "study"),
        arms={"scratch": {"scratch": True}, "frozen": {"scratch": True, "freeze": "encoder"}},
        grid=[{"task": str(task), "labels": 2, "draws": 2, "arms": ["scratch", "frozen"]}],
    )


@pytest.fixture
def trained(monkeypatch, runs):
    """Names of the runs in their order; files with invented scores replace the training."""

    class Seen(list):
        limit = 10**6

    seen = Seen()

    def train(cfg, **_):
        if len(seen) == seen.limit:
            raise KeyboardInterrupt
        seen.append(cfg)
        dice = 0.5 + 0.1 * (cfg.freeze == "encoder") + 0.01 * cfg.seed - abs(cfg.lr - 0.01)
        folder = runs / cfg.name / "results"
        folder.mkdir(parents=True)
        rows = [
            {"case": f"case_{n}", "subject": f"person_{n}", "class": "front", "dice": dice + n / 99}
            for n in range(4)
        ]
        scores = pd.DataFrame(rows).assign(nsd=0.9, hd95_mm=1.0, annotated="yes", truncated="no")
        scores.to_csv(folder / "scores.csv", index=False)
        about = {
            "mean_dice": dice,
            "steps": 4,
            "seconds": 8.0,
            "cpu_seconds": 4.0,
            "peak_memory_mb": 100,
            "parameters": {"all": 2_000_000, "trained": 1_000_000},
            "weights": "none\nof them",
            "data_overlap": "not seen",
            "split": "fold 0",
            "command": "python",
            "provenance": {"commit": "123456"},
        }
        (folder / "scores.json").write_text(json.dumps(about))
        lines = ({"step": step, "mean_dice": dice * step / 4} for step in (2, 4))
        log = "".join(json.dumps(line) + "\n" for line in lines)
        (folder.parent / "metrics.jsonl").write_text(log)

    monkeypatch.setattr(finetune_unetr, "main", train)
    return seen


@pytest.mark.parametrize("path", OF_TRANSFER, ids=lambda path: path.stem)
def test_every_run_of_a_committed_study_is_a_valid_fine_tuning(path):
    study = replace(read_study(path), rates=())
    planned = [*in_order(study)]
    assert len({run.name for run in planned}) == len(planned)
    for run in planned:
        wanted = recipe_config(run, settings_of(run, study, Path()), study)
        assert wanted.seed == run.draw


def test_a_stopped_study_resumes_and_ends_with_table_and_figure(study, trained, tmp_path):
    out = tmp_path / "study"
    trained.limit = 3
    with pytest.raises(KeyboardInterrupt):
        main(study)
    assert [*tables.read(out, "runs")["run"]][-1] == "boxes_2_draw1_scratch"
    trained.limit = 10**6
    main(study)
    kept = {path: path.read_bytes() for path in out.iterdir()}
    main(study)
    main(study, report=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == kept
    assert len({cfg.name for cfg in trained}) == len(trained) == 4
    runs, scores = tables.read(out, "runs"), tables.read(out, "scores")
    assert {*scores["run"]} == {*runs["run"]}
    assert runs.loc[0, "commit"] == "123456"
    text = (out / "table.md").read_text()
    # 50 plus a half of a point for the second draw, minus 1 for the learning rate, plus 1.5 / 99.
    assert "| boxes | 2 | frozen | 2 | " in text
    assert "+10.00 (+10.00 to +10.00)" in text
    assert "4/4, 4/4 | 1.00 of 2.00, 100, 2.000 / 1.000 |" in text
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="boxes_2_draw0_scratch"):
        main(replace(study, settings={"steps": 5}))


def test_every_arm_takes_the_rate_that_is_best_on_a_fold_that_is_not_reported(
    study, trained, tmp_path
):
    study = replace(study, rates=[0.5, 0.02], tuning={"fold": 1, "labels": 2})
    main(study)
    first = trained[:3]
    assert [(cfg.fold, cfg.lr) for cfg in first] == [(1, 0.5), (1, 0.02), (0, 0.02)]
    assert len(trained) == 2 * 2 + 4
    assert {*tables.read(tmp_path / "study", "scores")["run"]} == {
        f"boxes_2_draw{draw}_{arm}" for draw in (0, 1) for arm in ("scratch", "frozen")
    }
    text = (tmp_path / "study/table.md").read_text()
    assert "| boxes | frozen | 11.00 | 59.00 |" in text


@pytest.mark.slow
def test_a_study_trains_what_it_says(study, tmp_path):
    main(replace(study, grid=[{**study.grid[0], "draws": 1}]))
    runs = tables.read(tmp_path / "study", "runs").set_index("arm")
    assert runs.loc["frozen", "trained_parameters"] < runs.loc["frozen", "parameters"]
    assert runs.loc["scratch", "trained_parameters"] == runs.loc["scratch", "parameters"]
    assert runs["validation"].str.startswith("2:").all()


def test_gains_by_class_are_of_the_same_cases():
    rows = [
        ("scratch", "cord", "a", 0.6),
        ("scratch", "cord", "b", 0.6),
        ("pretrained", "cord", "a", 0.9),
        ("pretrained", "cord", "c", 0.1),
    ]
    scores = pd.DataFrame(rows, columns=["arm", "class", "case", "dice"])
    scores = scores.assign(task="boxes", labels="2", draw=0, subject=scores["case"])
    table = class_table(scores, "scratch").set_index("arm")
    assert table.loc["pretrained", "Dice"].startswith("50.00 (")
    assert table.loc["pretrained", "Dice gain"] == "+30.00"


def test_a_control_admits_a_task_only_with_a_large_and_certain_gain(study):
    study = replace(study, controls=["sure", "small", "vague"])
    dice = {
        "scratch": [0.5] * 4,
        "sure": [0.6] * 4,
        "small": [0.52] * 4,
        "vague": [0.2, 0.9, 0.9, 0.6],
    }
    runs = pd.DataFrame({"run": [*dice], "arm": [*dice], "task": "boxes", "labels": "2"})
    scores = [
        pd.DataFrame({"run": arm, "case": list("abcd"), "subject": list("abcd"), "dice": values})
        for arm, values in dice.items()
    ]
    scores = pd.concat(scores).assign(**{"class": "front", "draw": 0, "task": "boxes"})
    scores = scores.assign(labels="2")
    verdicts = [line.rpartition(", ")[2] for line in admission(runs, scores, study).splitlines()]
    assert verdicts[-3:] == ["admitted", "not admitted", "not admitted"]


def test_weights_of_an_earlier_arm_of_the_same_draw_are_named_by_it(study):
    weights = "{out}/{task}_{labels}_draw{draw}_frozen/last.safetensors"
    study = replace(study, arms={**study.arms, "scratch": {"weights": weights}})
    run = [*in_order(study)][2]
    assert settings_of(run, study, Path())["weights"] == (
        "study/boxes_2_draw1_frozen/last.safetensors"
    )


def test_steps_are_counted_until_the_other_run_is_reached_at_its_end():
    baseline = [(100, 0.7), (200, 0.6)]  # its end counts, not its best
    rising = [(50, 0.5), (100, 0.6), (150, 0.8)]
    assert steps_to_reach(rising, baseline) == "100/200"
    assert steps_to_reach(rising[:1], baseline) == "never/200"


@pytest.mark.parametrize(
    ("changes", "token"),
    [
        ({"arms": {"other": {}}}, "scratch"),
        ({"controls": ["other"]}, "other"),
        ({"typo": 1}, "typo"),
        ({"out": None}, "out"),
    ],
)
def test_a_study_that_cannot_be_read_is_refused(changes, token, tmp_path):
    grid = [{"task": "hippocampus", "labels": 8, "draws": 1, "arms": ["scratch"]}]
    values = {"out": "x", "arms": {"scratch": {}}, "grid": grid} | changes
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(ValueError, match=token):
        read_study(path)


def test_weights_of_another_study_are_found_where_runs_lie(study, runs):
    (runs / "other").mkdir(parents=True)
    (runs / "other/last.safetensors").write_bytes(b"")
    arms = {"scratch": {"scratch": False, "weights": "other/last.safetensors"}}
    study = replace(study, arms=arms, grid=[{**study.grid[0], "arms": ["scratch"]}])
    run = next(in_order(study))
    settings = settings_of(run, study, Path())
    assert settings["weights"] == "other/last.safetensors"  # the same on every machine
    wanted = recipe_config(run, settings, study)
    assert wanted.weights == str(runs / "other/last.safetensors")


def test_a_block_of_the_grid_is_made_alone(study, trained):
    both = replace(study, grid=[*study.grid, {**study.grid[0], "draws": 1, "labels": 3}])
    main(both, block=1)
    assert [cfg.num_subjects for cfg in trained] == [3, 3]
    with pytest.raises(ValueError, match="--block"):
        main(both, block=2)
