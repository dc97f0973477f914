"""From a folder to a trained network: `sammed3d plan`, `sammed3d train` and `sammed3d recipe`."""

import argparse
import contextlib
import importlib
import io
import re
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sammed3d_backbone.cli.checks import (
    add_workers,
    positive,
    positive_int,
    require_free,
    require_unused,
)

if TYPE_CHECKING:
    from sammed3d_backbone.cli import Commands
    from sammed3d_backbone.data.datasets import Dataset, Fold
    from sammed3d_backbone.planning.fingerprint import Fingerprint

RECIPES = "sammed3d_backbone.recipes"
RECIPE = f"{RECIPES}.finetune_unetr"
PLAN_SUFFIX = ".plan.yaml"
GIB = {"": 1.0, "g": 1.0, "gb": 1.0, "gib": 1.0, "m": 2**-10, "mb": 2**-10, "mib": 2**-10}
OF_PLANS = (
    *("layout", "subjects", "modality", "variant", "memory"),
    *("precision", "steps", "hours", "jobs", "backend", "force"),
)
SPENT_SHARE = 0.95  # of the time; the rest is for reading, checkpoints and pages
MIN_STEPS = 10


def add_plan(commands: "Commands") -> None:
    """Declares `sammed3d plan`."""
    parser = commands.add_parser(
        "plan",
        help="look at a folder of labelled scans and write a configuration that trains on it",
        description="Writes a commented NAME.plan.yaml for `sammed3d train`, and NAME.plan.html "
        "with histograms, slices and what is suspicious. The folder stays as it is.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="Decathlon, nnU-Net or BIDS")
    parser.add_argument("--out", type=Path, metavar="PLAN.yaml", help="default: NAME.plan.yaml")
    _add_choices(parser)
    parser.set_defaults(run=_run_plan)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout", type=Path, metavar="FILE.yaml", help="describes any other folder"
    )
    parser.add_argument("--subjects", type=Path, metavar="FILE.json", help="case -> subject")
    parser.add_argument("--modality", choices=("ct", "mr", "us"), help="needed if it is unclear")
    parser.add_argument(
        "--variant", choices=("tiny", "vit_b"), help="default: tiny; vit_b: a GPU, 402 MB download"
    )
    parser.add_argument("--memory", type=_gib, metavar="12GB", help="default: what is free here")
    parser.add_argument("--precision", choices=("no", "bf16"), help="default: bf16 on a GPU")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=positive_int, metavar="N", help="default: by number of subjects"
    )
    length.add_argument(
        "--hours", type=_hours, metavar="H", help="for a fold: steps by the speed measured here"
    )
    add_workers(parser, None, "threads that read; default: cores")
    parser.add_argument("--force", action="store_true", help="replace an earlier plan and page")


def _gib(text: str) -> float:
    """``12GB`` -> 12.0."""
    match = re.fullmatch(r"([\d.]+)\s*([a-z]*)", text.lower())
    if match is None or match[2] not in GIB:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 12GB or 800MB")
    return positive(match[1]) * GIB[match[2]]


def _hours(text: str) -> float:
    if not 0 < (hours := float(text)) < 1e5:
        raise argparse.ArgumentTypeError(f"{text} hours; give a positive number")
    return hours


def _run_plan(args: argparse.Namespace) -> int:
    plan = _write_plan(args, args.folder, args.out)
    print(f"{plan} and {plan.with_suffix('.html')}\ntrain: sammed3d train {plan}")
    return 0


def _write_plan(args: argparse.Namespace, folder: str, out: Path | None) -> Path:
    """Plans for a folder; prints what is suspicious."""
    from sammed3d_backbone.data.datasets import with_subjects
    from sammed3d_backbone.data.folders import find_dataset, read_dataset
    from sammed3d_backbone.data.layouts import read_layout
    from sammed3d_backbone.files import file_name, write_text
    from sammed3d_backbone.parallel import workers
    from sammed3d_backbone.planning.findings import find_suspicious
    from sammed3d_backbone.planning.fingerprint import fingerprint
    from sammed3d_backbone.planning.page import write_plan_page
    from sammed3d_backbone.planning.rules import Choice, from_data, from_machine
    from sammed3d_backbone.planning.writer import plan_text
    from sammed3d_backbone.provenance import cores
    from sammed3d_backbone.training.dry_run import free_gib

    layout = None if args.layout is None else read_layout(args.layout)
    place = find_dataset(folder, layout).resolve()
    dataset = read_dataset(place, layout)
    if args.subjects is not None:
        dataset = with_subjects(dataset, args.subjects)
    path = out or Path(f"{file_name(dataset.name)}{PLAN_SUFFIX}")
    if path.resolve().is_relative_to(place):
        raise ValueError(f"--out {path} lies in the folder that is only read; choose another")
    page = path.with_suffix(".html")
    require_free((path, page), (place,), force=args.force)
    jobs = cores() if args.jobs is None else args.jobs
    with workers(args.backend, jobs):
        found = fingerprint(dataset, jobs=jobs)
    subjects = len({case.subject for case in dataset.cases})
    folds = max(2, min(5, subjects))
    findings = find_suspicious(found, folds)
    data = from_data(found, args.variant or "tiny", args.modality, folds)
    files = [
        Choice("name", file_name(dataset.name), "folder of the run below SAMMED3D_RUNS"),
        Choice("data", str(place), "the folder"),
        Choice(
            "layout",
            args.layout and str(args.layout.resolve()),
            f"{'as' if args.layout else 'not'} given; null: the folder describes itself",
        ),
        Choice(
            "subjects",
            args.subjects and str(args.subjects.resolve()),
            f"{'as' if args.subjects else 'not'} given; null: a case's subject is what its folder "
            "names, or the case itself",
        ),
    ]
    memory, has_gpu = free_gib()
    memory = args.memory or memory
    precision = args.precision or ("bf16" if has_gpu else "no")

    machine = from_machine(found, data, memory, args.steps, precision)
    if args.hours is not None:
        draft = plan_text(path.name, found, findings, data, [*files, *machine])
        steps, why = _steps_in(draft, args.hours, found, folds)
        machine = from_machine(found, data, memory, steps, precision, why)
    text = plan_text(path.name, found, findings, data, [*files, *machine])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text, overwrite=args.force)
    write_plan_page(page, found, findings, [*data, *machine])
    for finding in findings:
        print(f"check: {finding}")
    if has_gpu and args.variant is None:
        print("with this GPU, --variant vit_b plans for the released weights (402 MB)")
    return path


