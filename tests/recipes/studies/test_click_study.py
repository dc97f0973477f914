"""The click study: refusals, ball, figures, resuming."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sammed3d_backbone.recipes.studies import click_study, tables
from sammed3d_backbone.recipes.studies.click_study import (
    Ball,
    Config,
    class_table,
    click_table,
    main,
    mean_volumes_mm3,
    predicted,
    trained_cases,
)
from standins import Sphere

from sammed3d_backbone import sam
from sammed3d_backbone.data.datasets import Case, LabelledCase
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.loading.checkpoint import write
from sammed3d_backbone.loading.registry import Weights, to_metadata

TURNED = np.array([[0, 0, -2.0, 5], [-3.0, 0, 0, 1], [0, 1.5, 0, 2], [0, 0, 0, 1]])  # mm


@pytest.fixture
def make_weights(tmp_path):
    """Writes a small promptable network with a training record; returns the file."""

    def make(training, name="small.safetensors"):
        torch.manual_seed(7)
        network = sam("tiny", pretrained=False, img_size=16)
        record = Weights("small", variant="tiny", rel_pos="sammed3d", preprocessing=SAM_MED3D)
        entries = {**to_metadata(record), "training": json.dumps(training)}
        write(tmp_path / name, network.state_dict(), entries)
        return str(tmp_path / name)

    return make


@pytest.fixture
def cfg(toy_data, runs, make_weights, tmp_path):
    """One volume of two boxes, two clicks each."""
    weights = make_weights({"cases": {"Toy": ["case_x"]}})
    return Config(
        weights,
        data=str(toy_data),
        cases=1,
        clicks=(1, 2),
        out=str(tmp_path / "out"),
        threads=1,
    )


@pytest.fixture
def asked(monkeypatch):
    """Names of the played models, in order; stops after `asked.limit` calls."""
    real = click_study.run_benchmark

    class Asked(list):
        limit = 10**6

    seen = Asked()

    def noted(model, rules, click_set, journal, tracks):
        if len(seen) == seen.limit:
            raise KeyboardInterrupt
        seen.append(journal.folder.name)
        real(model, rules, click_set, journal, tracks)

    monkeypatch.setattr(click_study, "run_benchmark", noted)
    return seen


# --- who is refused -----------------------------------------------------------------------------


def test_cases_of_any_stage_of_the_training_are_found():
    first = {"cases": {"Toy": ["a"], "synthetic": []}, "crops": 3}
    training = {"cases": {"Toy": ["b", "c"]}, "before": {"cases": {"Else": ["d"]}, "before": first}}
    found = trained_cases({"training": json.dumps(training), "format": "pt"})
    assert found == {"Toy": {"a", "b", "c"}, "Else": {"d"}, "synthetic": set()}
    assert trained_cases({"format": "pt"}) == {}


@pytest.mark.parametrize("nested", [False, True])
def test_cases_that_the_weights_were_trained_on_are_refused(cfg, make_weights, runs, nested):
    stage = {"cases": {"Toy": [case.id for case in read_dataset(cfg.data).cases]}}
    training = {"cases": {"Toy": []}, "before": stage} if nested else stage
    weights = make_weights(training, "met.safetensors")
    with pytest.raises(ValueError, match=r"trained on 1 of the 1 cases of Toy \(case_\d\); pass"):
        main(replace(cfg, weights=weights))
    assert not runs.exists()


def test_random_values_are_no_weights():
    with pytest.raises(ValueError, match="pass weights=FILE"):
        main(Config())


@pytest.mark.parametrize("clicks", [(), (0, 1), (3, 1), (1, 1), (11,)])
def test_impossible_numbers_of_clicks_are_refused(clicks):
    with pytest.raises(ValueError, match="give numbers from 1 to 10, the smallest first"):
        Config(clicks=clicks)


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="leave out --report to make them"):
        main(Config(out=str(tmp_path)), report=True)


# --- the ball -----------------------------------------------------------------------------------


def test_a_class_has_the_mean_volume_of_the_cases_that_have_it(tmp_path):
    cases = []
    for number, voxels in enumerate([(10, 4), (20, 0)]):
        label = np.zeros((5, 6, 7), np.uint8)
        label.reshape(-1)[: sum(voxels)] = np.repeat([1, 2], voxels)
        path = tmp_path / f"{number}.nii.gz"
        Volume(label, TURNED).save(path)
        cases.append(LabelledCase(Case(str(number), (path,), path), {1: "a", 2: "b", 3: "nowhere"}))
    assert mean_volumes_mm3(cases) == {"a": pytest.approx(15 * 9), "b": pytest.approx(4 * 9)}


def test_a_ball_has_its_volume_whatever_the_grid():
    ball = Ball(volume_mm3=40_000.0)
    ball.set_volume(Volume(np.zeros((30, 40, 60), np.float32), TURNED), modality="ct")
    ball.reset()
    ball.click((14, 20, 30))
    mask = ball.predict().mask
    assert mask.sum() * 9 == pytest.approx(40_000, rel=0.01)
    assert np.argwhere(mask).mean(0) == pytest.approx((14, 20, 30))
    sides_mm = np.ptp(np.argwhere(mask), axis=0) * [3.0, 1.5, 2.0]
    assert np.abs(sides_mm - 2 * ball.radius_mm).max() < 2 * 3.0  # a voxel at both ends


def test_a_ball_stays_where_it_is_and_inside_the_volume():
    ball = Ball(volume_mm3=4_000.0)
    ball.set_volume(Volume(np.zeros((30, 40, 60), np.float32), np.eye(4)))
    ball.reset()
    ball.click((0, 20, 30))
    first = ball.predict().mask
    ball.click((20, 20, 30))
    ball.click((1, 20, 30), False)
    assert np.array_equal(ball.predict().mask, first)
    assert first.shape == (30, 40, 60)
    assert not first[15:].any()  # nothing comes in from the other side
    assert 0.5 < first.sum() / 4_000 < 0.6  # a half, and the layer that it is cut through
    ball.reset()
    ball.click((20, 20, 30))
    assert ball.predict().mask[20, 20, 30]


# --- the run ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_study_resumes_and_plays_nothing_twice(cfg, asked, runs, tmp_path):
    out, cfg = tmp_path / "out", replace(cfg, calibrated=False)
    asked.limit = 2
    with pytest.raises(KeyboardInterrupt):
        main(cfg)
    assert [*tables.read(out, "runs")["run"]] == ["newest", "all"]
    asked.limit = 10**6
    main(cfg)
    # The ball is played class by class.
    assert asked == ["newest", "all", "untrained", "sphere", "sphere"]
    kept = {path: path.read_bytes() for path in out.iterdir()}
    main(cfg)
    main(cfg, report=True)
    assert len(asked) == 5
    assert {path: path.read_bytes() for path in out.iterdir()} == kept

    made = tables.read(out, "runs").set_index("run")
    assert [*made.index] == ["newest", "all", "untrained", "sphere"]
    assert made.loc["newest", "trained_on"].startswith("1 cases of Toy, none of")
    text = (out / "table.md").read_text()
    assert "| all - newest | NSD at 2 mm |" in text
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")

    rows = dict([*tables.read(out, "scores").groupby("run")])
    order = [("front", 1), ("front", 2), ("back", 1), ("back", 2)]
    for name, own in rows.items():
        assert [*zip(own["class"], own["step"], strict=True)] == order
        assert own["predicted_dice"].notna().all() == (name == "newest")  # as it was calibrated
    lines = (runs / "out" / "newest" / "clicks.jsonl").read_text().splitlines()[1:]
    said = [json.loads(line)["predicted_dice"] for line in lines]
    assert said == [*rows["newest"]["predicted_dice"]]
    assert said[0] != said[1]
    # All lies in one window: nothing tells the two ways apart before the second click.
    dice = {name: [*own["dice"]] for name, own in rows.items()}
    assert dice["newest"][0] == dice["all"][0] != dice["untrained"][0]
    assert dice["newest"][1] != dice["all"][1]
    assert dice["sphere"][0] > 0.7  # boxes, all of one size


def test_results_of_another_study_are_not_taken_for_this_one(cfg, monkeypatch):
    monkeypatch.setattr(click_study, "Predictor", _stand_in)
    monkeypatch.setattr(click_study, "write_report", lambda *_: None)
    main(cfg)
    with pytest.raises(ValueError, match="newest"):
        main(replace(cfg, fold=1))


def _stand_in(network, **_):
    """Plays at once, with any network."""
    standin = Sphere()
    standin.preprocessing = None
    return standin


# --- the figures --------------------------------------------------------------------------------


def rows_of(dice, predicted_dice=None):
    """Rows after one click from {(case, class): Dice}; NSD is half of it."""
    rows = pd.DataFrame([*dice], columns=["case", "class"])
    rows = rows.assign(run="newest", subject=rows["case"], step=1, dice=[*dice.values()])
    rows["predicted_dice"] = np.nan if predicted_dice is None else predicted_dice
    return rows.assign(nsd_2mm=rows["dice"] / 2)


ONE = {("a", "x"): 0.2, ("b", "x"): 0.4, ("b", "y"): 0.8}
OTHER = {("a", "x"): 0.1, ("b", "x"): 0.4, ("b", "y"): 0.5, ("c", "y"): 1.0}


def test_every_class_has_the_same_weight_and_pairs_are_of_the_same_targets():
    ours, theirs = rows_of(ONE), rows_of(OTHER)
    dice, nsd = click_table("player", {"newest": ours}, [1])["after 1"]
    # x: (0.2 + 0.4) / 2, y: 0.8. Drawing a alone leaves x at 0.2, b alone x at 0.4 and y at 0.8.
    assert dice == "55.0 (20.0 to 60.0)"
    assert nsd.startswith("27.5 (")
    classes = class_table({"newest": ours}, [1]).set_index("class")
    assert classes.loc["x", "Dice after 1"] == "30.0 (20.0 to 40.0)"
    assert classes.loc["y", "Dice after 1"] == "80.0"  # one subject
    gain = tables.paired(ours, theirs, click_study.TARGET, ["dice"])
    assert len(gain) == 3
    assert tables.interval(gain, "dice").mean == pytest.approx((0.05 + 0.3) / 2)


def test_what_is_predicted_is_compared_with_what_is_true():
    dice = dict(zip([(c, "x") for c in "abcdef"], [0.1, 0.3, 0.2, 0.5, 0.6, 0.9], strict=True))
    table, groups = predicted(rows_of(dice, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]), [1])
    line, together = table.to_dict("records")
    assert {**together, "clicks": "1"} == line  # there is one number of clicks only
    assert line["masks"] == "6"
    assert line["Spearman"] == f"{1 - 12 / 210:.2f}"  # ranks differ by 1 in two places
    assert line["absolute error"].startswith("8.3 (")
    assert line["signed error"].startswith("+1.7 (")
    assert line["group 1"] == "25.0: 20.0"
    assert line["error of groups"] == f"{(5 + 20 + 0 + 0 + 20) / 5:.1f}"
    assert len(groups[1]) == 5
    same, _ = predicted(rows_of(dice, [0.5] * 6), [1])
    assert same.loc[0, "Spearman"] == ""
