"""What produced a figure."""

import os
import sys

from sammed3d_backbone import provenance


def test_the_command_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/recipes/x.py", "c.yaml", "spacing_mm=[1, 1, 1]"])
    rest = "recipes/x.py c.yaml 'spacing_mm=[1, 1, 1]'"
    assert provenance.command_line(1) == f"python {rest}"
    assert provenance.command_line(2) == f"torchrun --nproc_per_node 2 {rest}"


def test_cores_are_those_that_the_process_may_use():
    assert 1 <= provenance.cores() <= os.cpu_count()
