"""From a variant and weights to a network that is ready to use.

Combines the sizes (`variants.py`), the weights table (`registry.py`), files (`hub.py`,
`checkpoint.py`) and the networks. Random initialisation is never implicit.
"""

import dataclasses
import logging
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sammed3d_backbone.loading.checkpoint import ENCODER, STEM
from sammed3d_backbone.loading.fitting import Change, LoadReport, Shape, fit
from sammed3d_backbone.loading.inflation import DepthFilter, inflate_2d
from sammed3d_backbone.loading.opening import (
    CARD_KEY,
    OpenedWeights,
    encoder_of_model,
    open_weights,
    require_all_parts,
    require_fit,
)
from sammed3d_backbone.loading.registry import Weights
from sammed3d_backbone.loading.stored_sizes import (
    build_encoder,
    encoder_like,
    sam_like,
    stored_patch_size,
    with_patch_size,
)
from sammed3d_backbone.loading.variants import variant as variant_sizes
from sammed3d_backbone.models.attention import RelPos
from sammed3d_backbone.models.image_encoder import ImageEncoder3D
from sammed3d_backbone.models.prompt_encoder import PointPos
from sammed3d_backbone.models.sam import Sam3D

logger = logging.getLogger(__name__)


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
    rel_pos: RelPos | None = None,
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
        rel_pos: "sammed3d", as the released weights were trained, or "axial", the correct form.
            None is that of the weights, or of the variant if they do not say; weights trained with
            "sammed3d" need fine-tuning with the other.
        drop_path_rate: Stochastic depth of the last block.
        channel_gains: Share of each input channel instead of one over their number; they sum to 1.
            (1, 0, 0, 0) uses the first channel alone.

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
    _check_numbers(in_chans, drop_path_rate, patch_size)
    _require_choice(pretrained)
    img_size = _plain_size(img_size)
    options: dict[str, Any] = {
        "in_chans": operator.index(in_chans),
        "drop_path_rate": drop_path_rate,
    }
    if not pretrained:
        _require_none(
            weights=weights, weights_file=weights_file, inflate=inflate, channel_gains=channel_gains
        )
        options["rel_pos"] = rel_pos or sizes.rel_pos
        return build_encoder(with_patch_size(sizes, patch_size), img_size, **options)
    opened = open_weights(weights, weights_file, variant=variant)
    rel_pos = rel_pos or stored_rel_pos(opened.record, variant, inflate)
    options["rel_pos"] = rel_pos
    if inflate is not None:
        if rel_pos != "axial":
            raise ValueError("inflate= converts weights of a 2-D network: pass rel_pos='axial'")
        stored = stored_patch_size(opened.tensors)
        patch_size = patch_size or stored or sizes.patch_size
        network = build_encoder(with_patch_size(sizes, patch_size), img_size, **options)
        report = _fill_from_2d(network, opened, inflate, stored, channel_gains)
        record = dataclasses.replace(opened.record, rel_pos=rel_pos)
    else:
        is_model = CARD_KEY in opened.metadata
        if is_model:
            opened = encoder_of_model(opened)
        require_fit(opened, variant, rel_pos, "encoder")
        record = opened.record
        network = encoder_like(opened.tensors, variant, **options)
        dropped = _prune_like(network, opened.tensors) if is_model else ()
        report = _fill(network, opened, part=ENCODER, channel_gains=channel_gains)
        report = _with_rel_pos(_without(report, dropped), record, rel_pos)
    network.load_report = _resampled(report, network, img_size, patch_size)
    network.pretrained_cfg = dataclasses.replace(record, variant=variant)
    network.channel_gains = None if channel_gains is None else tuple(channel_gains)
    return network


