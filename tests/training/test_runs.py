"""The folder of a run."""

from dataclasses import dataclass

import pytest

from sammed3d_backbone.training.runs import Progress, Run, open_run


@dataclass(frozen=True)
class Knobs:
    name: str = "run"
    lr: float = 1e-3


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMMED3D_RUNS", str(tmp_path))
    return tmp_path


def opened(name, cfg):
    """As a recipe does it: opened, and begun once the data are read."""
    run = open_run(name, cfg)
    run.begin(cfg)
    return run


def test_opening_a_run_writes_nothing(runs):
    open_run("one", Knobs())
    assert list(runs.iterdir()) == []


def test_a_run_lies_below_the_folder_of_runs_with_its_configuration(runs):
    run = opened("one", Knobs())
    assert run.folder == runs / "one"
    assert (run.folder / "config.yaml").read_text() == "name: run\nlr: 0.001\n"


@pytest.mark.parametrize("name", ["../one", "/tmp/one", "", "."])
def test_a_name_that_leaves_the_folder_of_runs_is_refused(name):
    with pytest.raises(ValueError, match="give the name of a folder"):
        open_run(name, Knobs())


def test_the_same_configuration_opens_it_again():
    assert opened("one", Knobs()).folder == opened("one", Knobs()).folder


def test_another_configuration_is_refused_and_names_what_differs():
    opened("one", Knobs())
    with pytest.raises(ValueError, match=r"lr \(0\.001 -> 0\.1\); pass another name="):
        open_run("one", Knobs(lr=0.1))


def test_keys_that_change_no_result_may_change():
    opened("one", Knobs())
    assert open_run("one", Knobs(lr=0.1), free=("lr",)).folder.name == "one"


def test_a_run_of_another_version_is_refused():
    run = opened("one", Knobs())
    (run.folder / "config.yaml").write_text("name: run\nold_knob: 3\n")
    with pytest.raises(ValueError, match=r"another version.*pass another name="):
        open_run("one", Knobs())


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    run = Run(tmp_path)
    assert run.records() == []
    run.record(step=1)
    with run.log.open("a") as log:
        log.write('{"step": 2')
    assert run.records() == [{"step": 1}]


def test_only_the_newest_checkpoint_is_kept(toy):
    run = toy()
    run.go()
    assert [path.name for path in run.run.checkpoints] == ["0000008"]


def test_a_kill_while_saving_leaves_the_checkpoint_before(toy, monkeypatch):
    run = toy()
    whole = type(run.accelerator).save_state

    def die(self, folder, **given):
        whole(self, folder, **given)
        if folder.endswith("6"):
            raise KeyboardInterrupt

    monkeypatch.setattr(type(run.accelerator), "save_state", die)
    with pytest.raises(KeyboardInterrupt):
        run.go()
    left = sorted(path.name for path in (run.run.folder / "checkpoints").iterdir())
    assert left == ["0000004", "partial-0000006"]
    monkeypatch.undo()
    again = toy()
    assert again.progress.step == 4
    assert sorted(path.name for path in (again.run.folder / "checkpoints").iterdir()) == ["0000004"]


def test_a_log_without_checkpoint_starts_over(toy):
    run = toy()
    run.run.record(step=2, loss=1.0)
    assert not toy().resumed
    assert toy().run.records() == []


def test_one_of_several_processes_writes(runs):
    other = open_run("one", Knobs(), writes=False)
    other.begin(Knobs())
    other.record(step=1)
    assert list(runs.iterdir()) == []


def test_the_best_score_is_remembered_and_the_last_one_shown():
    progress = Progress()
    assert [progress.scored(dice) for dice in (0.5, 0.4, None, 0.6)] == [True, False, False, True]
    assert (progress.best, progress.dice) == (0.6, 0.6)


def test_a_validation_without_any_score_counts_as_zero():
    progress = Progress()
    assert [progress.scored(dice) for dice in (None, None, 0.1)] == [True, False, True]
