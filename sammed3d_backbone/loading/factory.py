"""From a variant and the name of weights to a network that is ready to use.

Puts the table of sizes, the weights table, the reading of files and the network together; each
of them is elsewhere. Nothing here starts from random values unless it was asked to.
"""

import dataclasses
import json
import logging
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.loading.checkpoint import (
    ENCODER,
    OTHER_PARTS,
    STEM,
    Change,
    CheckpointError,
    LoadReport,
    Shape,
    fit,
    part_of,
    read,
)
from sammed3d_backbone.loading.inflation import Request, inflate, is_flat, request_in
from sammed3d_backbone.loading.registry import (
    WEIGHTS,
    Weights,
    default_weights,
    from_metadata,
    list_weights,
    locate,
)
from sammed3d_backbone.loading.variants import VARIANTS, Variant
from sammed3d_backbone.loading.variants import variant as variant_sizes
from sammed3d_backbone.models.attention import RelPos
from sammed3d_backbone.models.image_encoder import ImageEncoder3D
from sammed3d_backbone.models.prompt_encoder import PointPos
from sammed3d_backbone.models.sam import Sam3D

__all__ = ["encoder", "encoder_like", "list_weights", "sam", "sam_like", "variant_of"]

logger = logging.getLogger(__name__)

CARD_KEY = "sammed3d_backbone"  # of the metadata of a fine-tuned network, see export.py
MODEL_ENCODER = "encoder."  # prefix of the encoder's tensors in it
# Its shape tells in which form of positions a decoder was trained.
FREQUENCIES = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"

Network = TypeVar("Network", ImageEncoder3D, Sam3D)


def encoder(
    variant: str = "vit_b",
    weights: str | os.PathLike[str] | None = None,
    *,
    in_chans: int = 1,
    img_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    rel_pos: RelPos = "sammed3d",
    drop_path_rate: float = 0.0,
    channel_gains: Sequence[float] | None = None,
) -> ImageEncoder3D:
    """The image encoder of a variant with trained values.

    The network carries the weights' record as `pretrained_cfg` and what loading did as
    `load_report`; both are None for a random start.

    Args:
        variant: A name in `variants.VARIANTS`.
        weights: A name of `list_weights()`; a .safetensors or .pth file; `repo_id:file` or
            `repo_id@revision:file` on the Hub; "none" for random values; None for the variant's
            default, which for `vit_b` downloads the released file once. From a fine-tuned
            network comes its encoder, as pruned as it is there: blocks and neck that its decoder
            did not read stay away and are listed in the report as missing. "sam2d:PLACE" inflates
            the weights of a 2-D SAM encoder to axial positions and a random neck, see
            `inflation.py`; PLACE is hub for timm's, a file or `repo_id:file`.
        in_chans: Input channels. Kernels for one channel are repeated and divided by their
            number, so that equal channels give the response of one.
        img_size: Input side in voxels, or three of them with axial positions; None for the number
            of tokens that the weights were stored with. The position table is resampled.
        patch_size: Side of a patch in voxels; None for that of the weights. The filter is
            resampled, exactly where patches grow.
        rel_pos: "sammed3d" as all public weights were trained; "axial" for the correct form,
            which needs fine-tuning when the weights were trained with the other.
        drop_path_rate: Stochastic depth of the last block.
        channel_gains: Share of each input channel in place of one over their number; they sum
            to 1. (1, 0, 0, 0) begins with the first channel alone.

    Raises:
        ValueError: If a name is unknown, or what was asked contradicts itself.
        CheckpointError: If the file does not hold the whole encoder of this variant.
        FileNotFoundError: If the weights are nowhere to be found.
        PermissionError: If the Hub refuses access.
        ConnectionError: If a download broke.

    Example:
        >>> network = encoder("tiny", weights="none")
        >>> network.img_size
        (64, 64, 64)
    """
    sizes = variant_sizes(variant)
    in_chans, img_size = _checked_numbers(in_chans, img_size, drop_path_rate)
    if weights is None:
        weights = default_weights(variant)
    if weights == "none":
        if channel_gains is not None:
            raise ValueError(
                "channel_gains adapt trained kernels; leave them out of a random start"
            )
        sizes = _with_patch(sizes, patch_size)
        size = sizes.img_size if img_size is None else img_size
        network = _network(
            sizes, size, in_chans=in_chans, rel_pos=rel_pos, drop_path_rate=drop_path_rate
        )
        return _with_provenance(network, None, None)
    if (request := request_in(weights)) is not None:
        return _inflated(
            variant,
            request,
            in_chans=in_chans,
            img_size=img_size,
            patch_size=patch_size,
            rel_pos=rel_pos,
            drop_path_rate=drop_path_rate,
            channel_gains=channel_gains,
        )
    record, path, tensors, metadata = _opened(weights, variant, "encoder")
    is_model = CARD_KEY in metadata
    if is_model:
        record, tensors = _encoder_of_model(record, tensors, metadata[CARD_KEY])
    _require_fit(record, path, tensors, variant, rel_pos, "encoder")
    network = encoder_like(
        tensors, variant, in_chans=in_chans, rel_pos=rel_pos, drop_path_rate=drop_path_rate
    )
    dropped = _prune_like(network, tensors) if is_model else ()
    state, report = fit(
        tensors,
        {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()},
        part=ENCODER,
        channel_gains=channel_gains,
        source=str(path),
        layout=metadata["layout"],
    )
    network.load_state_dict(state)
    report = _with_positions(_without(report, dropped), record, rel_pos)
    if patch_size is not None:
        report = _repatched(report, network, patch_size)
    if img_size is not None:
        report = _resized(report, network, img_size)
    return _with_provenance(network, dataclasses.replace(record, variant=variant), report)