def sam(
    variant: str = "vit_b",
    *,
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    weights_file: str | None = None,
    img_size: int | Sequence[int] | None = None,
    rel_pos: RelPos | None = None,
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
    _require_choice(pretrained)
    if not pretrained:
        _require_none(weights=weights, weights_file=weights_file)
        image_encoder = encoder(variant, pretrained=False, img_size=img_size, rel_pos=rel_pos)
        sizes = {**vars(decoder), "point_pos": point_pos or decoder.point_pos}
        return Sam3D.around(image_encoder, **sizes)
    opened = open_weights(weights, weights_file, variant=variant, call="sam")
    return sam_of(opened, variant, img_size=img_size, rel_pos=rel_pos, point_pos=point_pos)


def sam_of(
    opened: OpenedWeights,
    variant: str,
    *,
    img_size: int | Sequence[int] | None = None,
    rel_pos: RelPos | None = None,
    point_pos: PointPos | None = None,
) -> Sam3D:
    """The network of weights that were read; arguments and errors are those of `sam`."""
    require_all_parts(opened)
    rel_pos = rel_pos or stored_rel_pos(opened.record, variant)
    require_fit(opened, variant, rel_pos, "sam")
    network = sam_like(opened.tensors, variant, rel_pos=rel_pos)
    stored = network.prompt_encoder.point_pos
    if point_pos not in (None, stored):
        raise ValueError(
            f"{opened.record.name} was trained with point_pos={stored!r}, not {point_pos!r}; leave "
            "point_pos out, or pass pretrained=False"
        )
    report = _with_rel_pos(_fill(network, opened), opened.record, rel_pos)
    network.load_report = _resampled(report, network, img_size)
    network.pretrained_cfg = dataclasses.replace(opened.record, variant=variant, point_pos=stored)
    return network


def stored_rel_pos(record: Weights, variant: str, inflate: DepthFilter | None = None) -> RelPos:
    """The relative positions to use with weights when the caller leaves them open."""
    if inflate is not None:
        return "axial"
    return record.rel_pos or variant_sizes(variant).rel_pos


def _shapes(network: ImageEncoder3D | Sam3D) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _require_none(**arguments: object) -> None:
    """Refuses arguments that mean nothing at random initialisation."""
    if given := [name for name, value in arguments.items() if value is not None]:
        raise ValueError(
            f"{given[0]}={arguments[given[0]]!r} contradicts pretrained=False; leave one out"
        )


def _require_choice(pretrained: bool) -> None:
    """Refuses text such as "no", which would count as yes."""
    if pretrained not in (True, False):
        raise TypeError(f"pretrained={pretrained!r}: expected True or False")


def _check_numbers(in_chans: int, drop_path_rate: float, patch_size: int | None) -> None:
    if not hasattr(in_chans, "__index__") or in_chans < 1:
        raise ValueError(f"in_chans={in_chans!r}: expected the number of input channels, 1 or more")
    if not isinstance(drop_path_rate, int | float) or not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate={drop_path_rate!r}: expected 0 or more, and below 1")
    if patch_size is not None and not hasattr(patch_size, "__index__"):
        raise ValueError(f"patch_size={patch_size!r}: expected one whole number of voxels")


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


def _fill(
    network: ImageEncoder3D | Sam3D,
    opened: OpenedWeights,
    part: str = "",
    channel_gains: Sequence[float] | None = None,
) -> LoadReport:
    """Loads the weights of a whole network; arguments are those of `fit`."""
    state, report = fit(
        opened.tensors,
        _shapes(network),
        part=part,
        channel_gains=channel_gains,
        source=str(opened.path),
        layout=opened.metadata["layout"],
    )
    network.load_state_dict(state)
    return report


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


def _resampled(
    report: LoadReport,
    network: ImageEncoder3D | Sam3D,
    img_size: int | Sequence[int] | None,
    patch_size: int | None = None,
) -> LoadReport:
    """Sets patch size and input size; the report gets the tensors that this resampled."""
    before = _shapes(network)
    if patch_size is not None and isinstance(network, ImageEncoder3D):
        network.set_patch_size(patch_size)
    if img_size is not None:
        network.set_input_size(img_size)
    rules = {STEM: "resampled by the pseudo-inverse", "pos_embed": "resampled trilinearly"}
    changes = [
        Change(name, str(before[name]), str(shape), rule)
        for ending, rule in rules.items()
        for name, shape in _shapes(network).items()
        if name.endswith(ending) and shape != before[name]
    ]
    return dataclasses.replace(report, reshaped=(*report.reshaped, *changes))
