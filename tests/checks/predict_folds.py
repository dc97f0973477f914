"""Prediction of a folder of 20 scans by five folds: Dice, time and memory; a kill; a damaged scan.

    python -m tests.checks.predict_folds FOLDER           # an empty folder; 15 minutes of one core

Trains five short folds on ten subjects of `hippocampus` by a plan, and predicts one scan of each
of 20 others, one of which is cut off in the middle of its file: by one fold and by all, with and
without mirroring. The last run is repeated, killed after seven scans, and started again; its files
have to be the same.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from sammed3d_backbone.data.datasets import with_subjects
from sammed3d_backbone.data.folders import open_dataset
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.scores import score_case, summarise_scores

SCANS, SUBJECTS, DAMAGED, KILLED_AFTER = 20, 10, 11, 7
CROP_VOX = 40  # less than the plan's, to be quick
COMMAND = (sys.executable, "-c", "import sammed3d_backbone.cli as c, sys; sys.exit(c.main())")
RUNS = {
    "one fold": ("fold_0", []),
    "one fold, mirrored": ("fold_0", ["--mirror"]),
    "five folds": ("ensemble", []),
    "five folds, mirrored": ("ensemble", ["--mirror"]),
}


def main() -> int:
    """Does everything, prints a table and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=120, help="of a fold")
    args = parser.parse_args()
    os.environ["SAMMED3D_RUNS"] = str(args.folder / "runs")
    subjects = Path(__file__).parents[2] / "recipes/configs/hippocampus_subjects.json"
    dataset = with_subjects(open_dataset("hippocampus"), subjects)
    scans = make_folders(args.folder, dataset)
    plan = args.folder / "toy.plan.yaml"
    if not plan.is_file():
        given = ("--memory", "4GB", "--precision", "no", "--steps", str(args.steps))
        command("plan", args.folder / "train", "--out", plan, *given)
    command("train", plan, "fold=all", f"crop_vox={CROP_VOX}")
    run = next((args.folder / "runs").iterdir())
    models = {"fold_0": run / "fold_0/last.safetensors", "ensemble": run / "ensemble"}
    print("| model | Dice of 19 scans | seconds a scan | peak MB | CPU s |\n|---|---|---|---|---|")
    for number, (name, (model, options)) in enumerate(RUNS.items()):
        target = args.folder / f"out_{number}"
        spent = command("predict", models[model], args.folder / "scans", target, *options, code=1)
        cases = require_one_failure(target)
        dice = summarise_scores(
            [
                score
                for case in scans
                if (path := target / f"{case.id}.nii.gz").is_file()
                for score in score_case(Volume.load(path), case, dataset)
            ],
            dataset.classes,
        )["mean_dice"]
        seconds = sum(case["seconds"] for case in cases) / len(cases)
        peak = max(case["peak_memory_mb"] for case in cases)
        print(f"| {name} | {dice:.4f} | {seconds:.2f} | {peak} | {spent:.0f} |", flush=True)
    return resumed(models[model], args.folder, target, options)


def make_folders(folder, dataset):
    """The data set to train on and the folder of scans; returns the cases of the scans."""
    by_subject = {case.subject: case for case in dataset.cases}
    names = sorted(by_subject)
    own, others = names[:SUBJECTS], [by_subject[name] for name in names[-SCANS:]]
    if (folder / "train").exists():
        return others
    entries = []
    for case in dataset.cases:
        if case.subject in own:
            entry = {"subject": case.subject}
            for key, path in (("image", case.images[0]), ("label", case.label)):
                entry[key] = f"{path.parent.name}/{path.name}"
                (folder / "train" / entry[key]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / "train" / entry[key])
            entries.append(entry)
    labels = {str(value): name for value, name in dataset.labels.items()}
    about = {"name": "toy", "modality": {"0": "MRI"}, "labels": labels, "training": entries}
    (folder / "train/dataset.json").write_text(json.dumps(about))
    (folder / "scans").mkdir()
    for number, case in enumerate(others):
        content = case.images[0].read_bytes()
        if number == DAMAGED:
            content = content[: len(content) // 2]
        (folder / "scans" / f"{case.id}.nii.gz").write_bytes(content)
    return others


def command(*arguments, code=0):
    """Runs a command of `sammed3d`; returns its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*COMMAND, *map(str, arguments)], check=False, capture_output=True)
    assert done.returncode == code, done.stderr.decode()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def require_one_failure(target):
    """The entries of the scans that were predicted; the damaged one has a line of its own."""
    cases = json.loads((target / "manifest.json").read_text())["cases"]
    assert [number for number, case in enumerate(cases) if case["error"]] == [DAMAGED]
    assert len(cases) == SCANS
    return [case for case in cases if case["error"] is None]


def resumed(model, folder, whole, options):
    """Kills a run, resumes it and compares it with a whole one; returns the exit code."""
    target = folder / "killed"
    arguments = [*COMMAND, "predict", str(model), str(folder / "scans"), str(target), *options]
    manifest = target / "manifest.json"
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while True:
            cases = json.loads(manifest.read_text())["cases"] if manifest.is_file() else []
            if len(cases) >= KILLED_AFTER:
                break
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in target.glob("*.nii.gz")}
    command(*arguments[len(COMMAND) :], code=1)
    require_one_failure(target)
    kept = sum(path.stat().st_mtime_ns == before for path, before in done.items())
    files = sorted(path.name for path in whole.glob("*.nii.gz"))
    same = [(target / name).read_bytes() == (whole / name).read_bytes() for name in files]
    print(f"killed after {len(cases)} scans, {kept} files kept; {sum(same)} of {len(same)} equal")
    return 0 if all(same) and kept >= KILLED_AFTER else 1


if __name__ == "__main__":
    sys.exit(main())
