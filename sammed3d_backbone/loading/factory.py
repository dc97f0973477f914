"""From a variant and weights to a network that is ready to use.

Combines the sizes (`variants.py`), the weights table (`registry.py`), files (`hub.py`,
`checkpoint.py`) and the networks. Random initialisation is never implicit.
"""

import dataclasses
import json
import logging
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.loading.checkpoint import ENCODER, OTHER_PARTS, CheckpointError, read
from sammed3d_backbone.loading.fitting import STEM, Change, LoadReport, Shape, fit, part_of
from sammed3d_backbone.loading.hub import fetch, resolve
from sammed3d_backbone.loading.inflation import DepthFilter, inflate_2d, is_2d
from sammed3d_backbone.loading.registry import Weights, default_weights, from_metadata
from sammed3d_backbone.loading.variants import VARIANTS, Variant
from sammed3d_backbone.loading.variants import variant as variant_sizes
from sammed3d_backbone.models.attention import RelPos
from sammed3d_backbone.models.image_encoder import ImageEncoder3D
from sammed3d_backbone.models.prompt_encoder import PointPos
from sammed3d_backbone.models.sam import Sam3D

logger = logging.getLogger(__name__)

CARD_KEY = "sammed3d_backbone"  # metadata entry of a fine-tuned model, see inference/card.py
MODEL_ENCODER = "encoder."  # prefix of the encoder's tensors in it
# Its shape tells with which position code of clicks a decoder was trained.
FREQUENCIES = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


def encoder(
    variant: str = "vit_b",
    *,
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    weights_file: str | None = None,
    inflate: DepthFilter | None = None,
    in_chans: int = 1,
    img_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    rel_pos: RelPos = "sammed3d",
    drop_path_rate: float = 0.0,
    channel_gains: Sequence[float] | None = None,
) -> ImageEncoder3D:
    """The image encoder of a variant, with pretrained weights by default.

    The network carries the weights' record as `pretrained_cfg` and the report of loading as
    `load_report`; both are None after random initialisation.

    Args:
        variant: A name in `list_variants()`.
        pretrained: Load weights; False is random initialisation.
        weights: A name in `list_weights()`, a .safetensors or .pth file, or
            `hf-hub:OWNER/REPO[@REV]`; None is the variant's default, which `vit_b` downloads once.
            For a fine-tuned model, loads its (pruned) encoder: blocks and neck that the decoder
            did not read are listed in the report as missing.
        weights_file: File in a Hub repository; None is `model.safetensors`.
        inflate: Convert the weights of a 2-D SAM encoder: "center" puts the patch filter at the
            middle voxel along depth, "mean" spreads it. Needs rel_pos="axial"; the neck is
            randomly initialised. See `inflation.py`.
        in_chans: Input channels. Kernels for one channel are repeated and divided by their
            number, so that equal channels give the response of one.
        img_size: Input side in voxels, or three of them with rel_pos="axial"; None is the size that
            the weights were stored with. The position table is resampled.
        patch_size: Side of a patch in voxels; None is that of the weights. The filter is
            resampled, exactly for larger patches.
        rel_pos: "sammed3d" as all public weights were trained; "axial" is the correct form, which
            needs fine-tuning when the weights were trained with the other.
        drop_path_rate: Stochastic depth of the last block.
        channel_gains: Share of each input channel instead of one over their number; they sum to 1.
            (1, 0, 0, 0) begins with the first channel alone.

    Raises:
        ValueError: If a name is unknown, or arguments contradict each other or the weights.
        CheckpointError: If the file does not hold the whole encoder of this variant.
        FileNotFoundError: If there is no such file.
        OSError: If the Hub refuses access or cannot be reached (errors of huggingface_hub).

    Example:
        >>> network = encoder("tiny", pretrained=False)
        >>> network.img_size
        (64, 64, 64)
    """
    sizes = variant_sizes(variant)
    _check_numbers(in_chans, drop_path_rate)
    img_size = _plain_size(img_size)
    options: dict[str, Any] = {
        "in_chans": operator.index(in_chans),
        "rel_pos": rel_pos,
        "drop_path_rate": drop_path_rate,
    }
    if not pretrained:
        _require_none(
            weights=weights, weights_file=weights_file, inflate=inflate, channel_gains=channel_gains
        )
        return _network(_with_patch(sizes, patch_size), img_size, **options)
    opened = open_weights(
        default_weights(variant) if weights is None else weights, weights_file, variant=variant
    )
    if inflate is not None:
        if rel_pos != "axial":
            raise ValueError("inflate= converts weights of a 2-D network: pass rel_pos='axial'")
        stored = _patch(_without_prefix(opened.tensors).get(STEM))
        patch_size = patch_size or stored or sizes.patch_size
        network = _network(_with_patch(sizes, patch_size), img_size, **options)
        report = _fill_from_2d(network, opened, inflate, stored, channel_gains)
        record = dataclasses.replace(opened.record, rel_pos=rel_pos)
    else:
        is_model = CARD_KEY in opened.metadata
        if is_model:
            opened = _encoder_of_model(opened)
        _require_fit(opened, variant, rel_pos, "encoder")
        record = opened.record
        network = encoder_like(opened.tensors, variant, **options)
        dropped = _prune_like(network, opened.tensors) if is_model else ()
        state, report = fit(
            opened.tensors,
            _shapes(network),
            part=ENCODER,
            channel_gains=channel_gains,
            source=str(opened.path),
            layout=opened.metadata["layout"],
        )
        network.load_state_dict(state)
        report = _with_rel_pos(_without(report, dropped), record, rel_pos)
    if patch_size is not None:
        report = _repatched(report, network, patch_size)
    if img_size is not None:
        report = _resized(report, network, img_size)
    network.pretrained_cfg = dataclasses.replace(record, variant=variant)
    network.load_report = report
    return network


