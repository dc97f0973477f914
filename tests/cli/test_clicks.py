"""The click benchmark from a shell."""

import json

import pytest
from standins import Sphere, made_set

from sammed3d_backbone.cli import main

SMALL = ("--protocol", "slicewise-1", "--model", "standins:Sphere")


@pytest.fixture
def data(tmp_path):
    made_set(tmp_path / "made")
    return str(tmp_path / "made")


def clicks(*arguments):
    return main(["clicks", *map(str, arguments)])


def test_a_run_writes_everything_and_prints_the_main_figures(data, tmp_path, capsys):
    assert clicks(data, *SMALL, "--out", tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "clicks.jsonl",
        "times.jsonl",
        "masks",
        "summary.json",
        "worst.png",
        "report.html",
    }
    out = capsys.readouterr().out
    assert "random: 4 targets of 2 cases" in out
    assert "mean of best Dice" in out
    assert str(tmp_path / "out" / "report.html") in out


def test_the_header_says_what_the_lines_depend_on(data, tmp_path):
    clicks(data, *SMALL, "--classes", "block", "--cases", 1, "--out", tmp_path / "out")
    header = json.loads((tmp_path / "out" / "clicks.jsonl").read_text().splitlines()[0])
    assert header["protocol"] == "slicewise-1"
    assert header["oracle"].startswith("clicks in every slice")
    assert (header["cases"], header["classes"], header["starts"]) == (1, ["block"], ["random"])
    assert len(header["dataset_sha256"]) == 64
    assert header["model"] == "standins:Sphere"
    assert {"commit", "torch", "numpy"} <= header.keys()


def test_two_runs_give_identical_files(data, tmp_path):
    for name in ("a", "b"):
        clicks(data, *SMALL, "--out", tmp_path / name)
    a, b = ((tmp_path / name / "clicks.jsonl").read_bytes() for name in ("a", "b"))
    assert a == b


def test_a_run_that_repeats_itself_passes_the_check(data, tmp_path, capsys):
    assert clicks(data, *SMALL, "--out", tmp_path / "out", "--check-determinism") == 0
    assert "played twice: no difference" in capsys.readouterr().out


def test_a_run_that_does_not_fails_it(data, tmp_path, capsys, monkeypatch):
    def reset(self):
        self.clicks = []
        self.radius_mm += 0.5

    monkeypatch.setattr(Sphere, "reset", reset)
    assert clicks(data, *SMALL, "--out", tmp_path / "out", "--check-determinism") == 1
    assert "became" in capsys.readouterr().out


def test_our_own_predictor_is_tested_where_nothing_else_is_named(data, tmp_path, capsys):
    network = ("--variant", "tiny", "--random", "--no-follow", "--check-determinism")
    asked = ("--protocol", "sammed3d-main", "--classes", "block", "--cases", 1)
    assert clicks(data, *network, *asked, "--out", tmp_path / "out") == 0
    assert "played twice: no difference" in capsys.readouterr().out
    header, *lines = map(json.loads, (tmp_path / "out" / "clicks.jsonl").read_text().splitlines())
    assert header["model"] == "tiny, random initialisation"
    assert header["clicks"] == "newest"
    assert header["pretraining"].startswith("random initialisation")
    assert len(header["weights_sha256"]) == 64
    assert {line["failure"] for line in lines} == {""}
    (first, *_) = map(json.loads, (tmp_path / "out" / "times.jsonl").read_text().splitlines())
    assert {"set_volume", "click"} <= first["seconds"].keys()


def test_two_runs_are_compared_target_by_target(data, tmp_path, capsys, monkeypatch):
    clicks(data, *SMALL, "--out", tmp_path / "a")
    monkeypatch.setattr(Sphere.__init__, "__defaults__", (2.0,))
    clicks(data, *SMALL, "--out", tmp_path / "b")
    capsys.readouterr()
    assert clicks("--compare", tmp_path / "a", tmp_path / "b" / "clicks.jsonl") == 0
    out = capsys.readouterr().out
    assert "random: 4 common targets of 2 subjects" in out
    assert "dice, click 1        -0." in out


def test_runs_of_two_protocols_are_not_compared(data, tmp_path, capsys):
    clicks(data, *SMALL, "--out", tmp_path / "a")
    clicks(data, "--protocol", "slicewise-2", *SMALL[2:], "--out", tmp_path / "b")
    assert clicks("--compare", tmp_path / "a", tmp_path / "b") == 2
    assert "compare runs of one protocol" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ((), "name a folder, or two results with --compare"),
        (("DATA", *SMALL, "--cases", "0"), "cases"),
        (("DATA", "--weights", "nowhere"), "nowhere"),
        (("DATA", "--model", "nowhere:Sphere"), "that Python can import"),
        (("DATA", "--model", "standins:Cube"), "that Python can import"),
        (("DATA", "--model", "standins"), "that Python can import"),
        (("DATA", *SMALL, "--first", "centre"), "it has random"),
        (("DATA", "--protocol", "clickbench/9"), "choose clickbench/1"),
        (("DATA", *SMALL, "--classes", "liver"), "choose among block, dot"),
        (("nowhere", *SMALL), "no dataset.json"),
        (("--compare", "nowhere", "else"), "sammed3d clicks --out"),
    ],
)
def test_what_cannot_be_run_is_refused_with_what_to_do(
    data, tmp_path, monkeypatch, capsys, arguments, remedy
):
    monkeypatch.chdir(tmp_path)
    assert clicks(*(data if argument == "DATA" else argument for argument in arguments)) == 2
    assert remedy in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
