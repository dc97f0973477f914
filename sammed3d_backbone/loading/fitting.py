"""Tensors of a file made to fit a network, with a report of every difference.

`fit` takes tensors and the shapes of a network's tensors; it returns tensors for a strict load and
a `LoadReport`. Independent of model classes, the weights table and the Hub.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sammed3d_backbone.loading.checkpoint import (
    CORNERS,
    OTHER_PARTS,
    STEM,
    UNETR,
    CheckpointError,
    abbreviated,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """One tensor that was altered while loading."""

    name: str
    before: str
    after: str
    rule: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.name}: {self.before} -> {self.after}, {self.rule}"


@dataclass(frozen=True)
class LoadReport:
    """The result of loading for every tensor of a file and of a network.

    Args:
        source: The file.
        layout: Form in which the file holds the tensors.
        matched: Tensors of the network that were loaded, altered ones included.
        missing: Tensors of the network that the file lacks.
        unexpected: Tensors of the file that belong to no known part.
        unused: Tensors of the file's other known parts, which this network does not have.
        reshaped: Tensors that were resampled to another size.
        adapted: Tensors altered by a rule: input channels, number format, meaning.
    """

    source: str = ""
    layout: str = ""
    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    reshaped: tuple[Change, ...] = ()
    adapted: tuple[Change, ...] = ()

    def __str__(self) -> str:
        """The report as a few lines, long lists shortened."""
        parts = Counter(name.split(".")[0] for name in self.unused)
        unused = ", ".join(f"{part} {count}" for part, count in sorted(parts.items()))
        if self.unused and set(self.unused) <= set(CORNERS):
            unused = ", ".join(self.unused)
        rows = [
            f"weights from {self.source or 'memory'} ({self.layout or 'tensors'})",
            f"matched: {len(self.matched)} tensors",
            f"missing: {abbreviated(self.missing)}",
            f"unexpected: {abbreviated(self.unexpected)}",
            f"not used by this network: {unused or 'none'}",
        ]
        for title, changes in (("reshaped", self.reshaped), ("adapted", self.adapted)):
            rows += [f"{title}: {line}" for line in _alike_together(changes)] or [f"{title}: none"]
        return "\n".join(rows)


def _alike_together(changes: Sequence[Change]) -> list[str]:
    """A line for each kind of change, with the tensors that it befell."""
    kinds: dict[Change, list[str]] = {}
    for change in changes:
        kinds.setdefault(dataclasses.replace(change, name=""), []).append(change.name)
    return [
        str(dataclasses.replace(kind, name=abbreviated(names, limit=1)))
        for kind, names in kinds.items()
    ]


def fit(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    *,
    part: str = "",
    channel_kernels: tuple[str, ...] = (STEM,),
    channel_gains: Sequence[float] | None = None,
    source: str = "",
    layout: str = "",
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors of a network, ready for a strict load, and a report of every change.

    Tensors become float32. Input channels are adapted so that the response is kept: a kernel
    for one channel is repeated and divided by their number, so that equal channels give what
    one channel gave; a kernel for several is summed into one.

    Args:
        tensors: Tensors of the file by name.
        shapes: Shapes of the network's tensors, by the names of its state dict.
        part: Prefix under which the file may hold this network as part of a larger one.
        channel_kernels: Endings of the kernels that read the input channels.
        channel_gains: Share of each input channel in place of one over their number, such as
            (1, 0, 0, 0) for the first channel alone. They sum to 1, which keeps the response.
        source: Name of the file, for the report and errors.
        layout: Layout of the file, for the report.

    Raises:
        CheckpointError: If a tensor is missing, left over, misshapen or not finite, or if the
            channels contradict each other.
    """
    source = source or "the weights"
    mine, others = _taken(tensors, shapes, part)
    known = (*OTHER_PARTS, UNETR)
    report = LoadReport(
        source=source,
        layout=layout,
        matched=tuple(name for name in shapes if name in mine),
        missing=tuple(name for name in shapes if name not in mine),
        unexpected=tuple(name for name in others if not name.startswith(known)),
        unused=tuple(name for name in others if name.startswith(known)),
    )
    surplus = [name for name in mine if name not in shapes]
    if report.missing or surplus:
        raise CheckpointError(
            f"{source} does not fit the network: {len(report.missing)} of its {len(shapes)} "
            f"tensors are missing ({abbreviated(report.missing)}), {len(surplus)} are left over "
            f"({abbreviated(surplus)}); choose the variant of the file, or correct its names"
        )
    fitted, adapted, misshapen = {}, [], []
    for name, shape in shapes.items():
        tensor, change = _as_float32(name, mine[name], source)
        adapted += change
        if name.endswith(channel_kernels):
            tensor, change = _with_channels(name, tensor, shape, channel_gains, source)
            adapted += change
        if tuple(tensor.shape) != tuple(shape):
            misshapen.append(f"{name} {tuple(tensor.shape)} instead of {tuple(shape)}")
        fitted[name] = tensor
    if misshapen:
        raise CheckpointError(
            f"{source} does not fit the network: {len(misshapen)} tensors have other shapes "
            f"({abbreviated(misshapen)}); choose the variant and img_size that the file belongs to"
        )
    require_finite(fitted, source)
    return fitted, dataclasses.replace(report, adapted=tuple(adapted))


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Checks that no tensor holds NaN or infinity.

    Raises:
        CheckpointError: If one does.
    """
    non_finite = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if non_finite:
        raise CheckpointError(
            f"{source} holds non-finite values in {abbreviated(non_finite)}; the run that wrote it "
            "had diverged: use an earlier checkpoint, or download the file again"
        )


def require_finite_output(output: Tensor) -> None:
    """Checks what a network has computed; finite weights may give infinite or undefined outputs.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    if not bool(torch.isfinite(output).all()):
        raise ValueError(
            "the network's outputs are not finite (NaN or infinity), so its weights are damaged, "
            "or too large for its number format; copy the file again, or use float32"
        )


