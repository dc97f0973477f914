"""The page of a run: figures and warnings."""

import json
import shutil

import pytest
from standins import SHORT, Sphere, played_into

from sammed3d_backbone.clickbench.cases import MODEL_MASKS, read_click_set
from sammed3d_backbone.clickbench.presets import RULES
from sammed3d_backbone.clickbench.report import write_click_report
from sammed3d_backbone.clickbench.summary import times_by_part


@pytest.fixture
def reported(finished, tmp_path):
    """Runs a protocol; returns its page and its summary."""

    def make(rules=SHORT, **header):
        about = {
            "source": rules.source,
            "oracle": rules.oracle,
            "differs": rules.differs,
            "dataset": "made",
            "note": MODEL_MASKS,
            "model": "a sphere",
            **header,
        }
        data, _ = finished
        out = played_into(tmp_path / "out", Sphere(4.0), data, rules, **about)
        page = write_click_report(out, read_click_set(data), {"processor": "a fast one"})
        return page.read_text(), json.loads((out / "summary.json").read_text())

    return make


def test_the_page_asks_no_network_for_anything(reported):
    page, _ = reported()
    assert "data:image/png;base64" in page
    assert "<svg" in page
    for word in ('src="http', "<link", "@import", "<script src"):
        assert word not in page


def test_the_page_shows_figures_starts_notes_and_what_was_left_out(reported):
    page, summary = reported()
    dice = summary["tracks"]["random"]["curve"]["dice"][-1][0]
    for shown in (
        f"{dice:.3f}",
        "the first click anywhere in the object",
        MODEL_MASKS.replace("'", "&#39;"),
        "1 voxels, fewer than 27",
        "a sphere",
        "a fast one",
        "set_volume",
        "regret",
    ):
        assert shown in page


def test_an_honest_protocol_is_not_called_an_oracle(reported):
    assert "ORACLE" not in reported()[0]


def test_an_oracle_is_called_one_and_shows_what_was_published(reported):
    page, summary = reported(RULES["sammed3d-main"])
    assert "ORACLE. This protocol takes from the truth: crop around the label." in page
    (track,) = summary["tracks"].values()
    assert f"{track['published']['mean of class Dice']:.3f}" in page
    assert "classes do not overwrite each other" in page


def test_a_missing_start_is_asked_for(finished, tmp_path):
    data, out = finished
    shutil.copytree(out, tmp_path / "out")
    lines = (out / "clicks.jsonl").read_text().splitlines(keepends=True)
    about = json.loads(lines[0]) | {
        "source": "",
        "oracle": "",
        "differs": "",
        "dataset": "made",
        "note": "",
        "model": "",
    }
    kept = [line for line in lines[1:] if '"first": "random"' not in line]
    (tmp_path / "out" / "clicks.jsonl").write_text(json.dumps(about) + "\n" + "".join(kept))
    page = write_click_report(tmp_path / "out", read_click_set(data), {}).read_text()
    assert "The protocol also has random starts" in page


def test_times_are_medians_by_part_and_the_first_answer_apart():
    def line(peak, **seconds):
        return {"seconds": seconds, "peak_rss_mib": peak}

    found = times_by_part(
        [
            line(5.0, set_volume=2.0, click=1.0),
            line(7.0, click=0.1),
            line(6.0, click=0.2),
            line(0.0, click=0.3),
        ]
    )
    assert found["peak_rss_mib"] == 7.0
    assert found["parts"]["first answer on a volume"]["set_volume"]["median"] == 2.0
    assert found["parts"]["later clicks"]["click"] == {"answers": 3, "median": 0.2, "p95": 0.29}
    assert times_by_part([]) == {"parts": {}, "peak_rss_mib": None}
