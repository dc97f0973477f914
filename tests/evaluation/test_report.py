"""The page for a reader, and the files it is made of."""

import base64
import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from sammed3d_backbone.data.datasets import Case, Dataset
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.metrics import METRICS
from sammed3d_backbone.evaluation.report import About, shown_cases, write_report, write_results
from sammed3d_backbone.evaluation.scores import Score, write_scores

CLASSES = ("head", "tail")


def score_of(case, subject, name, *values, **flags):
    return Score(case, subject, name, dict(zip(METRICS, values, strict=False)), **flags)


SCORES = [
    score_of("a", "anna", "head", 0.9, 0.8, 1.5),
    score_of("a", "anna", "tail", 0.7, 0.6, math.inf, truncated=True),
    score_of("b", "bert", "head", 0.5, 0.4, 2.5),
    score_of("b", "bert", "tail", math.nan, annotated=False),
]
ABOUT = About(
    title="Toy <run>",
    command="python recipes/x.py a&b",
    weights="matched: all\nmissing: none",
    data_overlap="Toy was seen in pretraining",
    parameters={"all": 1234567, "encoder": 234},
    steps=4000,
    seconds=3723.0,
    peak_memory_mb=1500,
    dataset={"name": "Toy", "note": "made of boxes", "reference": "Doe et al., 2020"},
    split="fold 0 of splits.json",
    citations=["Roe et al., 2021"],
    config={"lr": 0.001},
    provenance={"commit": "abc123", "processor": "abacus"},
)
RECORDS = [
    {"step": 1, "loss": 2.0, "lr": 1e-4, "images_per_s": 3.0},
    {"step": 2, "mean_dice": 0.5, "dice": {"head": 0.6, "tail": 0.4}},
]


class Page(HTMLParser):
    """Text, tables and all that a browser would load."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.words, self.rows = [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.loads += [value for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if data.strip():
            self.words.append(data.strip())
            if self.rows and self.lasttag in ("td", "small"):
                self.rows[-1].append(data.strip())


@pytest.fixture
def dataset(tmp_path, rng):
    """Two cases whose predictions lie in results/predictions."""
    label = np.zeros((12, 12, 12), np.uint8)
    label[3:9, 3:9, 2:5], label[3:9, 3:9, 5:10] = 1, 2
    for name in "ab":
        Volume(rng.normal(size=label.shape), np.eye(4)).save(tmp_path / f"image_{name}.nii.gz")
        Volume(label, np.eye(4)).save(tmp_path / f"label_{name}.nii.gz")
        Volume(label, np.eye(4)).save(tmp_path / f"results/predictions/{name}.nii.gz")
    cases = tuple(
        Case(n, (tmp_path / f"image_{n}.nii.gz",), tmp_path / f"label_{n}.nii.gz") for n in "ab"
    )
    return Dataset("Toy", tmp_path, dict(enumerate(("background", *CLASSES))), ("MRI",), cases)


@pytest.fixture
def result(tmp_path, dataset):
    """The folder of a result."""
    write_results(tmp_path / "results", SCORES, dataset, ABOUT, RECORDS)
    return tmp_path / "results"


def test_a_result_is_tables_pictures_and_a_page(result):
    kinds = {path.name for path in result.iterdir()}
    assert kinds >= {"scores.csv", "scores.json", "cases.png", "figure.png", "report.html"}
    written = json.loads((result / "scores.json").read_text())
    assert (written["mean_dice"], written["steps"]) == (0.7, 4000)


def test_the_page_loads_nothing_and_holds_its_pictures(result):
    page = Page(result / "report.html")
    assert {load.partition(":")[0] for load in page.loads if not load.startswith("#")} == {"data"}
    assert "@import" not in page.text
    assert "url(http" not in page.text
    picture = next(load for load in page.loads if load.startswith("data:image/png;base64,"))
    assert base64.b64decode(picture.partition(",")[2]) == (result / "cases.png").read_bytes()
    assert page.text.count("<svg") == 1


def test_all_that_a_reader_asks_for_is_there(result):
    words = "\n".join(Page(result / "report.html").words)
    for part in (
        "Toy <run>",
        "Toy was seen in pretraining",
        "made of boxes",
        "fold 0 of splits.json",
        "of 2 subjects",
        "mean NSD",
        "matched: all\nmissing: none",
        "all 1,234,567, encoder 234",
        "1:02:03",
        "3.00 crops per second",
        "within 2 mm of the other one",
        "1,500 MB",
        "python recipes/x.py a&b",
        "lr: 0.001",
        "abacus",
        "Doe et al., 2020",
        "Roe et al., 2021",
        "arXiv:2310.15161",
        "learning rate",
    ):
        assert part in words


def test_the_tables_tell_what_is_cut_off_unknown_or_missed(result):
    rows = {tuple(row[:2]): row for row in Page(result / "report.html").rows if row}
    assert rows["a", "0.800"] == ["a", "0.800", "0.700", "1.50", "0.900", "0.700†"]
    assert rows["b", "0.500"][-1] == "-"
    assert rows["tail", "1"][-1] == "1"  # found in only one of the two
    assert rows["tail", "0"][-1] == "0"  # cases inside their volume


def test_a_page_can_be_made_again_from_the_files(result):
    before = (result / "report.html").read_bytes()
    (result / "report.html").unlink()
    assert write_report(result, RECORDS) == result / "report.html"
    assert (result / "report.html").read_bytes() == before


def test_what_is_not_known_is_not_shown(tmp_path):
    write_scores(tmp_path, SCORES, CLASSES, {"title": "Bare", "of_a_newer_version": 1})
    page = Page(write_report(tmp_path))
    headings = [word for word in page.words if word in ("Cost", "Weights", "Data", "Training")]
    assert headings == []
    assert page.loads == []


def test_a_baseline_is_compared_case_by_case(result, tmp_path):
    worse = [replace(s, values=dict(s.values, dice=s["dice"] - 0.25)) for s in SCORES]
    write_scores(tmp_path / "baseline", worse, CLASSES, {})
    page = Page(write_report(result, baseline=tmp_path / "baseline/scores.csv"))
    assert "Against the baseline" in page.words
    gains = [row[2] for row in page.rows if row and row[0] in CLASSES and row[2].startswith("+")]
    assert gains == ["+0.250", "+0.250"]


def test_few_cases_fill_several_ranks(dataset, tmp_path):
    predictions = tmp_path / "results/predictions"
    titles = [shown.title for shown in shown_cases(SCORES, dataset, predictions)]
    assert titles == ["best: a\nDice 0.800", "median, worst: b\nDice 0.500"]
