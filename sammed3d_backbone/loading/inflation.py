"""Weights of a 2-D SAM encoder made to fit a 3-D one.

`inflate_2d` takes the tensors of timm's `samvit_*` networks, or of the original SAM files, and the
shapes of a 3-D encoder; it returns tensors to load and a report that names every rule. Independent
of model classes, the weights table and the Hub.

Rows of an image become axis 0 of a volume and columns axis 1, as if the network had been trained
on axial slices; axis 2, the depth, is new. Nothing but the copied third table tells depths apart,
so **a volume that is constant along depth gives, at every depth, what the 2-D network gives for
the slice**: in the axial logit (see `models/attention.py`) the key's depth occurs in one term only,
hence the softmax is a product of the 2-D one and of weights over depth, which sum to one over
equal values. The two differ where the grid does not fill the windows in the plane: there the 2-D
network attends to padding, which the axial form leaves out.

Source: filters of equal values over depth as in Carreira and Zisserman, CVPR 2017; at its centre
alone as in Arnab et al., ViViT, ICCV 2021, which keeps the spread of the response.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from sammed3d_backbone.loading.checkpoint import ENCODER, STEM, CheckpointError
from sammed3d_backbone.loading.fitting import Change, LoadReport, Shape, fit

DepthFilter = Literal["center", "mean"]

NECK = "neck."
POSITIONS = "pos_embed"
# The letters d, h, w are the 3-D network's names for axes 0, 1, 2, and h, w the 2-D network's for
# rows and columns.
TABLES = {
    "rel_pos_d": ("rel_pos_h", "that of rows"),
    "rel_pos_h": ("rel_pos_w", "that of columns"),
    "rel_pos_w": ("rel_pos_w", "copied from columns"),
}
# timm's names for what SAM, and this package, call otherwise.
LAYERS = {"mlp.fc1": "mlp.lin1", "mlp.fc2": "mlp.lin2"}


def is_2d(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors belong to a 2-D network, by its patch filters."""
    filters = tensors.get(STEM, tensors.get(f"{ENCODER}{STEM}"))
    return filters is not None and filters.ndim == 4


