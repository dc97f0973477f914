"""Commands on the promptable model: `sammed3d segment` and `features`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sammed3d_backbone.cli.checks import on_device, opened, require_free

if TYPE_CHECKING:
    from sammed3d_backbone.cli import Commands
    from sammed3d_backbone.data.geometry import TripleMm
    from sammed3d_backbone.data.volume import Volume
    from sammed3d_backbone.inference.interactive import Prediction, Predictor
    from sammed3d_backbone.inference.interactive.merging import Labels
    from sammed3d_backbone.models.image_encoder import ImageEncoder3D

OBJECT = "object"  # what is clicked where --object names nothing
RANDOM = "the weights are random, so the masks mean nothing"


# --- segment -----------------------------------------------------------------------------------


def add_segment(commands: "Commands") -> None:
    """Declares `sammed3d segment`."""
    parser = commands.add_parser(
        "segment",
        help="segment what was clicked in a NIfTI volume",
        description=(
            "The labels lie on the volume's own grid, with its affine; objects are numbered in "
            "their order. Write --point=-31,12,40 where the first number is negative."
        ),
    )
    _add_files(parser, "OUT.nii.gz")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--point", type=_point, action=_Prompt, metavar="I,J,K", help="a voxel inside the object"
    )
    prompts.add_argument(
        "--negative", type=_point, action=_Prompt, metavar="I,J,K", help="a voxel outside it"
    )
    prompts.add_argument(
        "--object", action=_Prompt, metavar="NAME", help="whom the following points belong to"
    )
    prompts.add_argument("--mm", action="store_true", help="points are x,y,z in RAS+ mm")
    prompts.add_argument("--points", type=Path, metavar="FILE.json", help="a saved click list")
    prompts.add_argument("--save-clicks", type=Path, metavar="FILE.json", help="for a replay")
    add_network(parser)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--all-clicks", action="store_true", help="tell every pass all clicks, not the newest only"
    )
    how.add_argument("--no-follow", action="store_true", help="end objects with their window")
    how.add_argument("--honour-clicks", action="store_true", help="clicks win over the network")
    how.add_argument(
        "--merge",
        choices=("refuse", "first", "last", "likeliest"),
        default="likeliest",
        help="who gets a voxel that several objects claim; likeliest when left out",
    )
    how.add_argument("--cache", type=Path, metavar="FOLDER", help="keep encoded windows there")
    out = parser.add_argument_group("output")
    out.add_argument("--png", type=Path, metavar="FIG.png", help="three planes through each object")
    out.add_argument("--quality", action="store_true", help="agreement over moved clicks")
    out.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run_segment, prompts=[])


class _Prompt(argparse.Action):
    """Keeps points and names in the order in which they were written."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """Appends to the one list of all prompts."""
        namespace.prompts = [*namespace.prompts, (self.dest, values)]


def _point(text: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(number) for number in text.split(","))
    except ValueError:
        message = f"{text!r} is no point; write three numbers: 12,34,56"
        raise argparse.ArgumentTypeError(message) from None
    return x, y, z


def _run_segment(args: argparse.Namespace) -> int:
    from sammed3d_backbone import sam
    from sammed3d_backbone.data.volume import require_nifti_name
    from sammed3d_backbone.inference.interactive import Predictor, merge

    # What can be wrong is found before minutes of work.
    clicks = _clicks(args)
    require_nifti_name(args.target)
    _require_png_name(args.png)
    require_free((args.target, args.png, args.save_clicks), args.source, force=args.force)
    volume = opened(args.source, args.channel)
    _require_places(volume, clicks, args.points)
    model = on_device(
        sam(args.variant, pretrained=not args.random, weights=args.weights), args.device
    )
    predictor = Predictor(
        model,
        clicks="all" if args.all_clicks else "newest",
        follow=not args.no_follow,
        honour_clicks=args.honour_clicks,
        cache_folder=args.cache,
        progress=True,
    )
    predictor.set_volume(volume, modality=args.modality)
    if args.points is not None:
        predictor.load_clicks(args.points)
    for click in clicks:
        predictor.click(**click)
    found = {name: predictor.predict(name) for name in predictor.objects}
    labels = merge(found, args.merge)
    labels.volume.save(args.target)
    if args.save_clicks is not None:
        predictor.save_clicks(args.save_clicks, overwrite=args.force)
    if args.png is not None:
        _draw(args.png, volume, found, predictor)
    _report(args, predictor, found, labels)
    return 0


def _clicks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The points of the command line as arguments of `Predictor.click`."""
    unit = "point_mm" if args.mm else "point_vox"
    name, clicks = OBJECT, []
    for kind, value in args.prompts:
        if kind == "object":
            name = value
        else:
            clicks.append({unit: value, "positive": kind == "point", "object": name})
    if not clicks and args.points is None:
        raise ValueError("nothing was clicked; give --point I,J,K or --points FILE.json")
    return clicks