def _steps_in(plan: str, hours: float, found: "Fingerprint", folds: int) -> tuple[int, str]:
    """The number of steps that some hours have time for, and the measurement behind it.

    Steps and validation of the plan are measured on one case of medium size.

    Raises:
        ValueError: If there is time for hardly any step.
    """
    from dataclasses import replace

    from sammed3d_backbone import config
    from sammed3d_backbone.data.datasets import read_fold
    from sammed3d_backbone.planning.rules import STOPS

    recipe: Any = importlib.import_module(RECIPE)
    labelled = [case for case in found.cases if case.structures]
    ranked = sorted(labelled, key=lambda c: c.shape[0] * c.shape[1] * c.shape[2])
    middle = (ranked[len(ranked) // 2].case.id,)

    def draw(_: "Dataset", fold: "Fold") -> "Fold":
        return replace(fold, train=middle, val=middle)

    print("--hours: measuring the speed of this plan")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "draft.yaml"
        path.write_text(plan, encoding="utf-8")
        cost = recipe.main(config.load(recipe.Config, path), dry_run=True, draw=draw)
    step, case = statistics.median(cost["step_seconds"]), cost["case_seconds"]
    # The report reads, resamples and measures a case, which takes about as long as its validation.
    scored = (STOPS + 2) * len(read_fold(found.dataset, 0, folds=folds).val) * case
    steps = int((SPENT_SHARE * hours * 3600 - scored) / step)
    speed = f"{step:.2f} s a step and {case:.2f} s to validate a case, measured on this machine"
    if steps < MIN_STEPS:
        raise ValueError(
            f"--hours {hours:g}: {speed}, which leaves time for {max(0, steps)} steps; give more "
            f"than {(scored + MIN_STEPS * step) / SPENT_SHARE / 3600:.2g}, or --steps"
        )
    return steps, f"what {hours:g} hours for a fold have time for: {speed}"


def add_train(commands: "Commands") -> None:
    """Declares `sammed3d train`."""
    parser = commands.add_parser(
        "train",
        help="train by a plan, or by a folder, which is planned for first",
        description="Runs the recipe finetune_unetr; the same command resumes an interrupted run. "
        f"For several processes: accelerate launch -m {RECIPE} PLAN.yaml",
    )
    parser.add_argument("plan", metavar="PLAN.yaml|FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the plan")
    parser.add_argument("--dry-run", action="store_true", help="measure the cost, write nothing")
    _add_choices(parser)
    parser.set_defaults(run=_run_train)


def _run_train(args: argparse.Namespace) -> int:
    from sammed3d_backbone import config

    plan = Path(args.plan)
    if plan.suffix in (".yaml", ".yml"):
        reason = f"{plan} is a plan already; give key=value, or plan again: sammed3d plan FOLDER"
        require_unused(args, OF_PLANS, reason)
    else:
        print(f"{plan} is not a plan: planning first")
        plan = _write_plan(args, args.plan, None)
        print(f"training by {plan}; for another plan: sammed3d plan")
    recipe: Any = importlib.import_module(RECIPE)
    cfg = config.load(recipe.Config, plan, args.overrides)
    print(f"several processes: accelerate launch -m {RECIPE} {plan} {' '.join(args.overrides)}")
    recipe.train(cfg, dry_run=args.dry_run)
    return 0


def add_recipe(commands: "Commands") -> None:
    """Declares `sammed3d recipe copy`."""
    parser = commands.add_parser("recipe", help="copy a recipe here, to change it")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    copy = actions.add_parser("copy", help="write a recipe into this folder")
    copy.add_argument("name", metavar="NAME", help="such as finetune_unetr")
    copy.set_defaults(run=_run_copy)


def _run_copy(args: argparse.Namespace) -> int:
    from sammed3d_backbone.files import copy_file

    folder = Path(str(importlib.import_module(RECIPES).__file__)).parent
    known = {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}
    if args.name not in known:
        raise ValueError(f"no recipe {args.name!r}; there are {', '.join(known)}")
    target = Path(known[args.name].name)
    if target.exists():
        raise FileExistsError(f"{target} exists; move it away, or copy into another folder")
    copy_file(known[args.name], target, overwrite=False)
    print(f"{target}\nrun: python {target} PLAN.yaml")
    return 0
