"""Sizes of the networks, one frozen record per variant.

Everything else about a network is code. What was *trained* at such a size, on which
spacing and with which normalisation, belongs to the weights: `registry.py`.
"""

import difflib
import reprlib
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class DecoderSizes:
    """Sizes of the prompt encoder and mask decoder; their width is the neck's.

    Args:
        mask_in_chans: Width of the convolutions that read a mask prompt.
        num_heads: Attention heads; half the neck's width is a multiple of it.
        mlp_dim: Hidden width of the MLPs.
        iou_head_hidden_dim: Hidden width of the quality head.
        point_pos: Position code of clicks at random initialisation.
        high_resolution: Whether the mask decoder also reads maps of the image at two and four
            times the token grid, see `models.high_resolution`; the released networks do not.
    """

    mask_in_chans: int = 16
    num_heads: int = 8
    mlp_dim: int = 2048
    iou_head_hidden_dim: int = 256
    point_pos: Literal["swapped", "aligned"] = "swapped"
    high_resolution: bool = False


@dataclass(frozen=True)
class Variant:
    """Sizes of one network.

    Args:
        img_size: Side of the cubic input, in voxels.
        patch_size: Side of the cubic patch, in voxels.
        embed_dim: Token width.
        depth: Number of transformer blocks.
        num_heads: Attention heads; `embed_dim` is a multiple of it.
        global_attn_indexes: Blocks whose tokens see the whole grid; the others see windows.
        window_size: Side of an attention window, in tokens.
        out_chans: Width of the neck's map, which is what the mask decoder reads.
        mlp_ratio: Hidden width of a block's MLP over `embed_dim`.
        rel_pos: Form of the relative positions at random initialisation.
        decoder: Sizes of the parts that only the promptable network has.
    """

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    window_size: int = 14
    out_chans: int = 384
    mlp_ratio: float = 4.0
    rel_pos: Literal["sammed3d", "axial"] = "sammed3d"
    decoder: DecoderSizes = DecoderSizes()

    def encoder_sizes(self) -> dict[str, Any]:
        """The arguments of the image encoder."""
        forms = ("rel_pos", "decoder")
        return {name: value for name, value in vars(self).items() if name not in forms}


# `tiny` and `nano` are this project's: 512 tokens from a 64-voxel cube, with all blocks global,
# since 512 tokens need no windows. No released weights have their sizes, so they have axial
# relative positions, which fit any grid, aligned point positions, and masks that read the image.
TINY = Variant(
    img_size=64,
    patch_size=8,
    embed_dim=192,
    depth=12,
    num_heads=3,
    global_attn_indexes=tuple(range(12)),
    out_chans=128,
    rel_pos="axial",
    decoder=DecoderSizes(
        num_heads=8,
        mlp_dim=256,
        iou_head_hidden_dim=64,
        point_pos="aligned",
        high_resolution=True,
    ),
)
# `vit_b` is the reference's `vit_b_ori`, the only size with public weights; the reference's own
# `vit_b`, `vit_l` and `vit_h` were never published with weights and are the `_256` rows here.
VARIANTS: dict[str, Variant] = {
    "tiny": TINY,
    "nano": replace(
        TINY,
        embed_dim=96,
        depth=5,
        num_heads=2,
        global_attn_indexes=tuple(range(5)),
        out_chans=64,
        decoder=replace(TINY.decoder, num_heads=4),
    ),
    "vit_b": Variant(
        img_size=128,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        global_attn_indexes=(2, 5, 8, 11),
    ),
    "vit_b_256": Variant(
        img_size=256,
        patch_size=16,
        embed_dim=384,
        depth=12,
        num_heads=12,
        global_attn_indexes=(2, 5, 8, 11),
    ),
    "vit_l_256": Variant(
        img_size=256,
        patch_size=16,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        global_attn_indexes=(5, 11, 17, 23),
    ),
    "vit_h_256": Variant(
        img_size=256,
        patch_size=16,
        embed_dim=1280,
        depth=32,
        num_heads=16,
        global_attn_indexes=(7, 15, 23, 31),
    ),
}


def variant(name: str) -> Variant:
    """The sizes registered under a name.

    Raises:
        ValueError: If no variant has that name.
    """
    try:
        return VARIANTS[name]
    except (KeyError, TypeError):
        near = difflib.get_close_matches(str(name), VARIANTS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown variant {reprlib.repr(name)}; known: {sorted(VARIANTS)}.{hint}"
        ) from None


def list_variants() -> list[str]:
    """Names of the network sizes, for `encoder(variant)` and `sam(variant)`."""
    return sorted(VARIANTS)
