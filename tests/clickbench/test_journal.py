"""Interrupted runs are resumed; results are read back."""

import json
import shutil

import pytest
from standins import Sphere, played_into

from sammed3d_backbone.clickbench.journal import Journal, mask_path, read_journal, read_times


def text(folder):
    return (folder / "clicks.jsonl").read_text()


@pytest.mark.parametrize("cut", [0, 1, 40, 0.5, 0.99])
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(finished, tmp_path, cut):
    data, whole = finished
    shutil.copytree(whole, tmp_path / "cut")
    size = cut if isinstance(cut, int) else int(cut * len(text(whole)))
    (tmp_path / "cut" / "clicks.jsonl").write_text(text(whole)[:size])
    again = played_into(tmp_path / "cut", Sphere(4.0), data)
    assert text(again) == text(whole)
    assert len(read_times(again)) == len(read_times(whole))


def test_a_complete_run_asks_nothing_more(finished):
    data, out = finished
    model = Sphere(4.0)
    played_into(out, model, data)
    assert model.volumes == 0


def test_a_folder_of_another_run_is_refused(finished):
    data, out = finished
    with pytest.raises(ValueError, match=r"weights \(None -> 'b'\); choose another"):
        played_into(out, Sphere(4.0), data, weights="b")


def test_results_are_read_from_the_folder_or_the_file(finished):
    _, out = finished
    assert read_journal(out) == read_journal(out / "clicks.jsonl")


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="sammed3d clicks --out"):
        read_journal(tmp_path)


@pytest.mark.parametrize("content", ["", '{"format": 99}\n'])
def test_a_file_without_our_header_is_refused(tmp_path, content):
    (tmp_path / "clicks.jsonl").write_text(content)
    with pytest.raises(ValueError, match="run the benchmark again"):
        read_journal(tmp_path)


def test_lines_are_json_without_nan(finished):
    for line in text(finished[1]).splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_classes_never_share_a_mask(tmp_path):
    line = {"case": "case 1", "first": "centre"}
    names = ("a/b", "a_b", "a b", "../b", "left kidney (cyst)")
    paths = [mask_path(tmp_path, {**line, "class": name}) for name in names]
    assert len({*paths}) == len(names)
    assert {path.parent for path in paths} == {tmp_path / "masks/case 1"}
    with pytest.raises(ValueError, match="name"):
        mask_path(tmp_path, {**line, "case": "../case", "class": "a"})


@pytest.mark.parametrize("line", ["x\n", "[]\n", "{}\n", '{"case": 1}\n'])
@pytest.mark.parametrize("name", ["clicks.jsonl", "times.jsonl"])
def test_a_damaged_file_is_named_when_a_run_is_resumed(finished, tmp_path, name, line):
    out = shutil.copytree(finished[1], tmp_path / "out")
    header, _ = read_journal(out)
    with (out / name).open("a") as file:
        file.write(line)
    before = (out / name).read_text()
    with pytest.raises(ValueError, match=name):
        Journal(out, header, 10)
    assert (out / name).read_text() == before
