"""The interface between encoders and adapters, as a type and as a check.

An encoder turns a volume into token maps of one resolution. Adapters rely on the names below and
on nothing else, so a foreign encoder that has them works in every adapter. The words are timm's.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

READ_BY_ALL = (
    "depth",
    "embed_dim",
    "forward_intermediates",
    "in_chans",
    "patch_size",
    "prune_intermediate_layers",
)


class Encoder(Protocol):
    """A plain 3-D encoder with one token grid.

    Attributes:
        in_chans: Input channels C.
        img_size: Input sides in voxels that `forward_intermediates` takes.
        patch_size: Voxels per token along each axis: a power of two.
        embed_dim: Channels E of every block's map.
        out_chans: Channels F of the final map.
        depth: Number of blocks.
    """

    in_chans: int
    img_size: tuple[int, int, int]
    patch_size: int
    embed_dim: int
    out_chans: int

    @property
    def depth(self) -> int:
        """Number of blocks."""

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> Any:  # noqa: ANN401 (a list with intermediates_only=True)
        """The final map (B, F, x, y, z) unless left out, and maps (B, E, x, y, z) of blocks."""

    def prune_intermediate_layers(
        self, indices: Sequence[int] | None = None, *, prune_norm: bool = False
    ) -> list[int]:
        """Drops blocks behind the last index and, with `prune_norm`, what makes the final map."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""

    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions, each anchored with ^, that sort parameters by depth."""


def check_encoder(encoder: Encoder) -> None:
    """Runs an encoder once and checks everything that adapters rely on.

    Args:
        encoder: A module; a copy of it is run, so it stays as it is.

    Raises:
        TypeError: If a name of the contract is missing.
        ValueError: If what comes out is not what the attributes promise.
    """
    wanted = [name for name in dir(Encoder) if not name.startswith("_")]
    wanted += [name for name in Encoder.__annotations__ if name not in wanted]
    require_encoder(encoder, wanted)
    patch = encoder.patch_size
    if patch < 2 or patch & (patch - 1) or any(n % patch for n in encoder.img_size):
        raise ValueError(
            f"patch_size={patch} with img_size={encoder.img_size}: decoders double the grid stage "
            f"by stage, so patch_size has to be a power of two that divides every side"
        )
    _check_groups(encoder)
    module: Any = encoder
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    volume = torch.randn(2, encoder.in_chans, *encoder.img_size, generator=generator).to(device)
    _check_maps(copy.deepcopy(module).eval(), volume)
    for index in sorted({0, encoder.depth - 1}):
        _check_pruning(copy.deepcopy(module).eval(), volume, index)


def require_encoder(encoder: object, names: Sequence[str] = READ_BY_ALL) -> None:
    """Refuses what lacks names of the contract; nothing is run.

    Args:
        encoder: Anything.
        names: The names; by default those without which no network is built.

    Raises:
        TypeError: If a name is missing.
    """
    missing = [name for name in names if not hasattr(encoder, name)]
    if missing or not isinstance(encoder, nn.Module):
        raise TypeError(
            f"{type(encoder).__name__} lacks {missing or 'torch.nn.Module as a base'}; give "
            "encoder(...), or a module as sammed3d_backbone.adapters.contract.Encoder describes it"
        )


def _check_groups(encoder: Encoder) -> None:
    """Patterns of depth groups must hold under an adapter's prefix."""
    for rules in encoder.group_matcher().values():
        for pattern in [rules] if isinstance(rules, str) else [rule for rule, _ in rules]:
            if any(not part.startswith("^") for part in pattern.split("|")):
                raise ValueError(
                    f"group_matcher's {pattern!r} would match anywhere in a longer name, and an "
                    f"adapter adds a prefix; begin each alternative with ^"
                )


def _check_maps(encoder: Encoder, volume: Tensor) -> None:
    """Number, shapes and values of the maps, and that volumes of a batch do not mix."""
    grid = tuple(n // encoder.patch_size for n in encoder.img_size)
    with torch.no_grad():
        final, maps = encoder.forward_intermediates(volume, indices=range(encoder.depth))
        alone = encoder.forward_intermediates(volume[1:], indices=[0], intermediates_only=True)
    _expect("the final map", final, (2, encoder.out_chans, *grid), "out_chans")
    if len(maps) != encoder.depth:
        raise ValueError(f"{len(maps)} maps for {encoder.depth} blocks; return one for every index")
    for i, block_map in enumerate(maps):
        _expect(f"the map of block {i}", block_map, (2, encoder.embed_dim, *grid), "embed_dim")
    if not torch.allclose(maps[0][1:], alone[0], rtol=1e-3, atol=1e-4):
        raise ValueError(
            "a volume's map depends on its neighbours in the batch; "
            "replace norms over the batch by norms over channels or tokens"
        )


def _check_pruning(encoder: Encoder, volume: Tensor, index: int) -> None:
    """After pruning, every parameter has to get a gradient from the map that stays."""
    module = cast("nn.Module", encoder)
    module.requires_grad_()
    encoder.prune_intermediate_layers([index], prune_norm=True)
    (kept,) = encoder.forward_intermediates(volume, indices=[index], intermediates_only=True)
    if kept.requires_grad:
        kept.square().mean().backward()
    idle = [name for name, p in module.named_parameters() if p.grad is None]
    if idle:
        raise ValueError(
            f"after prune_intermediate_layers([{index}], prune_norm=True) {len(idle)} parameters "
            f"get no gradient, {idle[0]} for one, which stalls multi-process training; remove "
            f"there what the chosen maps do not need"
        )


def _expect(what: str, value: Tensor, shape: tuple[int, ...], attribute: str) -> None:
    """Compares a map's shape with what the attributes promise."""
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{what} is {tuple(value.shape)} where {attribute} and patch_size promise {shape}; "
            f"return channels first and set {attribute} to what comes out"
        )
    if not bool(value.isfinite().all()):
        raise ValueError(f"{what} holds NaN or infinity on a random volume; check its weights")
