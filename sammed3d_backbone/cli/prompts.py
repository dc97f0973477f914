"""Commands on the promptable model: `sammed3d segment` and `features`."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sammed3d_backbone.cli.checks import on_device, require_free

if TYPE_CHECKING:
    from torch import nn

    NetworkT = TypeVar("NetworkT", bound=nn.Module)

    from sammed3d_backbone.cli import Commands
    from sammed3d_backbone.data.preprocessing import Modality, Preprocessing
    from sammed3d_backbone.data.volume import Volume
    from sammed3d_backbone.inference.interactive import Prediction, Predictor
    from sammed3d_backbone.inference.interactive.click_io import ClickList
    from sammed3d_backbone.inference.validation import ValidatedVolume

RANDOM = "the network has random initialisation, so its masks mean nothing"


# --- segment -----------------------------------------------------------------------------------


def add_segment(commands: "Commands") -> None:
    """Declares `sammed3d segment`."""
    parser = commands.add_parser(
        "segment",
        help="segment objects of a scan from clicks",
        description=(
            "Writes a label map on the volume's own grid, with its affine; objects are numbered in "
            "their order. OUT ends in .nii.gz, .nii, .nrrd, .mha, or .dcm: a DICOM-SEG of the "
            "series SCAN. Write --point=-31,12,40 if the first number is negative."
        ),
    )
    _add_files(parser, "OUT")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--point", type=_triple, action=_Prompt, metavar="I,J,K", help="a voxel inside the object"
    )
    prompts.add_argument(
        "--negative", type=_triple, action=_Prompt, metavar="I,J,K", help="a voxel outside it"
    )
    prompts.add_argument(
        "--object", action=_Prompt, metavar="NAME", help="name of the object of the next points"
    )
    prompts.add_argument("--mm", action="store_true", help="points are x,y,z in RAS+ mm")
    prompts.add_argument("--points", type=Path, metavar="FILE.json", help="a saved click list")
    prompts.add_argument(
        "--save-clicks", type=Path, metavar="FILE.json", help="write the clicks as a click list"
    )
    add_network(parser)
    _add_preprocessing(parser)
    how = parser.add_argument_group("prediction")
    how.add_argument(
        "--clicks",
        choices=("newest", "all"),
        help="what every pass is given (default: as the weights were trained)",
    )
    how.add_argument("--no-follow", action="store_true", help="cut objects off at their window")
    how.add_argument(
        "--enforce-clicks", action="store_true", help="make the masks agree with all clicks"
    )
    how.add_argument(
        "--merge",
        choices=("refuse", "first", "last", "likeliest"),
        default="likeliest",
        help="which object gets a voxel that several claim (default: likeliest)",
    )
    how.add_argument("--cache", type=Path, metavar="FOLDER", help="keep encoded windows there")
    out = parser.add_argument_group("output")
    out.add_argument("--png", type=Path, metavar="FIG.png", help="three planes through each object")
    out.add_argument(
        "--stability", action="store_true", help="Dice with the masks of slightly moved clicks"
    )
    out.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run_segment, prompts=[])


class _Prompt(argparse.Action):
    """Keeps points and names in the order in which they were given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """Appends to the one list of all prompts."""
        namespace.prompts = [*namespace.prompts, (self.dest, values)]


