"""Networks in the sizes of stored tensors, with random initialisation.

Which variant a file holds, and which grids its position tables were made for, follow from the
shapes of its tensors alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sammed3d_backbone.loading.checkpoint import ENCODER, STEM
from sammed3d_backbone.loading.inflation import is_2d
from sammed3d_backbone.loading.variants import VARIANTS, Variant
from sammed3d_backbone.loading.variants import variant as variant_sizes
from sammed3d_backbone.models.attention import RelPos
from sammed3d_backbone.models.image_encoder import ImageEncoder3D
from sammed3d_backbone.models.sam import Sam3D

# Its shape shows with which position code of clicks a decoder was trained.
FREQUENCIES = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


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
    sizes = with_patch_size(variant_sizes(variant), stored_patch_size(stored))
    grid: tuple[int, ...] = (sizes.img_size // sizes.patch_size,) * 3
    if (table := stored.get("pos_embed")) is not None and table.ndim == 5:
        grid = tuple(table.shape[1:4])
    built = grid
    if sizes.global_attn_indexes:
        block = f"blocks.{sizes.global_attn_indexes[0]}.attn.rel_pos_"
        tables = [stored[name] for axis in "dhw" if (name := f"{block}{axis}") in stored]
        if len(tables) == 3 and all(table.ndim == 2 for table in tables):
            built = tuple((len(table) + 1) // 2 for table in tables)
    network = build_encoder(
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


def build_encoder(
    sizes: Variant,
    img_size: int | Sequence[int] | None,
    **options: Any,  # noqa: ANN401
) -> ImageEncoder3D:
    """An encoder with a variant's sizes; `img_size` None is that of the variant."""
    size = sizes.img_size if img_size is None else img_size
    return ImageEncoder3D(**{**sizes.encoder_sizes(), "img_size": size}, **options)


def with_patch_size(sizes: Variant, patch_size: int | None) -> Variant:
    """A variant with the same number of patches, of another side."""
    if patch_size is None:
        return sizes
    grid = sizes.img_size // sizes.patch_size
    return dataclasses.replace(sizes, patch_size=patch_size, img_size=grid * patch_size)


def stored_patch_size(tensors: Mapping[str, Tensor]) -> int | None:
    """The side of the patches that stored tensors of an encoder, 2-D or 3-D, were made for."""
    filters = _without_prefix(tensors).get(STEM)
    return None if filters is None or filters.ndim < 4 else filters.shape[-1]


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that the encoder itself gives them."""
    return {name.removeprefix(ENCODER): tensor for name, tensor in tensors.items()}
