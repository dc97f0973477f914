"""A whole run: the content of its lines, and its reproducibility."""

import pytest
from standins import SHORT, Broken, Sphere, played_into

from sammed3d_backbone.clickbench.bench import first_difference, run_benchmark
from sammed3d_backbone.clickbench.cases import read_click_set
from sammed3d_backbone.clickbench.journal import Journal, mask_path, read_journal, read_times
from sammed3d_backbone.data.volume import Volume


@pytest.fixture
def lines(finished):
    return read_journal(finished[1])[1]


def test_two_runs_give_identical_files(finished, tmp_path):
    data, out = finished
    again = played_into(tmp_path / "again", Sphere(4.0), data)
    assert (again / "clicks.jsonl").read_bytes() == (out / "clicks.jsonl").read_bytes()


def test_there_is_a_line_per_target_track_and_step_after_the_header(finished, lines):
    header, _ = read_journal(finished[1])
    assert header == {"format": 1, "protocol": "clickbench/1"}
    asked = [(line["case"], line["first"], line["step"]) for line in lines if "step" in line]
    assert asked == [
        (case, first, step)
        for case in ("v1", "v2")
        for first in ("centre", "random")
        for step in (1, 2, 3)
    ]


def test_targets_that_are_too_small_are_listed(lines):
    dropped = [(line["class"], line["dropped"]) for line in lines if "dropped" in line]
    assert dropped == [("dot", "1 voxels, fewer than 27")] * 4


def test_a_click_is_given_in_voxels_and_in_mm(lines):
    (click,) = lines[0]["clicks"]
    i, j, k = click["vox"]
    assert click["mm"] == [-i, j, 2 * k]  # the affine of the made volumes
    assert click["positive"] is True


def test_centre_and_random_start_apart(lines):
    starts = {line["first"]: line["clicks"][0]["vox"] for line in lines if line.get("step") == 1}
    assert starts["centre"] != starts["random"]


def test_the_last_mask_is_kept(finished, lines):
    mask = Volume.load(mask_path(finished[1], lines[2]))
    assert mask.shape == (16, 14, 12)
    assert lines[2]["volume_error"] == pytest.approx(mask.array.sum() / 216 - 1, abs=1e-6)


def test_times_lie_in_a_file_of_their_own(finished):
    times = read_times(finished[1])
    assert len(times) == 12
    assert times[0]["seconds"].keys() == {"set_volume", "click"}
    assert times[0]["peak_rss_mib"] > 1
    assert "seconds" not in (finished[1] / "clicks.jsonl").read_text()


def test_a_run_repeats_itself(finished):
    data, out = finished
    assert not first_difference(Sphere(4.0), SHORT, read_click_set(data), out, targets=3)


def test_what_does_not_repeat_is_named(finished):
    data, out = finished
    found = first_difference(Sphere(3.5), SHORT, read_click_set(data), out, targets=1)
    assert found.startswith("v1, block, centre, step 1, dice: 0.")


def test_failures_are_written(finished, tmp_path, caplog):
    _, lines = read_journal(played_into(tmp_path / "broken", Broken(), finished[0]))
    failed = [line for line in lines if line.get("failure")]
    assert {(line["step"], line["dice"], line["failure"]) for line in failed} == {
        (2, 0, "RuntimeError")
    }


class Rating(Sphere):
    """Returns a predicted Dice for its first answer only."""

    def predict(self):
        answer = super().predict()
        answer.predicted_dice = 0.1234567 if len(self.clicks) == 1 else None
        return answer


def test_an_opinion_is_written_where_there_is_one(finished, tmp_path, lines):
    _, rated = read_journal(played_into(tmp_path / "rated", Rating(4.0), finished[0]))
    said = [(line["step"], line.get("predicted_dice")) for line in rated if "step" in line]
    assert said[:3] == [(1, 0.123457), (2, None), (3, None)]
    for line in rated:
        line.pop("predicted_dice", None)
    assert rated == lines


def test_a_case_that_cannot_be_read_costs_no_other(data, tmp_path):
    (data / "v1_seg.nii.gz").write_bytes(b"damaged")
    journal = Journal(tmp_path / "out", {"protocol": SHORT.name}, SHORT.steps)
    click_set = read_click_set(data)
    failed = run_benchmark(Sphere(4.0), SHORT, click_set, journal, SHORT.tracks)
    assert failed.keys() == {"v1"}
    assert "v1_seg" in failed["v1"]
    assert {line["case"] for line in read_journal(tmp_path / "out")[1]} == {"v2"}