def _triple(text: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected three numbers: 12,34,56") from None
    return x, y, z


def _run_segment(args: argparse.Namespace) -> int:
    from sammed3d_backbone import sam
    from sammed3d_backbone.data.formats import require_writable
    from sammed3d_backbone.evaluation.figures import Clicked, clicks_figure
    from sammed3d_backbone.inference.interactive import Predictor
    from sammed3d_backbone.inference.label_map import merge_masks
    from sammed3d_backbone.inference.validation import validate_volume

    # Everything that can be wrong is found before the network is loaded.
    _require_png_name(args.png)
    outputs = (args.target, args.png, args.save_clicks)
    require_free(outputs, (args.source, args.weights), force=args.force)
    scan = validate_volume(args.source, channel=args.channel, **dicom_options(args))
    require_writable(args.target, scan.volume.header)
    listed, clicks = _clicks(args, scan)
    model = chosen_network(sam, args)
    predictor = Predictor(
        model,
        **_settings(args, listed),
        preprocessing=_preprocessing(args, model),
        cache_folder=args.cache,
        progress=True,
    )
    predictor.set_volume(scan, modality=args.modality or _stored_modality(listed))
    if listed is not None:
        predictor.load_clicks(listed)
    for click in clicks:
        predictor.click(**click)
    found = {name: predictor.predict(name) for name in predictor.objects}
    labels, overlap = merge_masks(found, args.merge)
    labels.save(args.target, names=dict(enumerate(found, start=1)), overwrite=args.force)
    _report(args, predictor, found, labels, overlap)
    if args.save_clicks is not None:
        predictor.save_clicks(args.save_clicks, overwrite=args.force)
    if args.png is not None:
        shown = [
            Clicked(name, p.mask, [(c.point_vox, c.positive) for c in predictor.clicks_on(name)])
            for name, p in found.items()
        ]
        clicks_figure(args.png, scan.volume, shown, overwrite=args.force)
    return 0


def _clicks(
    args: argparse.Namespace, scan: "ValidatedVolume"
) -> "tuple[ClickList | None, list[dict[str, Any]]]":
    """The click list of a file, and the points of the command line; all lie in the scan."""
    from sammed3d_backbone.inference.interactive.click_io import ClickList
    from sammed3d_backbone.inference.interactive.prompts import OBJECT, object_name

    unit = "point_mm" if args.mm else "point_vox"
    name, clicks, unused = OBJECT, [], ""
    for kind, value in args.prompts:
        if kind == "object":
            if unused:
                break
            name = unused = object_name(value)
        else:
            unused = ""
            voxel = scan.voxel(**{unit: value})
            clicks.append({"point_vox": voxel, "positive": kind == "point", "object": name})
    if unused:
        raise ValueError(
            f"--object {unused} has no points; write --object before the points that it names"
        )
    if not clicks and args.points is None:
        raise ValueError("there are no clicks; give --point I,J,K or --points FILE.json")
    listed = None if args.points is None else ClickList.load(args.points)
    earlier = () if listed is None else listed.clicks
    for click in earlier:
        scan.voxel(click.get("point_vox"), click.get("point_mm"))
    inside = {c.get("object", OBJECT) for c in (*earlier, *clicks) if c.get("positive", True)}
    for click in (*earlier, *clicks):
        if (name := click.get("object", OBJECT)) not in inside:
            raise ValueError(f"object {name!r} has no positive click; click inside it first")
    return listed, clicks


def _settings(args: argparse.Namespace, listed: "ClickList | None") -> dict[str, Any]:
    """The predictor's settings: those of the click list, unless the command line says otherwise."""
    stored = {} if listed is None else listed.settings
    given = {
        "clicks": args.clicks,
        "follow": False if args.no_follow else None,
        "enforce_clicks": args.enforce_clicks or None,
    }
    kinds = {"clicks": str, "follow": bool, "enforce_clicks": bool, "max_windows": int}
    return {
        **{name: stored[name] for name, kind in kinds.items() if type(stored.get(name)) is kind},
        **{name: value for name, value in given.items() if value is not None},
    }


def _stored_modality(listed: "ClickList | None") -> "Modality | None":
    """The modality with which a click list was made, if it has one."""
    from typing import get_args

    from sammed3d_backbone.data.preprocessing import Modality

    stored = None if listed is None else listed.settings.get("modality")
    return next((known for known in get_args(Modality) if known == stored), None)


def _report(
    args: argparse.Namespace,
    predictor: "Predictor",
    found: "dict[str, Prediction]",
    labels: "Volume",
    overlap: int,
) -> None:
    """Prints the result as text or as JSON."""
    rows: list[dict[str, Any]] = []
    for value, (name, prediction) in enumerate(found.items(), start=1):
        voxels = int((labels.array == value).sum())
        row: dict[str, Any] = {
            "value": value,
            "object": name,
            "voxels": voxels,
            "ml": round(voxels * labels.voxel_ml, 3),
            "windows": prediction.windows,
            "clicks": prediction.clicks,
            "clicks_agreed": prediction.clicks_agreed,
        }
        if prediction.predicted_dice is not None:
            row["predicted_dice"] = round(prediction.predicted_dice, 3)
        if args.stability:
            row["stability"] = round(predictor.stability(name), 4)
        rows.append(row)
    notes = [RANDOM] if args.random else []
    notes += dict.fromkeys(note for p in found.values() for note in p.notes)
    if overlap:
        notes.append(f"objects overlapped in {overlap} voxels: {args.merge}")
    if args.json:
        print(json.dumps({"out": str(args.target), "objects": rows, "notes": notes}))
        return
    for row in rows:
        line = "{value} {object}: {voxels} voxels, {ml:.2f} ml, {windows} windows".format(**row)
        line += f", {row['clicks_agreed']} of {row['clicks']} clicks agreed"
        if "predicted_dice" in row:
            line += f", predicted Dice {row['predicted_dice']:.2f}"
        print(line + (f", stability {row['stability']:.2f}" if args.stability else ""))
    for note in notes:
        print(f"note: {note}")
    print(args.target)


# --- features ----------------------------------------------------------------------------------


def add_features(commands: "Commands") -> None:
    """Declares `sammed3d features`."""
    parser = commands.add_parser(
        "features",
        help="write or draw the encoder's token maps of a scan",
        description=(
            "Tensors (F, x, y, z) with axes towards R, A, S, and `affine`: token index -> RAS+ mm "
            "of the token's centre. The figure shows the maps of the same blocks (of the last one "
            "without --blocks) on the volume's own grid, similar features in similar colours."
        ),
    )
    _add_files(parser, "OUT.safetensors", is_optional=True)
    parser.add_argument(
        "--blocks", type=_blocks, default=[], metavar="N,N", help="outputs of these blocks, too"
    )
    parser.add_argument(
        "--png", type=Path, metavar="FIG.png", help="draw three principal components as colours"
    )
    add_network(parser)
    _add_preprocessing(parser)
    parser.set_defaults(run=_run_features)


def _blocks(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected block numbers: 2,5,8") from None


def _run_features(args: argparse.Namespace) -> int:
    import torch

    from sammed3d_backbone import encoder
    from sammed3d_backbone.data.preprocessing import preprocessing_of
    from sammed3d_backbone.evaluation.figures import features_figure
    from sammed3d_backbone.inference.features import token_maps
    from sammed3d_backbone.inference.validation import validate_volume
    from sammed3d_backbone.loading.checkpoint import write

    if args.target is None and args.png is None:
        raise ValueError("there is no output; give OUT.safetensors or --png FIG.png")
    if args.target is not None and args.target.suffix != ".safetensors":
        raise ValueError(f"{args.target}: expected a name that ends in .safetensors")
    _require_png_name(args.png)
    require_free((args.target, args.png), (args.source, args.weights), force=args.force)
    scan = validate_volume(args.source, channel=args.channel, **dicom_options(args))
    network = chosen_network(encoder, args)
    preprocessing, notes = preprocessing_of(network, _preprocessing(args, network))
    blocks = args.blocks or ([] if args.png is None else [network.depth - 1])
    found = token_maps(
        network, scan.volume, preprocessing, modality=args.modality, blocks=blocks, progress=True
    )
    if args.target is not None:
        tensors = {**found.maps, "affine": torch.from_numpy(found.affine)}
        metadata = {
            "volume": args.source.name,
            "preprocessing": json.dumps(preprocessing.to_dict()),
            "axes": "F, R, A, S",
        }
        args.target.parent.mkdir(parents=True, exist_ok=True)
        write(args.target, tensors, metadata, overwrite=args.force)
        for name, part in found.maps.items():
            print(f"{name}: {' x '.join(map(str, part.shape))}")
    if args.png is not None:
        record = getattr(network, "pretrained_cfg", None)
        weights = "random initialisation" if record is None else Path(record.name).name
        shown = {name: found.maps[name] for name in map("block_{}".format, sorted(set(blocks)))}
        title = f"{args.source.name} through {variant_of_command(args)}, {weights}"
        features_figure(
            args.png, scan.volume, shown, found.affine, title=title, overwrite=args.force
        )
    for note in notes:
        print(f"note: {note}")
    for path in filter(None, (args.target, args.png)):
        print(path)
    return 0


# --- both --------------------------------------------------------------------------------------


def _add_files(parser: argparse.ArgumentParser, target: str, *, is_optional: bool = False) -> None:
    add_scan(parser)
    parser.add_argument("target", metavar=target, type=Path, nargs="?" if is_optional else None)
    parser.add_argument(
        "--channel", type=int, metavar="N", help="channel of a 4-D file, counted from 0"
    )
    parser.add_argument(
        "--modality", choices=("ct", "mr", "us"), help="modality of the scan (CT in HU is clamped)"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def add_scan(parser: argparse.ArgumentParser) -> None:
    """Declares the scan of a command, and which DICOM series it is."""
    parser.add_argument(
        "source", metavar="SCAN", type=Path, help="NIfTI, NRRD, ..., or a file or folder of DICOM"
    )
    dicom = parser.add_argument_group("DICOM")
    dicom.add_argument("--series", metavar="UID", help="which series of several")
    dicom.add_argument(
        "--slice-tolerance",
        type=float,
        metavar="MM",
        help="how far slices may lie off a regular grid (default: 1%% of their distance)",
    )


def dicom_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_scan` declares, as `Volume.load` takes it."""
    return {"series": args.series, "slice_tolerance_mm": args.slice_tolerance}


def _add_preprocessing(parser: argparse.ArgumentParser) -> None:
    override = parser.add_argument_group("preprocessing (default: that of the weights)")
    override.add_argument("--spacing", type=_triple, metavar="X,Y,Z", help="in mm along R, A, S")
    override.add_argument(
        "--statistics",
        choices=("crop", "volume"),
        help="normalise by each window or by the whole volume",
    )


def _preprocessing(args: argparse.Namespace, network: "nn.Module") -> "Preprocessing | None":
    """The preprocessing of the weights with the command line's overrides; None without any."""
    from sammed3d_backbone.data.preprocessing import preprocessing_of

    given = {"spacing_mm": args.spacing, "statistics": args.statistics}
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return None
    return dataclasses.replace(preprocessing_of(network)[0], **changes)


def add_network(parser: argparse.ArgumentParser) -> None:
    """Declares which network a command runs, and where."""
    network = parser.add_argument_group("network")
    network.add_argument(
        "--variant", help="size of the network (default: that of the weights, or vit_b)"
    )
    network.add_argument(
        "--weights", help="a name, a file or hf-hub:OWNER/REPO (default: those of the variant)"
    )
    network.add_argument("--random", action="store_true", help="random initialisation")
    network.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")


def variant_of_command(args: argparse.Namespace) -> str:
    """The size of network that was named, or that of the named weights."""
    from sammed3d_backbone.loading.opening import variant_for

    variant: str = args.variant or variant_for(args.weights)
    return variant


def chosen_network(build: "Callable[..., NetworkT]", args: argparse.Namespace) -> "NetworkT":
    """The network of the command line on its device."""
    variant = variant_of_command(args)
    network = build(variant, pretrained=not args.random, weights=args.weights)
    return on_device(network, args.device)


def _require_png_name(path: Path | None) -> None:
    if path is not None and path.suffix != ".png":
        raise ValueError(f"{path}: expected a name that ends in .png")
