"""Summaries of result lines against values computed by hand."""

import pytest

from sammed3d_backbone.clickbench.journal import read_journal
from sammed3d_backbone.clickbench.presets import RULES, rules_of
from sammed3d_backbone.clickbench.summary import (
    compare_runs,
    played_targets,
    reported_steps,
    summarise_clicks,
)


def lines_of(dice, case="a", name="liver", first="centre", subject=None, **changed):
    """One target; every figure but Dice is the same at all steps unless given."""
    lines = []
    for number, value in enumerate(dice):
        line = {
            "case": case,
            "subject": subject or case,
            "class": name,
            "first": first,
            "step": number + 1,
            "clicks": [{"vox": [0, 0, 0], "repeat": False}],
            "dice": value,
            "nsd_2mm": value,
            "nsd": value,
            "hd95_mm": 5.0,
            "volume_error": -0.5,
            "slices": [0.0, -0.1, -0.2],
            "agreement": 1.0,
            "agreement_all": 1.0,
            "failure": "",
        }
        lines.append({**line, **{k: values[number] for k, values in changed.items()}})
    return lines


def one(lines, published=""):
    (track,) = summarise_clicks(lines, published)["tracks"].values()
    return track


def test_the_curve_is_the_mean_over_targets_and_may_fall():
    track = one([*lines_of([0.8, 0.6, 0.4], "a"), *lines_of([0.4, 0.6, 0.0], "b")])
    assert [point[0] for point in track["curve"]["dice"]] == pytest.approx([0.6, 0.6, 0.2])
    low, high = track["curve"]["dice"][0][1:]
    assert (low, high) == (0.4, 0.8)  # two subjects: both the one, or both the other


def test_intervals_draw_subjects_and_not_targets():
    # Four targets of one subject are one observation: no interval.
    track = one([*lines_of([0.5] * 3, "a"), *lines_of([0.7] * 3, "b", subject="a")])
    assert track["curve"]["dice"][0] == [0.6, None, None]
    assert (track["targets"], track["cases"], track["subjects"]) == (2, 2, 1)


def test_the_area_is_divided_by_its_width():
    # Trapezoids of 0, 0.5, 1: (0 + 0.5) / 2 + (0.5 + 1) / 2 = 1, over a width of 2.
    assert one(lines_of([0.0, 0.5, 1.0]))["nauc"][0] == 0.5
    assert one(lines_of([0.7]))["nauc"][0] is None


def test_clicks_needed_are_censored_at_the_budget():
    # 0.8 is reached after 2 clicks, and never: (2 + 3) / 2, one of two failed. 0.9 never.
    track = one([*lines_of([0.5, 0.8, 0.7], "a"), *lines_of([0.1, 0.2, 0.3], "b")])
    assert track["noc80"]["clicks"][0] == 2.5
    assert track["noc80"]["failed"] == 0.5
    assert track["noc90"] == {"clicks": [3, 3, 3], "failed": 1}


def test_regret_is_the_best_minus_the_last():
    # 0.9 - 0.4 and 0.5 - 0.5; of the 4 corrections, 1 lowered Dice.
    track = one([*lines_of([0.8, 0.9, 0.4], "a"), *lines_of([0.1, 0.3, 0.5], "b")])
    assert track["regret"][0] == 0.25
    assert track["best"][0] == 0.7
    assert track["lowered"] == 0.25


def test_steps_without_a_click_are_no_corrections():
    click = [{"vox": [0, 0, 0], "repeat": True}]
    track = one(lines_of([0.9, 0.8, 0.8], clicks=[click, click, []]))
    assert track["lowered"] == 1  # one correction, and it lowered Dice
    assert track["repeats"] == 1


def test_agreement_is_per_click_and_over_all_clicks_at_the_end():
    track = one(lines_of([0.5] * 4, agreement=[1, 1, 0, 1], agreement_all=[1, 1, 2 / 3, 0.5]))
    assert track["agreement"] == 0.75
    assert track["agreement_all"] == 0.5


def test_classes_and_cases_can_count_alike():
    # Liver 0.2 and 0.4, spleen 0.9: classes (0.3 + 0.9) / 2, cases (0.55 + 0.4) / 2.
    lines = [
        *lines_of([0.2], "a"),
        *lines_of([0.9], "a", "spleen"),
        *lines_of([0.4], "b"),
    ]
    track = one(lines)
    assert track["curve"]["dice"][0][0] == 0.5
    assert track["class_first"][0] == 0.6
    assert track["case_first"] == 0.475
    assert track["classes"]["liver"]["dice"] == {"1": 0.3}