def _inflated(
    variant: str,
    request: Request,
    *,
    in_chans: int,
    img_size: int | Sequence[int] | None,
    patch_size: int | None,
    rel_pos: RelPos,
    drop_path_rate: float,
    channel_gains: Sequence[float] | None,
) -> ImageEncoder3D:
    """An encoder with the values of a 2-D one, all but its neck."""
    if rel_pos != "axial":
        raise ValueError(
            f"{request.place} is to be inflated from 2-D, where positions are per axis; "
            "pass rel_pos='axial'"
        )
    record, path, tensors, metadata = _opened(request.place, variant, "encoder")
    stored = _patch(_without_prefix(tensors).get(STEM))
    sizes = _with_patch(variant_sizes(variant), patch_size or stored)
    network = _network(
        sizes,
        sizes.img_size if img_size is None else img_size,
        in_chans=in_chans,
        rel_pos=rel_pos,
        drop_path_rate=drop_path_rate,
    )
    if stored is not None:
        network.set_patch_size(stored)  # and back again once it is filled
    empty = network.state_dict()
    state, report = inflate(
        tensors,
        {name: tuple(tensor.shape) for name, tensor in empty.items()},
        depth_filter=request.depth_filter,
        channel_gains=channel_gains,
        source=str(path),
        layout=metadata["layout"],
    )
    network.load_state_dict({**empty, **state})
    report = _repatched(report, network, sizes.patch_size)
    logger.warning("%s: %s", report.source, report.adapted[-1])  # of the random neck
    record = dataclasses.replace(record, variant=variant, rel_pos=rel_pos)
    return _with_provenance(network, record, report)