def require_float(name: str, tensor: Tensor, source: str) -> None:
    """Checks that a tensor has a floating-point type of at least 16 bits.

    Raises:
        CheckpointError: If it has another type.
    """
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise CheckpointError(
            f"{source} holds {name} as {tensor.dtype}, expected a floating-point type; "
            "save the network in float32"
        )


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, by the names that the part itself gives them."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _taken(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], part: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors of one network under its own names, and the names of the others."""
    if part and any(name.startswith(part) for name in tensors):
        return part_of(tensors, part), [name for name in tensors if not name.startswith(part)]
    roots = {name.split(".")[0] for name in shapes}
    mine = {
        name: tensor
        for name, tensor in tensors.items()
        if name.split(".")[0] in roots and (name in shapes or name not in CORNERS)
    }
    return mine, [name for name in tensors if name not in mine]


def _as_float32(name: str, tensor: Tensor, source: str) -> tuple[Tensor, list[Change]]:
    if tensor.dtype == torch.float32:
        return tensor, []
    require_float(name, tensor, source)
    rule = "rounded" if tensor.dtype == torch.float64 else "widened without loss"
    return tensor.float(), [Change(name, str(tensor.dtype), "torch.float32", rule)]


def _with_channels(
    name: str, kernel: Tensor, shape: Shape, gains: Sequence[float] | None, source: str
) -> tuple[Tensor, list[Change]]:
    """The stem's kernel for another number of input channels.

    Shapes:
        kernel: (E, C, X, Y, Z); the result has the channels of `shape`.
    """
    have, need = kernel.shape[1], shape[1]
    if gains is not None and (have, need) != (1, len(gains)):
        raise CheckpointError(
            f"channel_gains has {len(gains)} entries, {source} is made for {have} input channels "
            f"and the network takes {need}; gains spread one channel over in_chans of them"
        )
    if gains is not None and not math.isclose(sum(gains), 1.0, abs_tol=1e-6):
        raise CheckpointError(
            f"channel_gains {tuple(gains)} sum to {sum(gains):g}; they sum to 1, so that equal "
            "channels keep the response: divide them by their sum"
        )
    if have == need and gains is None:
        return kernel, []
    if have == 1:
        share = torch.tensor(gains if gains is not None else [1 / need] * need)
        adapted = kernel * share.view(1, need, 1, 1, 1)  # (E, C, X, Y, Z)
        rule = f"repeated over {need} channels and divided by {need}"
        if gains is not None:
            rule = f"spread over {need} channels with gains {tuple(gains)}"
    elif need == 1:
        adapted = kernel.sum(dim=1, keepdim=True)  # (E, 1, X, Y, Z)
        rule = f"summed over {have} channels"
    else:
        raise CheckpointError(
            f"{source} is made for {have} input channels and the network takes {need}; which "
            f"channel is which cannot be guessed: build it with in_chans={have}, or start from "
            "weights for one channel"
        )
    return adapted, [Change(name, str(tuple(kernel.shape)), str(tuple(adapted.shape)), rule)]
