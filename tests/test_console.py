"""Every exception of a program becomes one line and an exit code."""

import pytest

from sammed3d_backbone.console import run_program, shortened


def raising(error):
    def body():
        raise error

    return body


@pytest.mark.parametrize("error", [ValueError("a"), OSError("b"), KeyError("c"), RecursionError()])
def test_an_exception_is_one_line_and_exit_code_2(error, capsys):
    assert run_program(raising(error), "program") == 2
    said = capsys.readouterr().err
    assert said.startswith("program: error: ")
    assert said.count("\n") == 1


def test_an_unforeseen_exception_names_the_variable_that_shows_its_traceback(capsys, monkeypatch):
    run_program(raising(TypeError("two\nlines")), "program")
    assert "SAMMED3D_DEBUG" in capsys.readouterr().err
    monkeypatch.setenv("SAMMED3D_DEBUG", "1")
    with pytest.raises(TypeError):
        run_program(raising(TypeError()), "program")


def test_ctrl_c_is_one_line_and_exit_code_130(capsys):
    assert run_program(raising(KeyboardInterrupt()), "program") == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (1, 1), ({"dice": 1}, 0)])
def test_an_int_is_the_exit_code(returned, code):
    assert run_program(lambda: returned, "program") == code


def test_messages_are_cut():
    text = shortened("x" * 10**6 + "\n" + "line\n" * 1000)
    assert len(text) < 2000
    assert "more lines" in text


def test_a_lone_surrogate_can_be_said(capsys):
    assert run_program(raising(ValueError("\ud800")), "program") == 2
    assert "ud800" in capsys.readouterr().err
