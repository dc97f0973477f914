"""The click benchmark: `sammed3d clicks`."""

import argparse
import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sammed3d_backbone.cli.checks import require_unused
from sammed3d_backbone.cli.prompts import add_network, chosen_network, variant_of_command

if TYPE_CHECKING:
    from sammed3d_backbone.cli import Commands
    from sammed3d_backbone.clickbench.protocol import PromptableModel

OF_RUNS = (
    *("layout", "subjects", "cases", "classes", "instances", "first", "out"),
    *("check_determinism", "model"),
)
OF_NETWORKS = ("variant", "weights", "random", "clicks", "no_follow")
METHODS = ("set_volume", "click", "predict", "reset")
CHECKED_TARGETS = 3  # number that --check-determinism plays again


def add_clicks(commands: "Commands") -> None:
    """Declares `sammed3d clicks`."""
    parser = commands.add_parser(
        "clicks",
        help="benchmark a promptable model, click by click",
        description="Plays a protocol on a data set and writes clicks.jsonl, times.jsonl, masks, "
        "summary.json and report.html. An interrupted run is resumed. With --compare: the "
        "difference of two runs on the same targets, with paired intervals.",
    )
    parser.add_argument(
        "data", nargs="?", metavar="DATASET", help="folder or name: Decathlon, nnU-Net, labels.json"
    )
    parser.add_argument("--protocol", default="clickbench/1", help="or a published one")
    parser.add_argument("--layout", type=Path, metavar="FILE.yaml", help="describes another folder")
    parser.add_argument("--subjects", type=Path, metavar="FILE.json", help="JSON: case -> subject")
    parser.add_argument("--cases", type=int, metavar="N", help="the first N cases only")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="these only")
    parser.add_argument(
        "--instances", action="store_true", help="every connected part is a target of its own"
    )
    parser.add_argument("--first", choices=["centre", "random"], help="this start only")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the results")
    parser.add_argument(
        "--check-determinism", action="store_true", help="play the first targets a second time"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="B minus A")
    add_network(parser)
    how = parser.add_argument_group("prediction")
    how.add_argument(
        "--clicks",
        choices=("newest", "all"),
        help="what every pass is given (default: as the weights were trained)",
    )
    how.add_argument("--no-follow", action="store_true", help="end objects with their window")
    how.add_argument(
        "--model",
        metavar="MODULE:NAME",
        help="another model: a class or function",
    )
    parser.set_defaults(run=_run_clicks)


def _run_clicks(args: argparse.Namespace) -> int:
    if args.compare:
        unused = (*OF_RUNS, *OF_NETWORKS)
        require_unused(args, unused, "--compare only reads what earlier runs wrote")
        if args.data is not None:
            raise ValueError(f"{args.data} is not played with --compare; leave out one of them")
        return _compare(*args.compare)
    if args.data is None:
        raise ValueError("no data set; name a folder, or two results with --compare")
    from sammed3d_backbone.clickbench.bench import first_difference, header_of, run_benchmark
    from sammed3d_backbone.clickbench.cases import read_click_set
    from sammed3d_backbone.clickbench.journal import Journal, read_journal
    from sammed3d_backbone.clickbench.presets import rules_of
    from sammed3d_backbone.clickbench.report import write_click_report
    from sammed3d_backbone.clickbench.summary import summarise_clicks
    from sammed3d_backbone.files import file_name, locked
    from sammed3d_backbone.provenance import provenance

    rules = rules_of(args.protocol)
    tracks = [track for track in rules.tracks if args.first in (None, track)]
    if not tracks:
        raise ValueError(
            f"{rules.name} has no start {args.first!r}; it has {', '.join(rules.tracks)}"
        )
    click_set = read_click_set(args.data, layout=args.layout, subjects=args.subjects)
    click_set = dataclasses.replace(
        click_set.selected(args.cases, args.classes),
        instances=args.instances,
        spacing_is_xyz=rules.spacing_is_xyz,
    )
    machine = provenance(Path(__file__).parent)
    model, about = _model(args, click_set.name)
    header = {
        **header_of(rules, click_set, tracks, classes=args.classes),
        **about,
        "subjects": "of the data set" if args.subjects is None else args.subjects.name,
        **{name: machine.pop(name) for name in ("commit", "python", "torch", "monai", "numpy")},
    }
    folder = args.out or Path(f"clicks-{file_name(click_set.name)}-{rules.name.replace('/', '-')}")
    with locked(folder):
        journal = Journal(folder, header, rules.steps)
        failed = run_benchmark(model, rules, click_set, journal, tracks)
        if not read_journal(folder)[1]:
            why = failed or "no label has a voxel"
            raise ValueError(f"no case of {click_set.name} could be played: {why}")
        report = write_click_report(folder, click_set, machine)
    for line in _main_figures(summarise_clicks(read_journal(folder)[1], rules.published)):
        print(line)
    print(report)
    if failed:
        listed = "".join(f"\n  {case}: {why}" for case, why in failed.items())
        raise ValueError(f"{report} lacks {len(failed)} cases:{listed}")
    if args.check_determinism:
        found = first_difference(model, rules, click_set, folder, CHECKED_TARGETS)
        print(f"played twice: {found or 'no difference'}")
        return int(bool(found))
    return 0


