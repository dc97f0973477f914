"""Bad inputs are refused in the committed words, and leave nothing behind."""

import logging

import bad_inputs
import pytest


@pytest.fixture(scope="module")
def committed(pytestconfig):
    """The lines of the committed table."""
    path = pytestconfig.rootpath / "tests/checks/results/bad_inputs.md"
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("row", bad_inputs.ROWS, ids=lambda row: row.given.replace(" ", "_"))
def test_a_bad_input_is_refused_in_the_committed_words_and_leaves_nothing(
    row, committed, tmp_path, monkeypatch
):
    monkeypatch.setattr(logging.root, "handlers", [])  # the command line's own
    found = bad_inputs.outcome(row, tmp_path)
    assert found.left == ()
    assert bad_inputs.line(row, found) in committed


def test_the_table_has_a_line_for_each_of_many_inputs(committed):
    lines = [text for text in committed if text.startswith("| ")][1:]
    assert len(lines) == len(bad_inputs.ROWS) == len({row.given for row in bad_inputs.ROWS})
    assert len(lines) >= 25


def test_what_is_left_is_told():
    row = bad_inputs.ROWS[0]
    found = bad_inputs.Outcome("a | b\n  c", ("runs/toy/log",))
    assert bad_inputs.line(row, found) == f"| {row.given} | a \\| b<br>c | runs/toy/log |"


def test_an_input_that_is_taken_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(bad_inputs.COMMANDS, "finetune", lambda *_: None)
    with pytest.raises(RuntimeError, match="nothing: is taken without a word"):
        bad_inputs.outcome(bad_inputs.Row("nothing", lambda _: None), tmp_path)