def sam(
    variant: str = "vit_b",
    *,
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    weights_file: str | None = None,
    img_size: int | Sequence[int] | None = None,
    rel_pos: RelPos = "sammed3d",
    point_pos: PointPos | None = None,
) -> Sam3D:
    """The whole promptable network of a variant, with pretrained weights by default.

    It carries `pretrained_cfg` and `load_report` as an encoder does. `encoder(...)` loads its part
    from the same files.

    Args:
        variant: A name in `list_variants()`.
        pretrained: Load weights; False is random initialisation.
        weights: See `encoder`; the file has to hold all three parts.
        weights_file: File in a Hub repository; None is `model.safetensors`.
        img_size: Input side in voxels, or three of them with rel_pos="axial" and
            point_pos="aligned"; None is the size that the weights were stored with. The position
            table is resampled.
        rel_pos: Relative positions of the encoder, see `encoder`.
        point_pos: Position code of clicks: "swapped", or "aligned" for training from scratch; None
            is that of the weights, or of the variant at random initialisation.

    Raises:
        ValueError: If a name is unknown, or arguments contradict each other or the weights.
        CheckpointError: If the file does not hold the whole network of this variant.
        FileNotFoundError: If there is no such file.
        OSError: If the Hub refuses access or cannot be reached (errors of huggingface_hub).

    Example:
        >>> network = sam("tiny", pretrained=False)
        >>> network.prompt_encoder.mask_size
        (32, 32, 32)
    """
    decoder = variant_sizes(variant).decoder
    img_size = _plain_size(img_size)
    if not pretrained:
        _require_none(weights=weights, weights_file=weights_file)
        image_encoder = encoder(variant, pretrained=False, img_size=img_size, rel_pos=rel_pos)
        sizes = {**vars(decoder), "point_pos": point_pos or decoder.point_pos}
        return Sam3D.around(image_encoder, **sizes)
    opened = open_weights(
        default_weights(variant) if weights is None else weights,
        weights_file,
        variant=variant,
        call="sam",
    )
    _require_all_parts(opened)
    _require_fit(opened, variant, rel_pos, "sam")
    network = sam_like(opened.tensors, variant, rel_pos=rel_pos)
    stored = network.prompt_encoder.point_pos
    if point_pos not in (None, stored):
        raise ValueError(
            f"{opened.record.name} was trained with point_pos={stored!r}, not {point_pos!r}; leave "
            "point_pos out, or pass pretrained=False"
        )
    state, report = fit(
        opened.tensors,
        _shapes(network),
        source=str(opened.path),
        layout=opened.metadata["layout"],
    )
    network.load_state_dict(state)
    report = _with_rel_pos(report, opened.record, rel_pos)
    if img_size is not None:
        report = _resized(report, network, img_size)
    network.pretrained_cfg = dataclasses.replace(opened.record, variant=variant, point_pos=stored)
    network.load_report = report
    return network