def sam(
    variant: str = "vit_b",
    weights: str | os.PathLike[str] | None = None,
    *,
    img_size: int | Sequence[int] | None = None,
    rel_pos: RelPos = "sammed3d",
    point_pos: PointPos | None = None,
) -> Sam3D:
    """The whole promptable network of a variant with trained values.

    It carries `pretrained_cfg` and `load_report` as an encoder does. `encoder(...)` loads its part
    from the same files.

    Args:
        variant: A name in `variants.VARIANTS`.
        weights: As of `encoder`, but with all three parts inside.
        img_size: Input side in voxels, or three of them if both forms of position allow it; None
            for the size that the weights were stored with. The position table is resampled.
        rel_pos: Form of the encoder's relative positions, as of `encoder`.
        point_pos: Position code of clicks: "swapped", or "aligned" for training
            from scratch; None for that of the weights, and the variant's own at a random start.

    Raises:
        ValueError: If a name is unknown, or what was asked contradicts itself or the weights.
        CheckpointError: If the file does not hold the whole network of this variant.
        FileNotFoundError: If the weights are nowhere to be found.
        PermissionError: If the Hub refuses access.
        ConnectionError: If a download broke.

    Example:
        >>> network = sam("tiny", weights="none")
        >>> network.prompt_encoder.mask_size
        (32, 32, 32)
    """
    decoder = variant_sizes(variant).decoder
    _, img_size = _checked_numbers(1, img_size, 0.0)
    if weights is None:
        weights = default_weights(variant)
    if weights == "none":
        image_encoder = encoder(variant, "none", img_size=img_size, rel_pos=rel_pos)
        sizes = {**vars(decoder), "point_pos": point_pos or decoder.point_pos}
        network = Sam3D.around(image_encoder, **sizes)
        return _with_provenance(network, None, None)
    if request_in(weights) is not None:
        raise ValueError(
            f"weights={weights!r} inflate an image encoder only; pass weights of a whole 3-D "
            f"network, or call encoder({variant!r}, weights={weights!r}, rel_pos='axial')"
        )
    record, path, tensors, metadata = _opened(weights, variant, "sam")
    _require_all_parts(path, tensors, metadata)
    _require_fit(record, path, tensors, variant, rel_pos, "sam")
    network = sam_like(tensors, variant, rel_pos=rel_pos)
    stored = network.prompt_encoder.point_pos
    if point_pos not in (None, stored):
        raise ValueError(
            f"{record.name} was trained with point_pos={stored!r}, not {point_pos!r}; leave "
            "point_pos out, or start at random with weights='none'"
        )
    state, report = fit(
        tensors,
        {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()},
        source=str(path),
        layout=metadata["layout"],
    )
    network.load_state_dict(state)
    report = _with_positions(report, record, rel_pos)
    if img_size is not None:
        report = _resized(report, network, img_size)
    record = dataclasses.replace(record, variant=variant, point_pos=stored)
    return _with_provenance(network, record, report)


def sam_like(tensors: Mapping[str, Tensor], variant: str, *, rel_pos: RelPos = "sammed3d") -> Sam3D:
    """A random promptable network of a variant with the sizes and positions of stored tensors."""
    sizes = vars(variant_sizes(variant).decoder)
    image_encoder = encoder_like(tensors, variant, rel_pos=rel_pos)
    code = tensors.get(FREQUENCIES)
    if code is not None and code.ndim == 2:
        forms = {3 * code.shape[1]: "swapped", 2 * code.shape[1]: "aligned"}
        sizes = {**sizes, "point_pos": forms.get(image_encoder.out_chans, sizes["point_pos"])}
    return Sam3D.around(image_encoder, **sizes)