def _require_places(
    volume: "Volume", clicks: Sequence[Mapping[str, Any]], listed: Path | None
) -> None:
    """Refuses points that do not lie in the volume."""
    from sammed3d_backbone.inference.interactive import click_io as clicklist
    from sammed3d_backbone.inference.interactive.prompts import voxel_of

    for click in (*clicks, *(clicklist.read(listed).clicks if listed else ())):
        voxel_of(volume, click.get("point_vox"), click.get("point_mm"))


def _report(
    args: argparse.Namespace,
    predictor: "Predictor",
    found: "dict[str, Prediction]",
    labels: "Labels",
) -> None:
    """Prints what was found, for people or as JSON."""
    rows: list[dict[str, Any]] = []
    for value, name in labels.names.items():
        prediction = found[name]
        voxels = int((labels.volume.array == value).sum())
        row: dict[str, Any] = {
            "value": value,
            "object": name,
            "voxels": voxels,
            "ml": round(voxels * labels.volume.voxel_ml, 3),
            "windows": prediction.windows,
            "clicks": prediction.clicks,
            "clicks_agreed": prediction.clicks_agreed,
        }
        if args.quality:
            row["agreement"] = round(predictor.quality(name).agreement, 4)
        rows.append(row)
    notes = [RANDOM] if args.random else []
    notes += dict.fromkeys(note for p in found.values() for note in p.notes)
    if labels.overlap:
        notes.append(f"objects overlapped in {labels.overlap} voxels: {args.merge}")
    if args.json:
        seconds = [p.seconds for p in found.values()]
        total = {k: round(sum(s.get(k, 0.0) for s in seconds), 3) for s in seconds for k in s}
        print(
            json.dumps({"out": str(args.target), "objects": rows, "notes": notes, "seconds": total})
        )
        return
    for row in rows:
        line = "{value} {object}: {voxels} voxels, {ml:.2f} ml, {windows} windows".format(**row)
        agreement = f", agreement {row['agreement']:.2f}" if args.quality else ""
        print(line + f", {row['clicks_agreed']} of {row['clicks']} clicks agreed" + agreement)
    for note in notes:
        print(f"note: {note}")
    print(args.target)


def _draw(
    path: Path, volume: "Volume", found: "dict[str, Prediction]", predictor: "Predictor"
) -> None:
    from sammed3d_backbone.evaluation.figures import Clicked, clicks_figure

    shown = []
    for name, prediction in found.items():
        clicks = [(c.point_vox, c.positive) for c in predictor.clicks_on(name)]
        shown.append(Clicked(name, prediction.mask, clicks))
    clicks_figure(path, volume, shown)


# --- features ----------------------------------------------------------------------------------


def add_features(commands: "Commands") -> None:
    """Declares `sammed3d features`."""
    parser = commands.add_parser(
        "features",
        help="write or draw the encoder's token maps of a NIfTI volume",
        description=(
            "Tensors (F, x, y, z) with axes towards R, A, S, and `affine`: token index -> RAS+ mm "
            "of the token's centre. The picture shows each block, or the last, on the volume's own "
            "grid, alike features in alike colours; for it, windows overlap and share one scale."
        ),
    )
    _add_files(parser, "OUT.safetensors", is_optional=True)
    parser.add_argument(
        "--blocks", type=_blocks, default=(), metavar="N,N", help="outputs of these blocks too"
    )
    parser.add_argument("--png", type=Path, metavar="FIG.png", help="principal parts as colours")
    add_network(parser)
    parser.set_defaults(run=_run_features)