def sam_like(tensors: Mapping[str, Tensor], variant: str, *, rel_pos: RelPos = "sammed3d") -> Sam3D:
    """A randomly initialised promptable network with the sizes and forms of stored tensors."""
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
    """A randomly initialised encoder whose position tables have the sizes of stored ones.

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

    For a 2-D encoder, the variant that it inflates to; its neck's width is not compared.
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
    compared = seen[:-1] if is_2d(tensors) else seen
    for name, v in VARIANTS.items():
        sizes = (v.patch_size, v.embed_dim, v.depth, v.num_heads, v.out_chans)
        if compared == sizes[: len(compared)]:
            return name
    return None


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(ENCODER): tensor for name, tensor in tensors.items()}


def _patch(filters: Tensor | None) -> int | None:
    return None if filters is None or filters.ndim < 4 else filters.shape[-1]


def _with_patch(sizes: Variant, patch_size: int | None) -> Variant:
    """A variant with the same number of patches, of another side."""
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
    img_size: int | Sequence[int] | None,
    **options: Any,  # noqa: ANN401
) -> ImageEncoder3D:
    size = sizes.img_size if img_size is None else img_size
    return ImageEncoder3D(**{**sizes.encoder_sizes(), "img_size": size}, **options)


def _shapes(network: ImageEncoder3D | Sam3D) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _require_none(**arguments: object) -> None:
    """Refuses arguments that mean nothing at random initialisation."""
    if given := [name for name, value in arguments.items() if value is not None]:
        raise ValueError(
            f"{given[0]}={arguments[given[0]]!r} contradicts pretrained=False; leave one out"
        )


def _check_numbers(in_chans: int, drop_path_rate: float) -> None:
    if not hasattr(in_chans, "__index__") or in_chans < 1:
        raise ValueError(f"in_chans={in_chans!r}: expected the number of input channels, 1 or more")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate={drop_path_rate!r}: expected 0 or more, and below 1")


def _plain_size(img_size: int | Sequence[int] | None) -> int | list[int] | None:
    """The input size as Python integers, which may come as NumPy's."""
    if img_size is None:
        return None
    try:
        if isinstance(img_size, Iterable):
            return [operator.index(side) for side in img_size]
        return operator.index(img_size)
    except TypeError:
        raise ValueError(
            f"img_size={img_size!r}: expected one whole number of voxels, or three"
        ) from None


class OpenedWeights(NamedTuple):
    """A weights file that was read."""

    record: Weights
    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def open_weights(
    weights: str | os.PathLike[str],
    weights_file: str | None = None,
    *,
    variant: str | None = None,
    call: str = "encoder",
) -> OpenedWeights:
    """Finds and reads weights once; arguments and errors are those of `hub.locate`.

    Args:
        weights: A name, a path, or `hf-hub:OWNER/REPO[@REV]`.
        weights_file: File in a Hub repository.
        variant: Refuse weights that the table lists for another variant, before a download.
        call: Name of the function to call with the right variant, for the error.
    """
    record, path = resolve(weights, weights_file)
    if variant is not None:
        _require_variant(record, variant, call)
    path = path or fetch(record)
    tensors, metadata = read(path)
    return OpenedWeights(from_metadata(record, metadata), path, tensors, metadata)


def _fill_from_2d(
    network: ImageEncoder3D,
    opened: OpenedWeights,
    depth_filter: DepthFilter,
    patch_size: int | None,
    channel_gains: Sequence[float] | None,
) -> LoadReport:
    """Loads the weights of a 2-D encoder with patches of `patch_size`, all but the neck."""
    if patch_size is not None:
        network.set_patch_size(patch_size)
    empty = network.state_dict()
    state, report = inflate_2d(
        opened.tensors,
        _shapes(network),
        depth_filter=depth_filter,
        channel_gains=channel_gains,
        source=str(opened.path),
        layout=opened.metadata["layout"],
    )
    network.load_state_dict({**empty, **state})
    logger.warning("%s: %s", report.source, report.adapted[-1])  # the random neck
    return report