def encoder_like(
    tensors: Mapping[str, Tensor],
    variant: str,
    *,
    in_chans: int = 1,
    rel_pos: RelPos = "sammed3d",
    drop_path_rate: float = 0.0,
) -> ImageEncoder3D:
    """A random encoder of a variant whose position tables have the sizes of stored ones.

    A network that was set to another input size keeps the relative tables it was built with, so
    the two kinds of tables can belong to different grids.
    """
    stored = _without_prefix(tensors)
    sizes = _with_patch(variant_sizes(variant), _patch(stored.get(STEM)))
    grid = _grid(stored.get("pos_embed")) or (sizes.img_size // sizes.patch_size,) * 3
    built = grid
    if sizes.global_attn_indexes:
        block = f"blocks.{sizes.global_attn_indexes[0]}.attn.rel_pos_"
        tables = [stored[name] for axis in "dhw" if (name := f"{block}{axis}") in stored]
        if len(tables) == 3 and all(table.ndim == 2 for table in tables):
            built = tuple((len(table) + 1) // 2 for table in tables)
    network = _network(
        sizes,
        [n * sizes.patch_size for n in built],
        in_chans=in_chans,
        rel_pos=rel_pos,
        drop_path_rate=drop_path_rate,
    )
    if grid != built:
        network.set_input_size([n * sizes.patch_size for n in grid])
    return network


def variant_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The variant whose sizes stored tensors have; None if there is none, or parts are missing.

    Of a 2-D encoder it is the one that these inflate to, whose neck has a width of its own.
    """
    stored = _without_prefix(tensors)
    try:
        seen = (
            stored[STEM].shape[2],
            stored[STEM].shape[0],
            len({name.split(".")[1] for name in stored if name.startswith("blocks.")}),
            stored[STEM].shape[0] // stored["blocks.0.attn.rel_pos_h"].shape[1],
            stored["neck.0.weight"].shape[0],
        )
    except (KeyError, IndexError):
        return None
    told = seen[:-1] if is_flat(tensors) else seen
    for name, v in VARIANTS.items():
        sizes = (v.patch_size, v.embed_dim, v.depth, v.num_heads, v.out_chans)
        if told == sizes[: len(told)]:
            return name
    return None


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(ENCODER): tensor for name, tensor in tensors.items()}


def _patch(filters: Tensor | None) -> int | None:
    return None if filters is None or filters.ndim < 4 else filters.shape[-1]


def _with_patch(sizes: Variant, patch_size: int | None) -> Variant:
    """A variant with patches of another side, and as many of them."""
    if patch_size is None:
        return sizes
    grid = sizes.img_size // sizes.patch_size
    return dataclasses.replace(sizes, patch_size=patch_size, img_size=grid * patch_size)


def _grid(pos_embed: Tensor | None) -> tuple[int, ...] | None:
    if pos_embed is None or pos_embed.ndim != 5:
        return None
    return tuple(pos_embed.shape[1:4])


def _network(
    sizes: Variant,
    img_size: int | Sequence[int],
    *,
    in_chans: int,
    rel_pos: RelPos,
    drop_path_rate: float,
) -> ImageEncoder3D:
    return ImageEncoder3D(
        **{**sizes.encoder_sizes(), "img_size": img_size},
        in_chans=in_chans,
        rel_pos=rel_pos,
        drop_path_rate=drop_path_rate,
    )


def _checked_numbers(
    in_chans: int, img_size: int | Sequence[int] | None, drop_path_rate: float
) -> tuple[int, int | list[int] | None]:
    """Plain numbers, of whatever integer type they came as."""
    try:
        channels = operator.index(in_chans)
    except TypeError:
        channels = 0
    if channels < 1:
        raise ValueError(f"in_chans={in_chans!r}; give the number of input channels, 1 or more")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(
            f"drop_path_rate={drop_path_rate!r}: expected 0 (none) or a number below 1, such as 0.1"
        )
    if img_size is None:
        return channels, None
    try:
        if isinstance(img_size, Iterable):
            return channels, [operator.index(side) for side in img_size]
        return channels, operator.index(img_size)
    except TypeError:
        raise ValueError(
            f"img_size={img_size!r} is no number of voxels; give one whole number, or three"
        ) from None


def _opened(
    weights: str | os.PathLike[str], variant: str, call: str
) -> tuple[Weights, Path, dict[str, Tensor], dict[str, str]]:
    """The record, place, tensors and metadata of weights, for the function named `call`."""
    if isinstance(weights, str) and weights in WEIGHTS:
        _require_variant(WEIGHTS[weights], variant, call)  # before its download
    record, path = locate(weights)
    tensors, metadata = read(path)
    return from_metadata(record, metadata), path, tensors, metadata


def _require_all_parts(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Refuses files that hold no promptable network, saying what they are for."""
    if CARD_KEY in metadata:
        network = json.loads(metadata[CARD_KEY]).get("network")
        raise CheckpointError(
            f"{path} is a fine-tuned {network}, which takes no prompts; segment with it through "
            "`sammed3d predict`, and for prompts pass weights of the whole network"
        )
    if not all(any(name.startswith(part) for name in tensors) for part in OTHER_PARTS):
        raise CheckpointError(
            f"{path} holds {metadata['layout']}, without the prompt encoder and mask decoder that "
            "prompts need; load its encoder with encoder(...), or pass weights of the whole network"
        )


def _encoder_of_model(
    record: Weights, tensors: Mapping[str, Tensor], card: str
) -> tuple[Weights, dict[str, Tensor]]:
    """The encoder's share of a fine-tuned network, and the record with what its card says."""
    about = json.loads(card)
    mine = part_of(tensors, MODEL_ENCODER)
    if not mine:
        raise CheckpointError(
            f"{record.name} is a fine-tuned {about.get('network')} without an encoder; to segment "
            "with it use `sammed3d predict`, and as weights pass the file that a run of a network "
            "with an encoder wrote"
        )
    if about.get("bottleneck"):
        raise CheckpointError(
            f"{record.name} has bottlenecks in an encoder that stayed as it was; pass the weights "
            "that it began with, or train on from all of it with init="
        )
    if about.get("shared"):
        mine = part_of(mine, MODEL_ENCODER)
    return dataclasses.replace(
        record,
        variant=about["encoder"]["variant"],
        rel_pos=about["encoder"].get("rel_pos", "sammed3d"),
        spacing_mm=Preprocessing.from_dict(about["preprocessing"]).spacing_mm,
        status=f"{record.status}, encoder of a fine-tuned {about['network']}",
    ), mine


def _prune_like(network: ImageEncoder3D, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Removes the blocks and the neck that a fine-tuned encoder has lost; their tensors' names."""
    whole = list(network.state_dict())
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    has_neck = any(name.startswith("neck.") for name in tensors)
    network.prune_intermediate_layers([max(blocks, default=0)], prune_norm=not has_neck)
    kept = network.state_dict().keys()
    return tuple(name for name in whole if name not in kept)


def _without(report: LoadReport, dropped: tuple[str, ...]) -> LoadReport:
    """The report with what a fine-tuned encoder has lost."""
    if dropped:
        parts = sorted({".".join(name.split(".")[: 1 + (name[0] == "b")]) for name in dropped})
        logger.warning(
            "%s is a fine-tuned network whose decoder did not read %s: this encoder lacks it and "
            "is for token maps only; for a whole encoder pass the weights that it started from",
            report.source,
            ", ".join(parts),
        )
    return dataclasses.replace(report, missing=(*report.missing, *dropped))


def _require_variant(record: Weights, variant: str, call: str) -> None:
    if record.variant not in (None, variant):
        raise ValueError(
            f"weights {record.name!r} belong to variant {record.variant!r}, not to {variant!r}; "
            f"call {call}({record.variant!r}, weights={record.name!r})"
        )


def _require_fit(
    record: Weights,
    path: Path,
    tensors: Mapping[str, Tensor],
    variant: str,
    rel_pos: RelPos,
    call: str,
) -> None:
    """Refuses weights of another variant, or trained with positions that were not asked for."""
    _require_variant(record, variant, call)
    if record.rel_pos == "axial" and rel_pos == "sammed3d":
        raise ValueError(
            f"{record.name} was trained with axial relative positions; pass rel_pos='axial'"
        )
    if is_flat(tensors):
        raise CheckpointError(
            f"{path} is of a 2-D network; to inflate a 2-D SAM encoder call "
            f"encoder({variant!r}, weights='sam2d:{path}', rel_pos='axial')"
        )
    found = variant_of(tensors)
    if found not in (None, variant):
        raise CheckpointError(
            f"{path} has the sizes of variant {found!r}, not of {variant!r}; "
            f"call {call}({found!r}, weights=...)"
        )


def _with_positions(report: LoadReport, record: Weights, rel_pos: RelPos) -> LoadReport:
    """The report with a note if the values were trained with the other relative positions."""
    if rel_pos == "sammed3d" or record.rel_pos == "axial":
        return report
    note = Change(
        "relative positions",
        record.rel_pos or "not known",
        rel_pos,
        "the values were not trained with this form: fine-tune before use",
    )
    logger.warning("%s: %s", report.source, note)
    return dataclasses.replace(report, adapted=(*report.adapted, note))


def _repatched(report: LoadReport, network: ImageEncoder3D, patch_size: int) -> LoadReport:
    """Sets the patch size, and the report with the filter if that changed it."""
    before = tuple(network.patch_embed.proj.weight.shape)
    network.set_patch_size(patch_size)
    after = tuple(network.patch_embed.proj.weight.shape)
    if after == before:
        return report
    change = Change(STEM, str(before), str(after), "resampled by the pseudo-inverse")
    return dataclasses.replace(report, reshaped=(*report.reshaped, change))


def _resized(
    report: LoadReport, network: ImageEncoder3D | Sam3D, img_size: int | Sequence[int]
) -> LoadReport:
    """Sets the input size, and the report with the position table if that changed it."""
    before = _position_tables(network)
    network.set_input_size(img_size)
    changes = [
        Change(name, str(before[name]), str(after), "resampled trilinearly")
        for name, after in _position_tables(network).items()
        if after != before[name]
    ]
    return dataclasses.replace(report, reshaped=(*report.reshaped, *changes))


def _position_tables(network: ImageEncoder3D | Sam3D) -> dict[str, Shape]:
    """Shape of the absolute position table by its name in the network."""
    return {n: tuple(p.shape) for n, p in network.named_parameters() if n.endswith("pos_embed")}


def _with_provenance(
    network: Network, record: Weights | None, report: LoadReport | None
) -> Network:
    # Straight into the namespace: torch's stubs allow only tensors and modules as attributes.
    vars(network).update(pretrained_cfg=record, load_report=report)
    return network
