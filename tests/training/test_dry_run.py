"""The dry run."""

import time

import pytest
import torch

from sammed3d_backbone.training.dry_run import DryRun


@pytest.mark.parametrize(("steps", "measured"), [(1000, 3), (2, 2)])
def test_three_steps_are_measured_or_as_many_as_there_are(steps, measured):
    cost = DryRun(torch.device("cpu"), steps)
    while not cost.measured(time.monotonic()):
        pass
    assert len(cost.step_seconds) == measured
    assert f"{steps} steps" in str(cost)


def test_the_memory_is_what_the_steps_held_at_most():
    cost = DryRun(torch.device("cpu"), 2)
    torch.ones(2**26).sum()  # 256 MiB of float32
    cost.measured(time.monotonic())
    assert 0.9 * 2**28 < cost.figures()["peak_bytes"] < 2 * 2**28


def test_the_median_step_tells_the_time_of_the_whole_run(monkeypatch):
    cost = DryRun(torch.device("cpu"), 3600)
    cost.step_seconds, cost.peak_bytes = [9.0, 2.0, 2.0], 2**30
    assert "2:00:00" in str(cost)
    assert "1.00 GiB" in str(cost)
    cost.validated(lambda: time.sleep(0.1), 7200)
    assert 0.1 <= cost.figures()["case_seconds"] < 0.15
    assert "0:12:" in str(cost)