def _model(args: argparse.Namespace, dataset: str) -> "tuple[PromptableModel, dict[str, Any]]":
    """The model to be tested, and its entries of the header."""
    if args.model is None:
        return _predictor(args, dataset)
    require_unused(args, OF_NETWORKS, f"it is for the package's networks, not for {args.model}")
    module, _, name = args.model.partition(":")
    try:
        model: PromptableModel = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--model {args.model} cannot be made ({error}); give MODULE:NAME of a class or "
            "function that Python can import and that needs no arguments"
        ) from None
    if missing := [each for each in METHODS if not callable(getattr(model, each, None))]:
        raise ValueError(
            f"--model {args.model} is a {type(model).__name__} without {', '.join(missing)}; see "
            "clickbench.protocol.PromptableModel"
        )
    return model, {"model": args.model}


def _predictor(args: argparse.Namespace, dataset: str) -> "tuple[PromptableModel, dict[str, Any]]":
    """The package's own predictor with the chosen network."""
    import torch

    from sammed3d_backbone import sam
    from sammed3d_backbone.inference.interactive import Predictor
    from sammed3d_backbone.loading.checkpoint import content_sha256
    from sammed3d_backbone.loading.exposure import seen_in_pretraining

    torch.manual_seed(0)  # the same random initialisation every time
    network = chosen_network(sam, args)
    record = getattr(network, "pretrained_cfg", None)
    predictor = Predictor(network, clicks=args.clicks, follow=not args.no_follow)
    start = "random initialisation" if record is None else record.name
    return predictor, {
        "model": f"{variant_of_command(args)}, {start}",
        "weights_sha256": content_sha256(network.state_dict()),
        "clicks": predictor.clicks,
        "follow": not args.no_follow,
        "pretraining": str(seen_in_pretraining(record, dataset)),
    }


def _compare(one: Path, other: Path) -> int:
    """Prints the paired differences of two results."""
    from sammed3d_backbone.clickbench.journal import read_journal
    from sammed3d_backbone.clickbench.summary import compare_runs
    from sammed3d_backbone.files import reading

    (header, lines), (other_header, other_lines) = read_journal(one), read_journal(other)
    played, other_played = header.get("protocol"), other_header.get("protocol")
    if played != other_played:
        raise ValueError(
            f"{one} was played by {played}, {other} by {other_played}; compare runs of one protocol"
        )
    with reading(other):
        compared = compare_runs(lines, other_lines)
    print(f"{other} minus {one}, {played}")
    for track, found in compared.items():
        print(f"{track}: {found['targets']} common targets of {found['subjects']} subjects")
        for name, (mean, low, high) in found["difference"].items():
            interval = "no interval" if low is None else f"{low:+.4f} to {high:+.4f}"
            print(f"  {name:<20} " + ("-" if mean is None else f"{mean:+.4f} ({interval})"))
    return 0


def _main_figures(summary: Mapping[str, Any]) -> list[str]:
    """The main figures of every track."""
    from sammed3d_backbone.evaluation.statistics import Interval

    interval, printed = Interval.from_json, []
    for track, found in summary["tracks"].items():
        printed.append(f"{track}: {found['targets']} targets of {found['cases']} cases")
        for step in sorted({1, found["steps"]}):
            dice, nsd, hd95 = (
                found["curve"][name][step - 1] for name in ("dice", "nsd_2mm", "hd95_mm")
            )
            printed.append(
                f"  clicks {step}: Dice {interval(dice):.3f}, NSD {interval(nsd):.3f}, "
                f"HD95 {interval(hd95):.1f} mm"
            )
        printed += [
            f"  nAUC {interval(found['nauc']):.3f}",
            f"  clicks to Dice 0.9 {interval(found['noc90']['clicks']):.1f}, "
            f"{found['noc90']['failed']:.0%} never",
            f"  regret {interval(found['regret']):.3f}, agreement {found['agreement']:.1%}, "
            f"failures {found['failures']}",
            *(f"  {name}: {value:.4f}" for name, value in found.get("published", {}).items()),
        ]
    return printed
