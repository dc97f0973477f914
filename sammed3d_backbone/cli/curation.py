"""Raw data sets -> clean binary masks: `sammed3d curate`."""

import argparse
import dataclasses
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from sammed3d_backbone.cli.checks import add_workers

if TYPE_CHECKING:
    from sammed3d_backbone.cli import Commands


def add_curate(commands: "Commands") -> None:
    """Declares `sammed3d curate`."""
    parser = commands.add_parser(
        "curate",
        help="clean the masks of raw data sets for training a promptable model",
        description="Writes one binary mask per case and class, cleaned as SA-Med3D-140K was, with "
        "a dataset.json that this package reads, decisions.jsonl, summary.json and report.html. "
        "The raw files stay as they are; an interrupted run is resumed.",
    )
    parser.add_argument(
        "raw",
        type=Path,
        metavar="RAW",
        help="a data set, or a folder of some: Decathlon, "
        "nnU-Net, BIDS (also BIDS/derivatives/NAME/'*_desc-manual_dseg.nii.gz'), labels.json, "
        "CLASS/MODALITY_DATASET/{imagesTr,labelsTr}",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder, or an interrupted run's")
    parser.add_argument(
        "--preset",
        default="default",
        help="default, paper (drops what is 99%% background), author-list (stricter on size)",
    )
    parser.add_argument(
        "--min-side-mm",
        type=float,
        metavar="MM",
        help="smallest side; the preset's 15 also drops cords, discs and other thin organs",
    )
    parser.add_argument(
        "--layout", type=Path, metavar="FILE.yaml", help="describes any other folder"
    )
    add_workers(parser)
    parser.set_defaults(run=_run_curate)


def _run_curate(args: argparse.Namespace) -> int:
    from sammed3d_backbone.curation.report import VERDICTS, write_curation_report
    from sammed3d_backbone.curation.rules import preset
    from sammed3d_backbone.curation.runs import curate
    from sammed3d_backbone.data.layouts import read_layout
    from sammed3d_backbone.provenance import provenance

    rules = preset(args.preset)
    if args.min_side_mm is not None:
        rules = dataclasses.replace(rules, min_side_mm=args.min_side_mm)
    layout = None if args.layout is None else read_layout(args.layout)
    raw_sets, decisions = curate(
        args.raw,
        args.out,
        rules,
        jobs=args.jobs,
        backend=args.backend or "loky",
        layout=layout,
    )
    command = ["sammed3d", "curate", args.raw, args.out, "--preset", args.preset]
    command += [] if args.min_side_mm is None else ["--min-side-mm", args.min_side_mm]
    command += [] if args.layout is None else ["--layout", args.layout]
    about = {
        "command": shlex.join(map(str, command)),
        "preset": args.preset,
        **provenance(Path(__file__).parent),
    }
    report = write_curation_report(args.out, raw_sets, decisions, rules, about)
    verdicts = Counter(decision["verdict"] for decision in decisions)
    shown = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS)
    print(f"{shown}; {verdicts['refused']} cases refused")
    print(report)
    return 0
