"""What a run will cost, told by its first steps."""

from itertools import count

import pytest
from accelerate.state import AcceleratorState

from sammed3d_backbone.training.dry_run import Rehearsal, rehearse
from sammed3d_backbone.training.memory import Memory


@pytest.fixture
def rehearsed(toy):
    """A toy, and what its rehearsal found."""
    AcceleratorState._reset_state()

    def run(**changes):
        it = toy(**changes)
        batches = (share for n in count() for share in it.batches(n, n + 1))
        found = rehearse(
            it.accelerator, it.step, it.model, batches, it.optimizer, it.ema, it.schedule
        )
        return it, found

    return run


@pytest.mark.parametrize(("steps", "measured"), [(8, 3), (2, 2)])
def test_three_steps_are_measured_or_all_if_there_are_fewer(rehearsed, steps, measured):
    _, found = rehearsed(steps=steps)
    assert len(found.step_seconds) == measured
    assert found.steps == steps


def test_nothing_is_written_although_every_step_would_be_logged_and_saved(rehearsed):
    it, _ = rehearsed(log_every=1, save_every_s=0.0)
    assert it.run.records() == []
    assert it.run.checkpoints == []


def test_a_step_is_done_with_all_its_shares(rehearsed):
    it, _ = rehearsed(accumulate=2)
    assert {int(state["step"]) for state in it.optimizer.state.values()} == {3}


def test_memory_is_calculated_and_measured(rehearsed):
    it, found = rehearsed()
    weights = sum(p.numel() * 4 for p in it.model.parameters())
    assert found.expected.parts["weights"] == weights
    assert found.peak_bytes >= 2 * weights


def test_two_lines_tell_the_whole_time_from_the_median_step():
    found = Rehearsal(Memory("cpu", {"weights": 2**30}), 2**30, (9.0, 2.0, 1.0), 1800)
    memory, time = str(found).splitlines()
    assert memory.startswith("memory: 1.10 GiB on cpu")
    assert memory.endswith("in 3 steps it was 1.00 GiB")
    assert time == (
        "time: 1:00:00 for 1800 steps, validation left out (measured: 9.00, 2.00, 1.00 s a step)"
    )


def test_the_figures_are_plain_values():
    found = Rehearsal(Memory("cpu", {"weights": 100}), 120, (1.0,), 3)
    assert found.figures() == {
        "expected_bytes": 110,
        "expected_parts_bytes": {"weights": 100},
        "peak_bytes": 120,
        "step_seconds": [1.0],
    }
