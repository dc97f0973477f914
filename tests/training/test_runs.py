"""The folder of a run."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sammed3d_backbone.training import runs as runs_module
from sammed3d_backbone.training.runs import (
    AVERAGE,
    INDEX,
    MODEL,
    OPTIMIZER,
    Progress,
    Run,
    open_run,
)


@dataclass(frozen=True)
class Knobs:
    name: str = "run"
    lr: float = 1e-3


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMMED3D_RUNS", str(tmp_path))
    return tmp_path


def opened(name, cfg):
    """Opens and begins a run, as a recipe does."""
    run = open_run(name, cfg)
    with run.begun(cfg):
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


def test_the_newest_two_checkpoints_are_kept(toy):
    run = toy()
    run.go()
    assert [path.name for path in run.run.checkpoints] == ["0000006", "0000008"]


def test_a_kill_while_saving_leaves_the_checkpoint_before(toy, monkeypatch):
    run = toy()
    whole = runs_module.sync

    def die(path):
        whole(path)
        if path.name == "partial-0000006":
            raise KeyboardInterrupt

    monkeypatch.setattr(runs_module, "sync", die)
    with pytest.raises(KeyboardInterrupt):
        run.go()
    left = sorted(path.name for path in (run.run.folder / "checkpoints").iterdir())
    assert left == ["0000002", "0000004", "partial-0000006"]
    monkeypatch.undo()
    again = toy()
    assert again.progress.step == 4
    left = sorted(path.name for path in (again.run.folder / "checkpoints").iterdir())
    assert left == ["0000002", "0000004"]


def test_a_kill_inside_safetensors_leaves_nothing_in_the_way(toy, monkeypatch):
    run = toy()

    def die(tensors, path):
        if path.parent.name == "partial-0000006":
            (path.parent / ".tmpAbC123").write_bytes(b"half")  # as safetensors 0.7 names it
            raise KeyboardInterrupt
        save_file(tensors, path)

    monkeypatch.setattr(runs_module, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        run.go()
    monkeypatch.undo()
    again = toy()
    again.go()
    left = sorted(path.name for path in (again.run.folder / "checkpoints").iterdir())
    assert left == ["0000006", "0000008"]


DAMAGES = {
    "cut": lambda folder: cut(folder / MODEL),
    "empty": lambda folder: (folder / OPTIMIZER).write_bytes(b""),
    "missing": lambda folder: (folder / AVERAGE).unlink(),
    "wrong hash": lambda folder: flip(folder / MODEL),
    "index cut": lambda folder: cut(folder / INDEX),
    "index of another kind": lambda folder: (folder / INDEX).write_text("[]"),
    "no index": lambda folder: (folder / INDEX).unlink(),
    "a folder for a file": lambda folder: swap_for_folder(folder / OPTIMIZER),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap_for_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_line_and_the_one_before_is_used(
    toy, capsys, damage
):
    whole = toy("whole")
    whole.go()
    toy().go()
    folder = toy().run.folder / "checkpoints/0000008"
    DAMAGES[damage](folder)
    capsys.readouterr()
    again = toy()
    assert capsys.readouterr().out.count("0000008 is skipped") == 1
    assert again.progress.step == 6
    again.go()
    assert all(torch.equal(a, b) for a, b in zip(again.state(), whole.state(), strict=True))
    assert again.log() == whole.log()
    assert [path.name for path in again.run.checkpoints] == ["0000006", "0000008"]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(toy):
    run = toy()
    run.go()
    for folder in run.run.checkpoints:
        cut(folder / MODEL)
    log = run.run.log.read_text()
    for _ in range(2):
        with pytest.raises(ValueError, match="no checkpoint"):
            toy()
    assert run.run.log.read_text() == log


def test_stray_files_beside_the_checkpoints_are_left_with_a_line(toy, capsys):
    run = toy()
    run.go()
    folder = run.run.folder / "checkpoints"
    (folder / "5x").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "9").symlink_to(folder / "0000006")
    capsys.readouterr()
    assert toy().progress.step == 8
    said = capsys.readouterr().out
    assert all(f"{folder / name} is ignored" in said for name in ("5x", "notes.txt", "9"))
    assert {"5x", "notes.txt", "9"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "place", ["checkpoints/0000008/random_states_0.pkl", "optimizer.bin", "results/notes"]
)
def test_a_run_folder_with_a_pickle_is_refused_unopened(runs, place):
    folder = opened("one", Knobs()).folder
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Trap(runs / "executed")))
    with pytest.raises(ValueError, match=path.name):
        open_run("one", Knobs())
    assert not (runs / "executed").exists()


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_of_another_network_is_refused(toy):
    run = toy()
    run.go()
    run.model.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=MODEL):
        run.run.resume(run.accelerator, run.training)


def test_lines_of_the_log_that_are_damaged_are_left_out(toy):
    run = toy()
    run.go()
    records = run.run.records()
    with run.run.log.open("a") as log:
        log.write('{}\n[1]\n{"step": "x"}\n{"st\n')
    assert toy().run.records() == records


def test_a_log_without_checkpoint_starts_over(toy):
    run = toy()
    run.run.record(step=2, loss=1.0)
    assert not toy().resumed
    assert toy().run.records() == []


def test_one_of_several_processes_writes(runs):
    other = open_run("one", Knobs(), writes=False)
    with other.begun(Knobs()):
        pass
    other.record(step=1)
    assert list(runs.iterdir()) == []


def test_the_best_score_is_remembered_and_the_last_one_shown():
    progress = Progress()
    assert [progress.scored(dice) for dice in (0.5, 0.4, None, 0.6)] == [True, False, False, True]
    assert (progress.best, progress.dice) == (0.6, 0.6)


def test_a_validation_without_any_score_counts_as_zero():
    progress = Progress()
    assert [progress.scored(dice) for dice in (None, None, 0.1)] == [True, False, True]
