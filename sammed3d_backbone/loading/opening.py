"""Weights opened once: record, file, tensors, metadata, and whether a call can use them."""

import dataclasses
import json
import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.loading.checkpoint import OTHER_PARTS, CheckpointError, read
from sammed3d_backbone.loading.fitting import part_of
from sammed3d_backbone.loading.hub import fetch, resolve
from sammed3d_backbone.loading.inflation import is_2d
from sammed3d_backbone.loading.registry import Weights, default_weights, from_metadata
from sammed3d_backbone.loading.stored_sizes import variant_of
from sammed3d_backbone.loading.variants import variant as variant_sizes
from sammed3d_backbone.models.attention import RelPos

CARD_KEY = "sammed3d_backbone"  # metadata entry of a fine-tuned model, see inference/card.py
MODEL_ENCODER = "encoder."  # prefix of the encoder's tensors in it
DEFAULT_VARIANT = "vit_b"


class OpenedWeights(NamedTuple):
    """A weights file that was read."""

    record: Weights
    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def open_weights(
    weights: str | os.PathLike[str] | None,
    weights_file: str | None = None,
    *,
    variant: str | None = None,
    call: str = "encoder",
    check_hash: bool = True,
) -> OpenedWeights:
    """Finds and reads weights once; arguments and errors are those of `hub.locate`.

    Args:
        weights: A name, a path, or `hf-hub:OWNER/REPO[@REV]`; None is the variant's default.
        weights_file: File in a Hub repository.
        variant: Refuse weights that the table lists for another variant, before a download.
        call: Name of the function to call with the right variant, for the error.
        check_hash: See `checkpoint.read`.
    """
    if weights is None:
        weights = default_weights(str(variant))
    record, path = resolve(weights, weights_file)
    if variant is not None:
        _require_variant(record, variant, call)
    path = path or fetch(record)
    tensors, metadata = read(path, check_hash=check_hash)
    return OpenedWeights(from_metadata(record, metadata), path, tensors, metadata)


def variant_for(weights: str | os.PathLike[str] | None) -> str:
    """The variant of weights, by the table, a fine-tuned model's card or a file's sizes.

    `vit_b` if nothing says so, as for weights on the Hub that are not in the table; nothing is
    downloaded. Errors are those of `hub.resolve` and `checkpoint.read`.
    """
    if weights is None:
        return DEFAULT_VARIANT
    record, path = resolve(weights)
    if record.variant is None and path is not None:
        return variant_in(OpenedWeights(record, path, *read(path)))
    return record.variant or DEFAULT_VARIANT


def variant_in(opened: OpenedWeights) -> str:
    """The variant of weights that were read, see `variant_for`."""
    card = json.loads(opened.metadata.get(CARD_KEY, "{}")).get("encoder", {})
    found: str | None = opened.record.variant or card.get("variant") or variant_of(opened.tensors)
    return found or DEFAULT_VARIANT


def encoder_of_model(opened: OpenedWeights) -> OpenedWeights:
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
        rel_pos=card["encoder"].get("rel_pos") or variant_sizes(card["encoder"]["variant"]).rel_pos,
        preprocessing=preprocessing and Preprocessing.from_dict(preprocessing),
        status=f"{opened.record.status}, encoder of a fine-tuned {card['network']}",
    )
    return opened._replace(record=record, tensors=mine)


def require_all_parts(opened: OpenedWeights) -> None:
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


def require_fit(opened: OpenedWeights, variant: str, rel_pos: RelPos, call: str) -> None:
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


def _require_variant(record: Weights, variant: str, call: str) -> None:
    if record.variant not in (None, variant):
        raise ValueError(
            f"weights {record.name!r} are for variant {record.variant!r}, not {variant!r}; "
            f"call {call}({record.variant!r}, weights={record.name!r})"
        )
