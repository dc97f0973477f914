"""Commands on weights files: `sammed3d info`, `convert` and `verify`."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sammed3d_backbone.cli.checks import require_free, require_unused

if TYPE_CHECKING:
    from torch import Tensor

    from sammed3d_backbone.cli import Commands
    from sammed3d_backbone.loading.registry import Weights


# --- info ------------------------------------------------------------------------------------


def add_info(commands: "Commands") -> None:
    """Declares `sammed3d info`."""
    parser = commands.add_parser(
        "info",
        help="show a weights record, or what is in a file",
        description="Without an argument: the weights table.",
    )
    parser.add_argument("weights", nargs="?", metavar="NAME|FILE")
    parser.set_defaults(run=_run_info)


def _run_info(args: argparse.Namespace) -> int:
    from sammed3d_backbone.loading.opening import CARD_KEY
    from sammed3d_backbone.loading.registry import WEIGHTS

    if args.weights is None:
        for name, record in WEIGHTS.items():
            print(f"{name:<16} {record.variant or '':<8} {record.status:<24} {record.filename}")
        return 0
    if args.weights in WEIGHTS:
        print(WEIGHTS[args.weights])
        return 0
    record, tensors, metadata = opened_weights(args.weights)
    if CARD_KEY in metadata:
        from sammed3d_backbone.inference.card import Card  # imports nibabel

        print(f"name: {record.name}\nsha256: {record.sha256}")
        print(Card.from_json(metadata[CARD_KEY]))
        values = sum(tensor.numel() for tensor in tensors.values())
        print(f"{len(tensors)} tensors, {values:,} values")
        return 0
    print(record)
    print(f"layout: {metadata['layout']}")
    for part in sorted({_part(name) for name in tensors}):
        mine = [tensor for name, tensor in tensors.items() if _part(name) == part]
        formats = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in mine}))
        values = sum(tensor.numel() for tensor in mine)
        print(f"{part}: {len(mine)} tensors, {values:,} values, {formats}")
    for key in sorted(metadata.keys() - {"layout", "weights_record"}):
        print(f"metadata {key}: {_shortened(metadata[key])}")
    return 0


def opened_weights(
    weights: str, *, check_hash: bool = True
) -> "tuple[Weights, dict[str, Tensor], dict[str, str]]":
    """The record, tensors and metadata of a file, the record as complete as the file makes it."""
    from sammed3d_backbone.loading.hub import sha256_of
    from sammed3d_backbone.loading.opening import open_weights
    from sammed3d_backbone.loading.stored_sizes import variant_of

    record, path, tensors, metadata = open_weights(weights, check_hash=check_hash)
    if record.sha256 is None:
        record = dataclasses.replace(record, sha256=sha256_of(path))
    if record.variant is None:
        record = dataclasses.replace(record, variant=variant_of(tensors))
    return record, tensors, metadata


def _part(name: str) -> str:
    """The part of the promptable network that a tensor belongs to."""
    from sammed3d_backbone.loading.checkpoint import ENCODER, OTHER_PARTS, UNETR

    if name.startswith((ENCODER, *OTHER_PARTS, UNETR)):
        return name.split(".")[0]
    return "tensors without a part"


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text)} characters)"


# --- convert ---------------------------------------------------------------------------------


def add_convert(commands: "Commands") -> None:
    """Declares `sammed3d convert`."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint as safetensors",
        description=(
            "Names, number formats and values stay exactly as they are. A file whose values are "
            "not finite, or do not fit its own content_sha256, is refused."
        ),
    )
    parser.add_argument("source", metavar="FILE.pth", help="or a name, which is downloaded")
    parser.add_argument("target", metavar="OUT.safetensors", type=Path)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> int:
    from sammed3d_backbone import __version__
    from sammed3d_backbone.loading.checkpoint import write
    from sammed3d_backbone.loading.fitting import require_finite
    from sammed3d_backbone.loading.registry import to_metadata
    from sammed3d_backbone.provenance import strip_directory

    # Before hundreds of megabytes are read.
    require_free((args.target,), (args.source,), force=args.force)
    record, tensors, metadata = opened_weights(args.source)
    require_finite(tensors, args.source)
    record = dataclasses.replace(record, name=strip_directory(record.name))
    facts = {key: value for key, value in metadata.items() if key != "content_sha256"}
    entries = {
        **facts,
        **to_metadata(record),
        "source_file": str(record.filename),
        "source_sha256": str(record.sha256),
        "written_by": f"sammed3d_backbone {__version__}",
    }
    args.target.parent.mkdir(parents=True, exist_ok=True)
    write(args.target, tensors, entries, overwrite=args.force)
    print(f"{args.target}: {len(tensors)} tensors of {record.name}")
    return 0


# --- verify ----------------------------------------------------------------------------------