def test_tracks_are_never_mixed():
    lines = [*lines_of([0.2], first="centre"), *lines_of([0.4], first="random")]
    tracks = summarise_clicks(lines)["tracks"]
    assert {name: track["curve"]["dice"][0][0] for name, track in tracks.items()} == {
        "centre": 0.2,
        "random": 0.4,
    }


def test_failures_and_slices_are_counted():
    track = one(lines_of([0.1, 0.0], failure=["", "MemoryError"]))
    assert track["failures"] == 1
    assert [interval[0] for interval in track["slices"].values()] == [0, -0.1, -0.2]
    assert track["volume_error"][0] == 0.5


def test_dropped_targets_are_listed_and_not_counted():
    dropped = {"case": "a", "subject": "a", "class": "dot", "first": "centre", "dropped": "small"}
    summary = summarise_clicks([*lines_of([0.5]), dropped])
    assert summary["dropped"] == [{"case": "a", "class": "dot", "reason": "small"}]
    assert summary["tracks"]["centre"]["targets"] == 1


# --- published figures -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RULES, "slicewise-2"])
def test_every_protocol_has_its_published_figures(name):
    rules = rules_of(name)
    track = one(lines_of([0.5] * rules.steps), rules.published)
    assert ("published" in track) == (name != "clickbench/1")


def test_2023_publishes_the_best_of_all_clicks():
    # max(0.2, 0.8, 0.5) and max(0.6, 0.1, 0.1): (0.8 + 0.6) / 2. The last are 0.5 and 0.1.
    track = one([*lines_of([0.2, 0.8, 0.5], "a"), *lines_of([0.6, 0.1, 0.1], "b")], "best_dice")
    assert track["published"] == {"mean of best Dice": 0.7}


def test_main_publishes_the_mean_over_classes():
    lines = [*lines_of([0.2], "a"), *lines_of([0.4], "b"), *lines_of([0.9], "a", "spleen")]
    assert one(lines, "class_mean_dice")["published"] == {"mean of class Dice": 0.6}


def test_the_challenge_averages_classes_and_then_cases():
    # Case a: liver 0, 0.2, 0.4, 0.6, 0.8 and spleen 0.2, 0.4, 0.6, 0.8, 1.0 are 0.1, 0.3, 0.5,
    # 0.7, 0.9: area (0.1 + 0.9) / 2 + 0.3 + 0.5 + 0.7 = 2. Case b: five times 0.2: area 0.8.
    # NSD equals Dice here, but is 0 where the case's Dice is at most 0.2: of case a, 0, 0.3, 0.5,
    # 0.7, 0.9: area 0.45 + 1.5 = 1.95; of case b, 0.
    lines = [
        *lines_of([0.0, 0.2, 0.4, 0.6, 0.8], "a"),
        *lines_of([0.2, 0.4, 0.6, 0.8, 1.0], "a", "spleen"),
        *lines_of([0.2] * 5, "b"),
    ]
    assert one(lines, "cvpr25")["published"] == pytest.approx(
        {
            "DSC_AUC": (2.0 + 0.8) / 2,
            "NSD_AUC": (1.95 + 0.0) / 2,
            "DSC_Final": (0.9 + 0.2) / 2,
            "NSD_Final": (0.9 + 0.0) / 2,
        }
    )


# --- comparison --------------------------------------------------------------------------------


def test_a_comparison_is_paired_by_target():
    # Liver gains 0.1 in every case, whatever its level; cases that only one file has are left out.
    base = [0.1, 0.5, 0.9]
    ours = [line for i, d in enumerate(base) for line in lines_of([d - 0.05, d], f"c{i}")]
    theirs = [line for i, d in enumerate(base) for line in lines_of([d - 0.05, d + 0.1], f"c{i}")]
    found = compare_runs(ours, [*theirs, *lines_of([0.0, 0.0], "other")])
    assert found["centre"]["targets"] == 3
    difference = found["centre"]["difference"]
    assert difference["dice, click 2"] == pytest.approx([0.1, 0.1, 0.1])
    assert difference["dice, click 1"] == [0, 0, 0]
    assert difference["nauc"][0] == pytest.approx(0.05)
    assert difference["regret"][0] == 0


def test_files_without_a_common_target_are_refused():
    with pytest.raises(ValueError, match="compare runs on the same data"):
        compare_runs(lines_of([0.1], "a"), lines_of([0.1], "b"))


@pytest.mark.parametrize(
    ("steps", "expected"), [(10, [1, 2, 3, 5, 10]), (1, [1]), (7, [1, 2, 3, 5, 7])]
)
def test_reported_steps_fit_the_budget(steps, expected):
    assert reported_steps(steps) == expected


def test_lines_of_a_run_give_a_summary(finished):
    _, lines = read_journal(finished[1])
    assert len(played_targets(lines)) == 4
    assert set(summarise_clicks(lines)["tracks"]) == {"centre", "random"}
