"""The training loop: a step, the log, resuming."""

import numpy as np
import pytest
import torch

from sammed3d_backbone.training import engine, optim
from sammed3d_backbone.training.engine import Schedule


class Killed(Exception):
    """Stands for SIGKILL."""


def killed_after(toy, step):
    """Raises when the batch of this step is requested."""
    whole = toy.batch

    def batch(number):
        if number == step:
            raise Killed
        return whole(number)

    toy.batch = batch
    with pytest.raises(Killed):
        toy.go()


def equal(one, other):
    pairs = list(zip(one.state(), other.state(), strict=True))
    return all(torch.equal(a, b) for a, b in pairs) and one.log() == other.log()


@pytest.mark.parametrize("step", range(8))
def test_a_run_killed_at_any_step_ends_with_the_same_bits(toy, step):
    whole = toy("whole")
    whole.go()
    killed_after(toy("killed"), step)
    rest = toy("killed")
    assert rest.progress.step <= step
    rest.go()
    assert equal(rest, whole)
    assert rest.progress.best == whole.progress.best


def test_a_run_killed_many_times_ends_with_the_same_bits(toy):
    whole = toy("whole")
    whole.go()
    for step in (1, 3, 3, 5, 5, 7):
        killed_after(toy("killed"), step)
    rest = toy("killed")
    rest.go()
    assert equal(rest, whole)


def test_a_finished_run_has_nothing_left_to_do(toy):
    toy().go()
    again = toy()
    assert (again.resumed, again.progress.step) == (True, 8)
    again.go()
    assert len(again.run.records()) == 4 + 2


def test_the_log_has_a_line_per_window_and_one_per_validation(toy):
    run = toy()
    run.go()
    assert [record["step"] for record in run.run.records()] == [2, 4, 4, 6, 8, 8]
    first = run.run.records()[0]
    assert set(first) == {
        "step", "loss", "lr", "grad_norm", "images_per_s", "memory_gib", "seconds", "cpu_seconds",
    }  # fmt: skip
    assert first["lr"] == pytest.approx(1e-2 * optim.warmup_cosine(1, 8, 2))


def test_the_bar_shows_loss_dice_rate_speed_and_memory(toy):
    run = toy()
    run.progress.scored(0.75)
    run.go()
    record = [record for record in run.run.records() if "loss" in record][-1]
    shown = run.bar.postfix
    for part in (f"loss {record['loss']:.3f}", f"lr {record['lr']:.1e}", "images/s", "GiB"):
        assert part in shown
    assert "Dice 0.7" not in shown  # the last validation's


def test_the_bar_says_that_there_was_no_validation_yet(toy):
    run = toy()
    killed_after(run, 3)
    assert "Dice -" in run.bar.postfix


def test_the_peak_of_memory_outlives_a_resume(toy):
    first = toy()
    first.progress.peak_bytes = 2**50
    killed_after(first, 5)
    rest = toy()
    rest.go()
    assert rest.progress.peak_bytes == 2**50


def test_time_adds_up_over_resumes(toy):
    killed_after(toy(), 5)
    before = toy().progress.seconds
    rest = toy()
    rest.go()
    assert 0 < before < rest.progress.seconds


def test_no_checkpoint_is_written_before_the_clock_says_so(toy):
    run = toy(save_every_s=1e6)
    killed_after(run, 7)
    assert [path.name for path in run.run.checkpoints] == ["0000004"]  # after validation


def test_a_last_window_that_is_not_full_is_logged(toy):
    run = toy(steps=5, validate_every=10)
    run.go()
    assert [r["step"] for r in run.run.records() if "loss" in r] == [2, 4, 5]


def test_a_loss_that_is_not_finite_stops_the_run_with_the_remedy(toy):
    with pytest.raises(FloatingPointError, match="at step 4; lower lr="):
        toy(bad=2).go()


