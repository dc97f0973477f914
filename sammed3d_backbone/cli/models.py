"""Commands on fine-tuned networks: `sammed3d predict`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

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
    import numpy as np

    from sammed3d_backbone.data.volume import Volume, require_nifti_name
    from sammed3d_backbone.export import load_model, segment_volume

    require_nifti_name(args.target)  # before minutes of work
    if args.target.exists() and (not args.force or args.target.samefile(args.source)):
        raise FileExistsError(
            f"{args.target} exists; choose another name, or pass --force if it is not IN itself"
        )
    segmenter = load_model(args.model)
    try:
        segmenter.model.to(args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device} cannot be used ({reason}); try cpu") from None
    volume = Volume.load(args.source)
    labels = segment_volume(segmenter, volume, nearest=args.nearest)
    labels.save(args.target)
    voxel_ml = abs(np.linalg.det(volume.affine[:3, :3])) / 1000  # axes may be sheared
    for value, name in segmenter.card.labels.items():
        if value:
            voxels = int((labels.array == value).sum())
            print(f"{value} {name}: {voxels} voxels, {voxels * voxel_ml:.2f} ml")
    print(args.target)
    return 0
