"""Pages hold everything themselves, and text stays text."""

import math

import pytest

from sammed3d_backbone.evaluation.page import png, stated, write_page
from sammed3d_backbone.evaluation.statistics import Interval, format_number


@pytest.mark.parametrize(
    ("value", "shown"), [(0.12345, "0.123"), (math.nan, "-"), (math.inf, "∞"), (-2, "-2.000")]
)
def test_a_number_is_shown_to_three_digits_or_as_what_it_is(value, shown):
    assert format_number(value) == shown


def test_an_interval_that_does_not_exist_is_not_shown():
    assert f"{Interval(0.5, math.nan, math.nan)}" == "0.500"
    assert f"{Interval(0.5, 0.25, math.inf):.2f}" == "0.50 (0.25 to ∞)"
    assert f"{Interval.from_json([None] * 3)}" == "-"


def test_text_is_escaped_and_empty_facts_are_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    path = write_page(
        tmp_path / "report.html",
        "curation/report.html",
        title="<b>",
        below="x & y",
        notes=["<script>alert(1)</script>"],
        tiles=[("a < b", "1", "2")],
        steps={},
        step_caption="",
        breakdowns=[],
        galleries=[{"title": "it", "source": png(tmp_path / "a.png"), "caption": "<i>"}],
        refused=[],
        rules={},
        about=stated({"<i>": "<u>", "": ""}),
    )
    text = path.read_text(encoding="utf-8")
    for markup in ("<b><", "<script>alert", "<i>", "<u>"):
        assert markup not in text
    for escaped in ("<title>&lt;b&gt;</title>", "a &lt; b", "&lt;u&gt;"):
        assert escaped in text
    assert 'src="data:image/png;base64,iVBORw=="' in text
    assert png(tmp_path / "none.png") == ""
