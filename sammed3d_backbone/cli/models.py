"""Commands on fine-tuned networks: `sammed3d predict` and `push`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sammed3d_backbone.cli.checks import on_device, require_free

if TYPE_CHECKING:
    from sammed3d_backbone.cli import Commands


def add_predict(commands: "Commands") -> None:
    """Declares `sammed3d predict`."""
    parser = commands.add_parser(
        "predict",
        help="segment a NIfTI volume with a fine-tuned model",
        description="The labels lie on the volume's own grid, with its affine.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="last.safetensors of a run, or repo_id:file on the Hub"
    )
    parser.add_argument("source", metavar="IN.nii.gz", type=Path, help="channels as 4th axis")
    parser.add_argument("target", metavar="OUT.nii.gz", type=Path)
    parser.add_argument("--nearest", action="store_true", help="resample labels, not probabilities")
    parser.add_argument("--device", default="cpu", help="such as cuda; cpu when left out")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_run_predict)


def _run_predict(args: argparse.Namespace) -> int:
    from sammed3d_backbone.data.volume import Volume, require_nifti_name
    from sammed3d_backbone.inference.segmenter import load_model, segment_volume

    require_nifti_name(args.target)  # before minutes of work
    require_free((args.target,), args.source, force=args.force)
    segmenter = load_model(args.model)
    on_device(segmenter.model, args.device)
    volume = Volume.load(args.source)
    labels = segment_volume(segmenter, volume, nearest=args.nearest)
    labels.save(args.target)
    for value, name in segmenter.card.labels.items():
        if value:
            voxels = int((labels.array == value).sum())
            print(f"{value} {name}: {voxels} voxels, {voxels * volume.voxel_ml:.2f} ml")
    print(args.target)
    return 0


def add_push(commands: "Commands") -> None:
    """Declares `sammed3d push`."""
    parser = commands.add_parser(
        "push",
        help="upload a fine-tuned model with a page about it to the Hub",
        description="Sends the model and a README.md made from its card, in one commit.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="last.safetensors of a run")
    parser.add_argument("repo_id", metavar="REPO", help="OWNER/NAME; made if there is none")
    parser.add_argument("--private", action="store_true", help="hide a new repository")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--licence", help="of the model, by the Hub's name: cc-by-sa-4.0, ...")
    parser.add_argument(
        "--scores", type=Path, help="scores.json; of last.safetensors it is the run's own"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the page and send nothing")
    parser.set_defaults(run=_run_push)


def _run_push(args: argparse.Namespace) -> int:
    import json

    from sammed3d_backbone.inference.hub import model_page, push_model, require_repo_id
    from sammed3d_backbone.inference.segmenter import load_model

    require_repo_id(args.repo_id)
    if not args.model.is_file():
        raise FileNotFoundError(f"no file at {args.model}; give last.safetensors of a run")
    card = load_model(args.model).card  # also proves that others will be able to load it
    path, scores = args.scores, None
    if path is None and args.model.name == "last.safetensors":
        own = args.model.parent / "results" / "scores.json"
        path = own if own.is_file() else None
    if path is not None:
        scores = json.loads(path.read_text(encoding="utf-8"))
    address = f"{args.repo_id}:{args.model.name}"
    page = model_page(card, address, scores=scores, licence=args.licence)
    if args.dry_run:
        print(page)
        size_mb = args.model.stat().st_size / 1e6
        print(f"not sent: {args.model.name} ({size_mb:.1f} MB) and README.md, to {args.repo_id}")
        return 0
    print(push_model(args.model, args.repo_id, page, private=args.private, message=args.message))
    print(f"sammed3d predict {address} IN.nii.gz OUT.nii.gz")
    return 0