def add_verify(commands: "Commands") -> None:
    """Declares `sammed3d verify`."""
    parser = commands.add_parser(
        "verify",
        help="check a file's hash, names, shapes and values",
        description="Exit code 0: all checks passed. 1: a check failed.",
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--variant", help="default: the variant whose sizes the file has")
    parser.set_defaults(run=_run_verify)


def _run_verify(args: argparse.Namespace) -> int:
    from sammed3d_backbone.loading.checkpoint import content_sha256
    from sammed3d_backbone.loading.inflation import is_2d
    from sammed3d_backbone.loading.opening import CARD_KEY

    record, tensors, metadata = opened_weights(args.file, check_hash=False)
    findings = [hash_finding(record)]
    if "content_sha256" in metadata:
        digest = content_sha256(tensors)
        intact = digest == metadata["content_sha256"]
        state = "as written" if intact else "altered since written"
        findings.append((intact, f"content_sha256 {digest} of the stored tensors: {state}"))
    findings.append(_finite_finding(tensors))
    if CARD_KEY in metadata:
        require_unused(args, ("variant",), f"{args.file} is a fine-tuned model, whose card says it")
        findings.append(_model_finding(args.file))
    elif is_2d(tensors):
        findings.append(_2d_finding(tensors, args.variant or record.variant, args.file))
    else:
        findings += _network_findings(tensors, args.variant or record.variant)
    for right, sentence in findings:
        print(f"{MARKS[right]}  {sentence}")
    return int(any(right is False for right, _ in findings))


# Result of a check: passed, failed, or undecidable.
MARKS = {True: "ok   ", False: "WRONG", None: "-    "}
Finding = tuple[bool | None, str]


def hash_finding(record: "Weights") -> Finding:
    """Whether the file's hash is that of the weights table."""
    from sammed3d_backbone.loading.registry import WEIGHTS

    for listed in WEIGHTS.values():
        if listed.sha256 == record.sha256:
            return True, f"sha256 {record.sha256} is that of {listed.name!r}"
    for listed in WEIGHTS.values():
        if listed.filename == record.filename and listed.sha256 is not None:
            return False, (
                f"sha256 {record.sha256} is not that of {listed.name!r}, although the file name is"
            )
    return None, f"sha256 {record.sha256}: no such file in the table"


def _finite_finding(tensors: "Mapping[str, Tensor]") -> Finding:
    import torch

    non_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if non_finite:
        return (
            False,
            f"values that are not finite in {len(non_finite)} tensors, such as {non_finite[0]}",
        )
    return True, f"all values of {len(tensors)} tensors are finite"


def _network_findings(tensors: "Mapping[str, Tensor]", variant: str | None) -> list[Finding]:
    """Whether the file holds a whole encoder or promptable network, by names and shapes.

    The hash of a promptable network comes first.
    """
    import torch

    from sammed3d_backbone.loading.checkpoint import (
        ENCODER,
        OTHER_PARTS,
        UNETR,
        CheckpointError,
        content_sha256,
    )
    from sammed3d_backbone.loading.fitting import fit
    from sammed3d_backbone.loading.stored_sizes import encoder_like, sam_like

    if variant is None:
        return [(False, "the sizes fit no known variant; pass --variant to see the differences")]
    is_promptable = any(name.startswith(OTHER_PARTS) for name in tensors)
    with torch.device("meta"):
        network = (sam_like if is_promptable else encoder_like)(tensors, variant)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        part = "" if is_promptable else ENCODER
        values, report = fit(tensors, shapes, part=part, source="the file")
    except CheckpointError as error:
        return [(False, str(error))]
    decoder = sum(name.startswith(UNETR) for name in report.unused)
    corners = len(report.unused) - decoder
    rest = f", {corners} box corners not used" if corners else ""
    rest += f", {decoder} of a UNETR's decoder" if decoder else ""
    rest += f", {len(report.unexpected)} unexpected" if report.unexpected else ""
    what = "promptable network" if is_promptable else "encoder"
    finding = True, f"the {len(report.matched)} tensors of the {variant} {what} are there{rest}"
    if not is_promptable:
        return [finding]
    digest = content_sha256(values)
    return [(None, f"weights_sha256 {digest} of the loaded network, in click lists"), finding]


def _2d_finding(tensors: "Mapping[str, Tensor]", variant: str | None, file: str) -> Finding:
    """Whether the encoder of a 2-D file can be inflated, and how to."""
    import torch

    from sammed3d_backbone.loading.checkpoint import CheckpointError
    from sammed3d_backbone.loading.inflation import inflate_2d
    from sammed3d_backbone.loading.stored_sizes import encoder_like

    if variant is None:
        return False, (
            "a 2-D network whose sizes fit no known variant; pass --variant to see the differences"
        )
    with torch.device("meta"):
        network = encoder_like(tensors, variant, rel_pos="axial")
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        _, report = inflate_2d(tensors, shapes, depth_filter="center", source="the 2-D file")
    except CheckpointError as error:
        return False, str(error)
    return True, (
        f"a 2-D SAM encoder, which fills {len(report.matched)} of the {len(shapes)} tensors of "
        f"{variant}, all but the neck: encoder({variant!r}, weights={file!r}, inflate='center', "
        "rel_pos='axial') converts it"
    )


def _model_finding(file: str) -> Finding:
    """Whether a fine-tuned network loads strictly, as `predict` will load it."""
    from sammed3d_backbone.inference.segmenter import Segmenter

    try:
        segmenter = Segmenter.from_pretrained(file)
    except ValueError as error:
        return False, str(error).replace("\n", " ")
    count = len(segmenter.model.state_dict())
    return True, f"the {count} tensors of the fine-tuned {segmenter.card.network} fit its card"