def _blocks(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        message = f"{text!r} names no blocks; write numbers: 2,5,8"
        raise argparse.ArgumentTypeError(message) from None


def _run_features(args: argparse.Namespace) -> int:
    import torch

    from sammed3d_backbone import encoder
    from sammed3d_backbone.inference.features import token_maps
    from sammed3d_backbone.inference.interactive.validation import spacing_of
    from sammed3d_backbone.loading.checkpoint import write

    if args.target is None and args.png is None:
        raise ValueError("nothing would be written; give OUT.safetensors or --png FIG.png")
    if args.target is not None and args.target.suffix != ".safetensors":
        raise ValueError(f"{args.target} would hold safetensors; give it the ending .safetensors")
    _require_png_name(args.png)
    require_free((args.target, args.png), args.source, force=args.force)
    volume = opened(args.source, args.channel)
    network = on_device(
        encoder(args.variant, pretrained=not args.random, weights=args.weights), args.device
    )
    spacing_mm, notes = spacing_of(network)
    if args.target is not None:
        found = token_maps(
            network,
            volume,
            spacing_mm=spacing_mm,
            modality=args.modality,
            blocks=args.blocks,
            progress=True,
        )
        tensors = {**found.maps, "affine": torch.from_numpy(found.affine)}
        metadata = {"volume": args.source.name, "spacing_mm": str(spacing_mm), "axes": "F, R, A, S"}
        args.target.parent.mkdir(parents=True, exist_ok=True)
        write(args.target, tensors, metadata, overwrite=args.force)
        for name, part in found.maps.items():
            print(f"{name}: {' x '.join(map(str, part.shape))}")
    if args.png is not None:
        _draw_features(args, network.eval(), volume, spacing_mm)
    for note in notes:
        print(f"note: {note}")
    for path in filter(None, (args.target, args.png)):
        print(path)
    return 0


def _draw_features(
    args: argparse.Namespace, network: "ImageEncoder3D", volume: "Volume", spacing_mm: "TripleMm"
) -> None:
    from sammed3d_backbone.data.preprocessing import Preprocessing
    from sammed3d_backbone.evaluation.figures import features_figure
    from sammed3d_backbone.evaluation.voxel_features import feature_grid
    from sammed3d_backbone.inference.interactive.validation import intensity_of

    mode = {"default": intensity_of(args.modality)}
    preparation = Preprocessing(spacing_mm, mode, "volume", network.img_size)
    image, geometry = preparation.image(volume)
    blocks = args.blocks or [network.depth - 1]
    maps, affine = feature_grid(network, image, geometry, blocks, progress=True)
    record = vars(network)["pretrained_cfg"]
    source = "random values" if record is None else Path(record.name).name
    features_figure(
        args.png,
        volume,
        {f"block {b}": maps[b] for b in blocks},
        affine,
        title=f"{args.source.name} through {args.variant}, {source}",
    )


# --- both --------------------------------------------------------------------------------------


def _add_files(parser: argparse.ArgumentParser, target: str, *, is_optional: bool = False) -> None:
    parser.add_argument("source", metavar="IN.nii.gz", type=Path)
    parser.add_argument("target", metavar=target, type=Path, nargs="?" if is_optional else None)
    parser.add_argument("--channel", type=int, metavar="N", help="of a 4-D file, counted from 0")
    parser.add_argument("--modality", choices=("ct", "mr", "us"), help="ct is clamped to HU")
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def add_network(parser: argparse.ArgumentParser) -> None:
    """Declares which network a command runs, and where."""
    network = parser.add_argument_group("network")
    network.add_argument("--variant", default="vit_b", help="vit_b when left out")
    network.add_argument("--weights", help="a name, a file or hf-hub:OWNER/REPO")
    network.add_argument("--random", action="store_true", help="random initialisation")
    network.add_argument("--device", default="cpu", help="such as cuda; cpu when left out")


def _require_png_name(path: Path | None) -> None:
    if path is not None and path.suffix != ".png":
        raise ValueError(f"{path} is not named .png; choose such a name")