def _require_all_parts(opened: OpenedWeights) -> None:
    """Refuses files without a promptable network."""
    if CARD_KEY in opened.metadata:
        network = json.loads(opened.metadata[CARD_KEY]).get("network")
        raise CheckpointError(
            f"{opened.path} is a fine-tuned {network}, which takes no prompts; run "
            "`sammed3d predict` with it, or pass weights of a whole promptable network"
        )
    if not all(any(name.startswith(part) for name in opened.tensors) for part in OTHER_PARTS):
        raise CheckpointError(
            f"{opened.path} holds {opened.metadata['layout']}, but no prompt encoder and mask "
            "decoder; load its encoder with encoder(...), or pass weights of the whole network"
        )


def _encoder_of_model(opened: OpenedWeights) -> OpenedWeights:
    """The encoder of a fine-tuned model, and a record with what its card says."""
    card = json.loads(opened.metadata[CARD_KEY])
    name = opened.record.name
    mine = part_of(opened.tensors, MODEL_ENCODER)
    if not mine:
        raise CheckpointError(
            f"{name} is a fine-tuned {card.get('network')} without an encoder; run `sammed3d "
            "predict` with it, and as weights pass the file of a network with an encoder"
        )
    if card.get("bottleneck"):
        raise CheckpointError(
            f"{name} has bottlenecks beside an encoder that was frozen; pass the weights that it "
            "started from, or resume from the whole network with init="
        )
    if card.get("shared"):
        mine = part_of(mine, MODEL_ENCODER)
    preprocessing = card.get("preprocessing")
    record = dataclasses.replace(
        opened.record,
        variant=card["encoder"]["variant"],
        rel_pos=card["encoder"].get("rel_pos", "sammed3d"),
        preprocessing=preprocessing and Preprocessing.from_dict(preprocessing),
        status=f"{opened.record.status}, encoder of a fine-tuned {card['network']}",
    )
    return opened._replace(record=record, tensors=mine)


def _prune_like(network: ImageEncoder3D, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Prunes an encoder like the stored one; returns the names of the removed tensors."""
    whole = list(network.state_dict())
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    has_neck = any(name.startswith("neck.") for name in tensors)
    network.prune_intermediate_layers([max(blocks, default=0)], prune_norm=not has_neck)
    kept = network.state_dict().keys()
    return tuple(name for name in whole if name not in kept)


def _without(report: LoadReport, dropped: tuple[str, ...]) -> LoadReport:
    """The report with the tensors that a pruned encoder lacks."""
    if dropped:
        parts = sorted({".".join(name.split(".")[: 1 + (name[0] == "b")]) for name in dropped})
        logger.warning(
            "%s is a fine-tuned model whose decoder did not read %s: this encoder lacks it and "
            "gives token maps only; for a whole encoder pass the weights that it started from",
            report.source,
            ", ".join(parts),
        )
    return dataclasses.replace(report, missing=(*report.missing, *dropped))


def _require_variant(record: Weights, variant: str, call: str) -> None:
    if record.variant not in (None, variant):
        raise ValueError(
            f"weights {record.name!r} are for variant {record.variant!r}, not {variant!r}; "
            f"call {call}({record.variant!r}, weights={record.name!r})"
        )


def _require_fit(opened: OpenedWeights, variant: str, rel_pos: RelPos, call: str) -> None:
    """Refuses weights of another variant, of a 2-D network, or trained with axial positions."""
    _require_variant(opened.record, variant, call)
    if opened.record.rel_pos == "axial" and rel_pos != "axial":
        raise ValueError(f"{opened.record.name} was trained with rel_pos='axial'; pass that")
    if is_2d(opened.tensors):
        raise CheckpointError(
            f"{opened.path} holds a 2-D network; to convert a 2-D SAM encoder call "
            f"encoder({variant!r}, weights=..., inflate='center', rel_pos='axial')"
        )
    found = variant_of(opened.tensors)
    if found not in (None, variant):
        raise CheckpointError(
            f"{opened.path} has the sizes of variant {found!r}, not of {variant!r}; "
            f"call {call}({found!r}, weights=...)"
        )


def _with_rel_pos(report: LoadReport, record: Weights, rel_pos: RelPos) -> LoadReport:
    """The report with a note if the weights were trained with other relative positions."""
    if rel_pos == "sammed3d" or record.rel_pos == "axial":
        return report
    note = Change(
        "relative positions",
        record.rel_pos or "not known",
        rel_pos,
        "the weights were not trained with this form: fine-tune before use",
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