def test_the_gradient_that_the_optimiser_sees_is_clipped(toy):
    run = toy()
    run.step = lambda model, batch: model(batch["image"]).square().mean() * 1e6
    norms = []
    run.optimizer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item()
        )
    )
    run.go()
    assert run.run.records()[0]["grad_norm"] > 1e3  # the log says what it was before
    assert max(norms) == pytest.approx(1.0, rel=1e-4)


def test_the_average_follows_the_weights(toy):
    run = toy()
    run.go()
    assert not torch.equal(run.ema.module.layer.weight, run.model.layer.weight)
    assert not run.ema.module.training


def test_a_gradient_that_is_not_finite_stops_the_run_although_the_loss_is(toy):
    run = toy(log_every=1)
    run.step = lambda model, batch: (model(batch["image"]) * 0).sqrt().sum()
    with pytest.raises(FloatingPointError, match=r"loss is 0\.0 .*set mixed_precision=no"):
        run.go()


def test_another_number_of_processes_is_refused_with_the_launch_that_fits(toy):
    of_two = toy()
    of_two.progress.processes = 2
    killed_after(of_two, 5)
    with pytest.raises(ValueError, match="nproc_per_node 2"):
        toy()


def test_accumulated_shares_are_one_big_batch(toy):
    runs = {}
    for accumulate in (1, 3):
        runs[accumulate] = toy(f"in_{accumulate}", accumulate=accumulate)
        runs[accumulate].model.drop.p = 0.0  # its draws depend on the shape of a batch
        runs[accumulate].go()
    whole, shares = (
        [(r["loss"], r["grad_norm"], r["lr"]) for r in runs[n].run.records() if "loss" in r]
        for n in (1, 3)
    )
    assert np.allclose(whole, shares, rtol=1e-5)
    for a, b in zip(runs[1].state(), runs[3].state(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step", [1, 6])
def test_accumulation_killed_between_two_steps_ends_with_the_same_bits(toy, step):
    whole = toy("whole", accumulate=2)
    whole.go()
    killed_after(toy("killed", accumulate=2), step)
    rest = toy("killed", accumulate=2)
    rest.go()
    assert equal(rest, whole)


def test_every_share_of_a_step_draws_its_own_random_numbers(toy):
    seen = []
    run = toy(accumulate=2, steps=3)
    step = run.step
    run.step = lambda model, batch: (seen.append(torch.initial_seed()), step(model, batch))[1]
    run.go()
    assert len(set(seen)) == len(seen) == 6


def schedule(**changes):
    numbers = {"steps": 100, "validate_every": 10, "lr": 2.0, "warmup_steps": 4, "clip": 1.0}
    return Schedule(**numbers | {"log_every": 1, "save_every_s": 1.0, "seed": 0} | changes)


def test_the_rate_rises_and_falls():
    rates = [schedule().lr_at(step) for step in range(100)]
    assert rates == [2.0 * optim.warmup_cosine(step, 100, 4) for step in range(100)]


def test_a_warm_up_that_is_not_shorter_than_the_run_becomes_a_tenth_of_it(caplog):
    short = schedule(steps=20, warmup_steps=20)
    assert short.warmup_steps == 2
    assert "warmup_steps=20" in caplog.text
    assert max(short.lr_at(step) for step in range(20)) == 2.0
    assert schedule(steps=3, warmup_steps=50).warmup_steps == 0


def test_after_a_part_has_waited_all_start_from_low_again():
    rates = [schedule(freeze_steps=20).lr_at(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert set(rates[4:20]) == {2.0}
    assert rates[20:] == [2.0 * optim.warmup_cosine(step, 80, 4) for step in range(80)]


@pytest.mark.parametrize(("accumulate", "taken"), [(1, "2"), (2, "1"), (3, "1")])
def test_an_environment_that_wins_over_the_configuration_is_refused(monkeypatch, accumulate, taken):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", taken)
    with pytest.raises(ValueError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        engine.make_accelerator(accumulate=accumulate, mixed_precision="no", cpu=True)


def test_an_environment_that_says_the_same_is_fine(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    accelerator = engine.make_accelerator(accumulate=2, mixed_precision="no", cpu=True)
    assert accelerator.gradient_accumulation_steps == 2
