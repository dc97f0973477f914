"""Every exception of a program becomes one line and an exit code."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sammed3d_backbone.console import optional, run_program, shortened


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


def test_a_reader_that_leaves_costs_no_open_file(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        before = len([*Path("/dev/fd").iterdir()])
        assert run_program(lambda: print("text"), "program") == 0
        assert len([*Path("/dev/fd").iterdir()]) == before


def test_control_characters_of_a_name_do_not_reach_the_terminal(capsys):
    run_program(lambda: print("liver\x1b[2J\r\u202e", "\u00e9"), "program")
    assert capsys.readouterr().out == "liver\\x1b[2J\\r\\u202e \u00e9\n"


@pytest.mark.parametrize("name", ["na\u00efve", "\ud800"])
def test_a_name_that_the_terminal_cannot_show_does_not_end_a_program(monkeypatch, name):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert run_program(lambda: print(name), "program") == 0


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\x9b", "\r"])
def test_messages_do_not_command_the_terminal(character, capsys):
    run_program(raising(ValueError(f"a{character}[2Jb")), "program")
    assert character not in capsys.readouterr().err


def test_an_output_that_only_accompanies_a_result_costs_a_warning(caplog):
    with caplog.at_level(logging.WARNING), optional("figure.png"):
        raise IndexError("of a library")
    assert "figure.png" in caplog.text
    with pytest.raises(KeyboardInterrupt), optional("figure.png"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("target", "code", "said"), [("| true", 0, ""), ("> /dev/full", 2, "space")]
)
def test_output_that_nobody_takes_ends_no_program_with_a_traceback(target, code, said, root):
    program = (
        "import sys; from sammed3d_backbone.console import run_program; "
        "sys.exit(run_program(lambda: [print('x' * 99) for _ in range(999)], 'program'))"
    )
    call = f'{sys.executable} -c "{program}" {target}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", call], capture_output=True, text=True, cwd=root)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("\n") <= 1
