"""Commands on fine-tuned networks: `sammed3d predict`, `push` and `export`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sammed3d_backbone.cli.checks import add_workers, on_device, require_free, require_unused
from sammed3d_backbone.cli.prompts import add_scan, dicom_options

if TYPE_CHECKING:
    from torch import nn

    from sammed3d_backbone.cli import Commands
    from sammed3d_backbone.inference.segmenter import Segmenter


def add_predict(commands: "Commands") -> None:
    """Declares `sammed3d predict`."""
    parser = commands.add_parser(
        "predict",
        help="segment a scan, or a folder of scans, with a fine-tuned model or several",
        description="The labels have the grid and the affine of the scan. Channels lie along a 4th "
        "axis. OUT ends in .nii.gz, .nii, .nrrd, .mha, or .dcm: a DICOM-SEG of the series SCAN. "
        "For a folder of scans (files, channels as ID_0000, ID_0001, ..., folders of DICOM) OUT is "
        "a folder that gets ID.nii.gz and manifest.json; an interrupted run is resumed.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="safetensors file of a run, folder of one model or of fold_0.safetensors, "
        "fold_1.safetensors, ..., which are averaged, or OWNER/NAME[@REVISION] on the Hub",
    )
    add_scan(parser)
    parser.add_argument("target", metavar="OUT", type=Path)
    parser.add_argument("--nearest", action="store_true", help="resample labels, not probabilities")
    parser.add_argument("--modality", choices=("ct", "mr", "us"), help="if the model knows several")
    parser.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    parser.add_argument(
        "--mirror", action="store_true", help="average with mirror images, along flip_axes"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bf16"),
        default="float32",
        help="bf16: faster on most GPUs and some CPUs, single voxels differ (default: float32)",
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="folders only: also write ID.npz, (K, X, Y, Z)"
    )
    parser.add_argument(
        "--force", "--overwrite", action="store_true", help="replace OUT, or results in it"
    )
    add_workers(parser, None, "folders only: processes that predict (default: 1); -1: all cores")
    parser.set_defaults(run=_run_predict)


def _run_predict(args: argparse.Namespace) -> int:
    from sammed3d_backbone.inference.folder import is_one_scan

    return _predict_one(args) if is_one_scan(args.source) else _predict_folder(args)


def _segmenter(args: argparse.Namespace) -> "Segmenter":
    """The model on its device."""
    from sammed3d_backbone.inference.segmenter import Segmenter

    segmenter = Segmenter.from_pretrained(args.model)
    on_device(segmenter.model, args.device)
    segmenter.precision = args.precision
    if args.mirror and not segmenter.flip_axes:
        print("--mirror changes nothing: this model was trained without flip_axes")
    return segmenter


def _predict_folder(args: argparse.Namespace) -> int:
    require_unused(args, ("series", "slice_tolerance"), f"{args.source} holds several scans")
    segmenter = _segmenter(args)
    entries = segmenter.predict_folder(
        args.source,
        args.target,
        modality=args.modality,
        nearest=args.nearest,
        mirror=args.mirror,
        probabilities=args.probabilities,
        overwrite=args.force,
        jobs=1 if args.jobs is None else args.jobs,
        backend=args.backend,
    )
    failed = [entry["id"] for entry in entries if entry["error"] is not None]
    print(f"{len(entries) - len(failed)} of {len(entries)} scans: {args.target / 'manifest.json'}")
    if failed:
        print(f"failed, see there: {', '.join(failed)}")
    return 1 if failed else 0


def _predict_one(args: argparse.Namespace) -> int:
    from sammed3d_backbone.data.formats import require_writable
    from sammed3d_backbone.data.volume import Volume

    unused = ("probabilities", "jobs", "backend")
    require_unused(args, unused, f"{args.source} is one scan, not a folder of scans")
    require_free((args.target,), (args.source, args.model), force=args.force)
    volume = Volume.load(args.source, **dicom_options(args))
    require_writable(args.target, volume.header)  # before minutes of work
    segmenter = _segmenter(args)
    labels = segmenter.predict(
        volume, modality=args.modality, nearest=args.nearest, mirror=args.mirror
    )
    labels.save(args.target, names=segmenter.card.labels, overwrite=args.force)
    for value, name in segmenter.card.labels.items():
        if value:
            voxels = int((labels.array == value).sum())
            print(f"{value} {name}: {voxels} voxels, {voxels * volume.voxel_ml:.2f} ml")
    print(args.target)
    return 0


def add_export(commands: "Commands") -> None:
    """Declares `sammed3d export`."""
    parser = commands.add_parser(
        "export",
        help="write a network as ONNX or as a program of torch.export, and check it",
        description=(
            "The file takes preprocessed windows, any number at once, and gives logits; of "
            "pretrained weights it is the encoder. Its metadata say what preprocessing it expects. "
            "It is run on random input, and refused if its numbers are not those of the network."
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="as for predict, or the name of weights")
    parser.add_argument("target", metavar="OUT", type=Path, help="OUT.onnx or OUT.pt2")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_run_export)


def _run_export(args: argparse.Namespace) -> int:
    import json

    from sammed3d_backbone import encoder
    from sammed3d_backbone.data.preprocessing import preprocessing_of
    from sammed3d_backbone.inference.export import export, require_export_name
    from sammed3d_backbone.inference.segmenter import Segmenter
    from sammed3d_backbone.loading.opening import CARD_KEY
    from sammed3d_backbone.loading.registry import WEIGHTS

    require_export_name(args.target)
    require_free((args.target,), (args.model,), force=args.force)
    network: nn.Module
    if args.model in WEIGHTS:
        network = backbone = encoder(str(WEIGHTS[args.model].variant), weights=args.model)
        shape, metadata = (1, *backbone.img_size), {}
        preprocessing = preprocessing_of(backbone)[0]
    else:
        segmenter = Segmenter.from_pretrained(args.model)
        card, network = segmenter.card, segmenter.model
        preprocessing = card.preprocessing
        shape = (len(card.channels), *preprocessing.crop_vox)
        metadata = {CARD_KEY: json.dumps(card.to_dict())}
    metadata["preprocessing"] = json.dumps(preprocessing.to_dict())
    difference = export(network, args.target, shape, metadata, overwrite=args.force)
    print(f"{args.target}: input (any, {', '.join(map(str, shape))}), float32")
    print(f"outputs differ from the network's by {difference:.1e} of the largest")
    return 0


def add_push(commands: "Commands") -> None:
    """Declares `sammed3d push`."""
    parser = commands.add_parser(
        "push",
        help="upload a fine-tuned model with a README to the Hub",
        description="Uploads model.safetensors, config.json and README.md in one commit.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="last.safetensors of a run")
    parser.add_argument("repo_id", metavar="REPO", help="OWNER/NAME; created if needed")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", help="commit message")
    parser.add_argument("--licence", help="licence identifier of the Hub, such as cc-by-sa-4.0")
    parser.add_argument(
        "--scores", type=Path, help="scores.json (default for last.safetensors: that of its run)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the README, upload nothing")
    parser.set_defaults(run=_run_push)


def _run_push(args: argparse.Namespace) -> int:
    import json

    from sammed3d_backbone.files import read_text, reading
    from sammed3d_backbone.inference.hub import model_card, require_repo_id
    from sammed3d_backbone.inference.segmenter import Segmenter

    require_repo_id(args.repo_id)
    if not args.model.exists():
        raise FileNotFoundError(f"no file at {args.model}; give last.safetensors of a run")
    segmenter = Segmenter.from_pretrained(args.model)
    path, scores = args.scores, None
    if path is None and args.model.name == "last.safetensors":
        own = args.model.parent / "results" / "scores.json"
        path = own if own.is_file() else None
    if path is not None:
        with reading(path):
            scores = json.loads(read_text(path))
    with reading(path or args.model):
        page = model_card(segmenter.card, args.repo_id, scores=scores, licence=args.licence)
    if args.dry_run:
        print(page)
        print(f"dry run: nothing uploaded to {args.repo_id}")
        return 0
    print(
        segmenter.push_to_hub(
            args.repo_id,
            private=args.private,
            message=args.message,
            licence=args.licence,
            scores=scores,
        )
    )
    print(f"sammed3d predict {args.repo_id} IN.nii.gz OUT.nii.gz")
    return 0