def inflate_2d(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    *,
    depth_filter: DepthFilter,
    channel_gains: Sequence[float] | None = None,
    source: str = "",
    layout: str = "",
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors of a 3-D encoder without its neck, and a report of every conversion.

    Args:
        tensors: Tensors of a 2-D encoder, or of a whole 2-D SAM, by name.
        shapes: Shapes of the 3-D encoder's tensors, by the names of its state dict.
        depth_filter: "center" puts a patch's filter on the middle voxel along depth, "mean" gives
            every voxel its share.
        channel_gains: See `fitting.fit`; they spread the one channel that RGB is summed into.
        source: Name of the file, for the report and errors.
        layout: Layout of the file, for the report.

    Raises:
        CheckpointError: If the tensors are not those of a 2-D encoder of these sizes.
    """
    source = source or "the weights"
    flat, adapted = _with_our_names(tensors)
    wanted = {name: shape for name, shape in shapes.items() if not name.startswith(NECK)}
    inflated = {name: tensor for name, tensor in flat.items() if not name.startswith(NECK)}
    reshaped: list[Change] = []
    for name, shape in wanted.items():
        origin, axes, rule = _rule(name, depth_filter)
        if rule is None or origin not in flat:  # unchanged, or missing, which `fit` reports
            continue
        before = flat[origin]
        if before.ndim != axes:
            raise CheckpointError(
                f"{source} holds {origin} of shape {tuple(before.shape)}, expected {axes} axes "
                "as in a 2-D SAM encoder; pass weights of timm's samvit_base_patch16 or of the "
                "original SAM, and leave out inflate= for a 3-D network"
            )
        after, how = rule(before, shape)
        inflated[name] = after
        is_resized = name != STEM and after.shape != before.shape
        change = Change(name, str(tuple(before.shape)), str(tuple(after.shape)), how)
        (reshaped if is_resized else adapted).append(change)
    state, report = fit(inflated, wanted, channel_gains=channel_gains, source=source, layout=layout)
    necks = tuple(name for name in flat if name.startswith(NECK))
    neck = Change(
        f"{NECK}*",
        f"2-D, {len(flat[necks[0]])} channels" if necks else "none",
        "random initialisation",
        "a 2-D neck cannot be converted: train it before reading its map",
    )
    return state, dataclasses.replace(
        report,
        missing=tuple(name for name in shapes if name not in wanted),
        unused=(*necks, *report.unused),
        reshaped=_by_kind(reshaped),
        adapted=(*_by_kind(adapted), *report.adapted, neck),
    )


def _with_our_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Change]]:
    """A 2-D network's tensors by the names that the 3-D one has for them, and what was renamed."""
    named, renamed = {}, []
    for name, tensor in tensors.items():
        ours = name.removeprefix(ENCODER)
        for theirs, layer in LAYERS.items():
            if theirs in ours:
                ours = ours.replace(theirs, layer)
                renamed.append(Change(ours, theirs, layer, "renamed"))
        named[ours] = tensor
    return named, renamed


Rule = Callable[[Tensor, Shape], tuple[Tensor, str]]


def _rule(name: str, depth_filter: DepthFilter) -> tuple[str, int, Rule | None]:
    """Source tensor name, its number of axes, and the conversion (None: copy)."""
    if name == STEM:
        return name, 4, partial(_filters, depth_filter)
    if name == POSITIONS:
        return name, 4, _positions
    last = name.rpartition(".")[2]
    if last in TABLES:
        origin, meaning = TABLES[last]
        return name.removesuffix(last) + origin, 2, partial(_table, meaning)
    return name, 0, None


def _filters(depth_filter: DepthFilter, kernels: Tensor, shape: Shape) -> tuple[Tensor, str]:
    """Patch filters with a depth, for one channel.

    Shapes:
        kernels: (E, C, P, P).
        returns: (E, 1, P, P, D), D being the last of `shape`.
    """
    depth = shape[-1]
    gray = kernels.sum(dim=1, keepdim=True)[..., None]  # (E, 1, P, P, 1)
    colours = f"summed over {kernels.shape[1]} colours"
    if depth_filter == "mean":
        return gray.expand(*gray.shape[:-1], depth) / depth, f"{colours}, spread over depth"
    middle = depth // 2
    filled = F.pad(gray, (middle, depth - middle - 1))
    return filled, f"{colours}, at the centre of depth and 0 elsewhere"


def _positions(table: Tensor, shape: Shape) -> tuple[Tensor, str]:
    """A position table on the grid of a volume.

    Shapes:
        table: (1, rows, columns, E).
        returns: (1, x, y, z, E), as in `shape`.
    """
    _, x, y, z, _ = shape
    rule = f"repeated over {z} depths"
    if table.shape[1:3] != (x, y):
        # As timm does for images of another size. Channels stay last in memory: torch resamples
        # contiguous maps to a single column wrongly.
        maps = table.movedim(-1, 1).float()  # (1, E, rows, columns)
        maps = F.interpolate(maps, size=(x, y), mode="bicubic", antialias=True)
        table = maps.movedim(1, -1).to(table.dtype)  # (1, x, y, E)
        rule = f"resampled bicubically in the plane, {rule}"
    return table[:, :, :, None].expand(-1, -1, -1, z, -1), rule


def _table(meaning: str, table: Tensor, shape: Shape) -> tuple[Tensor, str]:
    """A table of relative positions for an axis of another extent.

    Shapes:
        table: (L, C), a row per difference of positions.
        returns: (K, C), as in `shape`.
    """
    length = shape[0]
    if len(table) == length:
        return table, meaning
    rows = table.float().t()[None]  # (1, C, L)
    resampled = F.interpolate(rows, size=length, mode="linear")[0].t()  # (K, C)
    return resampled.to(table.dtype), f"{meaning}, resampled linearly"


def _by_kind(changes: Sequence[Change]) -> tuple[Change, ...]:
    """Merges changes that are the same in all blocks, or for weights and biases, into one line."""
    kinds: dict[Change, int] = {}
    for change in changes:
        name = re.sub(r"^blocks\.\d+\.", "blocks.*.", change.name)
        name = re.sub(r"(?<=lin\d\.)(weight|bias)$", "*", name)
        kind = dataclasses.replace(change, name=name)
        kinds[kind] = kinds.get(kind, 0) + 1
    return tuple(
        dataclasses.replace(kind, rule=f"{kind.rule} ({count} tensors)" if count > 1 else kind.rule)
        for kind, count in kinds.items()
    )
