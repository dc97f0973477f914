"""Provenance of results."""

import os
import subprocess
import sys

import pytest

from sammed3d_backbone import provenance


def test_the_command_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/recipes/x.py", "c.yaml", "spacing_mm=[1, 1, 1]"])
    rest = "recipes/x.py c.yaml 'spacing_mm=[1, 1, 1]'"
    assert provenance.command_line(1) == f"python {rest}"
    assert provenance.command_line(2) == f"torchrun --nproc_per_node 2 {rest}"


def test_the_command_keeps_the_path_below_recipes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/recipes/studies/click_study.py", "--device=cpu"])
    assert provenance.command_line(1) == "python recipes/studies/click_study.py --device=cpu"


def test_cores_are_those_that_the_process_may_use():
    assert 1 <= provenance.cores() <= os.cpu_count()


@pytest.mark.parametrize(
    ("changed", "mark"), [("recipes/studies/results/table.md", ""), ("recipes/study.py", "-dirty")]
)
def test_changed_code_marks_the_commit_and_changed_results_do_not(tmp_path, changed, mark):
    def git(*words):
        author = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", "-C", tmp_path, *author, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet")
    for name in ("recipes/studies/results/table.md", "recipes/study.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    (tmp_path / changed).write_text("second")
    (tmp_path / "new.md").write_text("beside the checkout's own files")
    commit = provenance.provenance(tmp_path / "recipes")["commit"]
    assert commit == git("rev-parse", "--short=12", "HEAD") + mark


def test_results_of_no_checkout_say_so(tmp_path):
    assert provenance.provenance(tmp_path)["commit"] == "not a git checkout"
