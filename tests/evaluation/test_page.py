"""Pages hold everything themselves, and text stays text."""

import math

import pytest

from sammed3d_backbone.evaluation.page import facts, heading, page, picture
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


def test_text_is_no_markup():
    text = page("<b>", [heading("a < b", "x & y", ["<script>"]), facts({"<i>": "<u>", "": ""})])
    for markup in ("<b>", "<script>x", "<i>", "<u>"):
        assert f"<title>{markup}" not in text
    assert "a &lt; b" in text
    assert "&lt;u&gt;" in text


def test_a_picture_is_inside_the_page():
    assert "data:image/png;base64,iVBORw==" in picture(b"\x89PNG", "a picture", "what it shows")
