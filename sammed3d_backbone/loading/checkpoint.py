"""Reads weights files without running them, and makes their tensors fit a network.

In goes a path, out come plain tensors by name and what the file says about itself; in go
tensors and the shapes that a network asks for, out come tensors to load strictly and a report
of every difference. Knows no network, table or download. The only place that reads pickles.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import pickletools
import threading
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sammed3d_backbone.files import atomic_path

Shape = tuple[int, ...]

ENCODER = "image_encoder."
# Parts of the promptable network that an encoder does not use.
OTHER_PARTS = ("prompt_encoder.", "mask_decoder.")
# Box corners of the challenge's files: stored, but their training gave no boxes.
CORNERS = tuple(f"prompt_encoder.point_embeddings.{i}.weight" for i in (2, 3))
# The convolution that sees the input channels, on axis 1 of its kernel.
STEM = "patch_embed.proj.weight"
# Prefixes that wrappers of torch put before every name.
WRAPPERS = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """A weights file that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Change:
    """One tensor that was altered on its way into the network.

    Args:
        name: Of the tensor, as the network has it.
        before: What the file holds: a shape or a dtype.
        after: What the network got.
        rule: How.
    """

    name: str
    before: str
    after: str
    rule: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.name}: {self.before} -> {self.after}, {self.rule}"


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a file, and of every tensor that a network has.

    Args:
        source: The file, or where it came from.
        layout: Form in which the file holds the tensors.
        matched: Tensors of the network that the file filled, altered ones included.
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
            f"missing: {_some(self.missing)}",
            f"unexpected: {_some(self.unexpected)}",
            f"not used by this network: {unused or 'none'}",
        ]
        rows += [f"reshaped: {change}" for change in self.reshaped] or ["reshaped: none"]
        rows += [f"adapted: {change}" for change in self.adapted] or ["adapted: none"]
        return "\n".join(rows)


def _some(names: Sequence[str], limit: int = 4) -> str:
    """A list of names that stays readable."""
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --- reading ---------------------------------------------------------------------------------


class _Inert:
    """Takes the place of a plain object in a pickle: holds what it was given, does nothing."""

    def __init__(self, *given: object) -> None:
        self.given = given
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


# Training runs of the original code pickle their arguments, derived ones also paths and numpy
# numbers. None of these classes is imported or called: `_Inert` stands in for each.
_PLAIN_GLOBALS = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
)
# torch keeps its list of allowed globals per process; two readers must not clear each other's.
_ALLOWING = threading.Lock()


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weights file by name, and what the file says about itself.

    Wrapper prefixes (`module.`) are removed; everything else keeps its name, number format and
    value. Nothing in the file is run.

    Args:
        path: A .safetensors file, or one written by `torch.save`.

    Returns:
        Tensors on the CPU, and the file's metadata; its entry "layout" says in which form the
        tensors were found.

    Raises:
        CheckpointError: If the file is not a weights file, is damaged, or would run code.
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If the path is a folder.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pth"))
        raise IsADirectoryError(f"{path} is a folder; give a weights file, inside: {_some(inside)}")
    with path.open("rb") as file:
        start = file.read(512)
    _refuse_what_is_no_checkpoint(path, start)
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path, start)
        layout = "safetensors"
    else:
        tensors, metadata, layout = _read_torch(path, start)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; is it the right file?")
    tensors, wrappers = _unwrapped(tensors)
    parts = [layout, *(f"prefix {wrapper!r} removed" for wrapper in wrappers), _extent(tensors)]
    return tensors, {**metadata, "layout": ", ".join(parts)}


def _refuse_what_is_no_checkpoint(path: Path, start: bytes) -> None:
    text = start.lstrip().lower()
    if not start:
        raise CheckpointError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository "
            "or download the file from the Hub"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path} is a web page saved under the name of weights; download the file itself "
            "(on the Hub the address has /resolve/, not /blob/)"
        )


def _read_safetensors(path: Path, start: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        hint = "download or convert it again"
        if start.startswith((b"PK", b"\x80")):
            hint = "it looks like a file of torch.save: rename it to .pth"
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); {hint}") from (
            error
        )


def _read_torch(path: Path, start: bytes) -> tuple[dict[str, Tensor], dict[str, str], str]:
    if start[8:9] == b"{" and b'"dtype"' in start:
        raise CheckpointError(f"{path} looks like safetensors; rename it to .safetensors")
    stand_ins: list[object] = [(_Inert, name) for name in _PLAIN_GLOBALS]
    with _ALLOWING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and pickletools warn of what the error below says
        try:
            with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged pickles raise nearly anything
            raise CheckpointError(_why_not(path, error)) from error
    return _tensors_in(path, content)


def _why_not(path: Path, error: Exception) -> str:
    """A sentence on a file that torch's restricted reader refused."""
    # What tensors are made of; anything worse under these names is in torch's own message.
    known = (*_PLAIN_GLOBALS, "torch.", "collections.", "_codecs.")
    asked, protocol = _imports_of(path)
    refused = [name for name in asked if name.removeprefix("builtins.") in str(error)]
    refused = refused or [name for name in asked if not name.startswith(known)]
    if refused:
        return (
            f"{path} refused: its pickle asks for {_some(refused)}, which is code and not "
            "tensors; nothing of it was run. If it is yours, save `model.state_dict()` instead "
            "of the model or trainer; otherwise do not trust the file"
        )
    if protocol > 3:
        return (
            f"{path} was pickled with a protocol that the safe reader does not know; load it "
            "where it was made and write it with torch.save's default protocol, or as safetensors"
        )
    reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0].split(". ")[0]
    return f"{path} is not a weights file, or is damaged or cut short ({reason}); get it again"


def _imports_of(path: Path) -> tuple[list[str], int]:
    """Names that a file's pickles would import, and their protocol, without running them."""
    names: set[str] = set()
    texts: list[str] = []
    memo: list[str] = []
    protocol = 0
    for opcode, argument in _opcodes(path):
        if opcode == "PROTO":
            protocol = max(protocol, int(str(argument)))
        elif opcode in ("GLOBAL", "INST"):
            names.add(str(argument).replace(" ", ".").replace("__builtin__", "builtins"))
        elif opcode == "STACK_GLOBAL":
            names.add(".".join(texts[-2:]))
        elif "UNICODE" in opcode:
            texts.append(str(argument))
        elif opcode == "MEMOIZE":
            memo.append(texts[-1] if texts else "")
        elif opcode in ("BINGET", "LONG_BINGET") and int(str(argument)) < len(memo):
            texts.append(memo[int(str(argument))])
    return sorted(names), protocol


def _opcodes(path: Path) -> Iterator[tuple[str, object]]:
    """Operations of a file's pickles by name, up to the first damage."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.namelist():
                    if entry.endswith("data.pkl"):
                        for opcode, argument, _ in pickletools.genops(archive.read(entry)):
                            yield opcode.name, argument
        else:
            # In memory, where a damaged length reads to the end instead of allocating it.
            with path.open("rb") as file:
                content = io.BytesIO(file.read(1 << 26))
            while True:  # the old format is several pickles, then bytes that end the loop
                for opcode, argument, _ in pickletools.genops(content):
                    yield opcode.name, argument
    except (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return


def _tensors_in(path: Path, content: object) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors and plain facts of an unpickled file, and the layout they were in."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not tensors by name; save "
            "`model.state_dict()` instead"
        )
    layout, tensors = "bare", content
    for key in ("model_state_dict", "state_dict"):
        if isinstance(content.get(key), Mapping):
            layout, tensors = key, content[key]
            break
    strange = [str(name) for name, value in tensors.items() if not _is_plain(name, value)]
    if strange:
        raise CheckpointError(
            f"{path} holds {_some(strange)} where dense tensors by name are needed; save "
            "`model.state_dict()`, bare or under 'model_state_dict' or 'state_dict'"
        )
    facts = {} if layout == "bare" else _facts(content)
    return {name: value.detach() for name, value in tensors.items()}, facts, layout


def _is_plain(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
    )


def _facts(content: Mapping[object, object]) -> dict[str, str]:
    """What a training checkpoint says besides its tensors, as text."""
    facts = {}
    for key, value in content.items():
        if isinstance(value, _Inert) and isinstance(value.state, Mapping):
            facts[str(key)] = json.dumps(value.state, default=lambda _: "not read", sort_keys=True)
        elif isinstance(value, (str, int, float)):
            facts[str(key)] = str(value)
    return facts


def _unwrapped(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without the prefixes that wrappers put before all of their names."""
    removed = []
    while found := next((w for w in WRAPPERS if all(n.startswith(w) for n in tensors)), None):
        tensors = {name.removeprefix(found): tensor for name, tensor in tensors.items()}
        removed.append(found)
    return tensors, removed


def _extent(tensors: Mapping[str, Tensor]) -> str:
    """How much of the promptable network is there."""
    if any(name.startswith(OTHER_PARTS) for name in tensors):
        extent = "full model of the challenge" if CORNERS[0] in tensors else "full model"
    elif any(name.startswith(ENCODER) for name in tensors):
        extent = f"encoder only, under {ENCODER!r}"
    else:
        extent = "encoder only"
    return f"{extent}, {len(tensors)} tensors"


# --- fitting ---------------------------------------------------------------------------------


def fit(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    *,
    part: str = "",
    channel_gains: Sequence[float] | None = None,
    source: str = "",
    layout: str = "",
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors that a network asks for, ready for a strict load, and what was done to them.

    Numbers become float32. Input channels are adapted so that the response is kept: a kernel
    for one channel is repeated and divided by their number, so that equal channels give what
    one channel gave; a kernel for several is summed into one.

    Args:
        tensors: What a file holds.
        shapes: What the network holds, by the names of its state dict.
        part: Prefix under which the file may hold this network as part of a larger one.
        channel_gains: Share of each input channel in place of one over their number, such as
            (1, 0, 0, 0) to begin with the first alone. They sum to 1, which keeps the response.
        source: Named in the report and in errors.
        layout: Named in the report.

    Raises:
        CheckpointError: If a tensor is missing, left over, misshapen or not finite, or if the
            channels contradict each other.
    """
    source = source or "the weights"
    mine, others = _taken(tensors, shapes, part)
    report = LoadReport(
        source=source,
        layout=layout,
        matched=tuple(name for name in shapes if name in mine),
        missing=tuple(name for name in shapes if name not in mine),
        unexpected=tuple(name for name in others if not name.startswith(OTHER_PARTS)),
        unused=tuple(name for name in others if name.startswith(OTHER_PARTS)),
    )
    surplus = [name for name in mine if name not in shapes]
    if report.missing or surplus:
        raise CheckpointError(
            f"{source} does not fit the network: {len(report.missing)} of its {len(shapes)} "
            f"tensors are missing ({_some(report.missing)}), {len(surplus)} are left over "
            f"({_some(surplus)}); choose the variant that the file belongs to, or repair its names"
        )
    fitted, adapted, misshapen = {}, [], []
    for name, shape in shapes.items():
        tensor, change = _as_float32(name, mine[name], source)
        adapted += change
        if name.endswith(STEM):
            tensor, change = _with_channels(name, tensor, shape, channel_gains, source)
            adapted += change
        if tuple(tensor.shape) != tuple(shape):
            misshapen.append(f"{name} {tuple(tensor.shape)} instead of {tuple(shape)}")
        fitted[name] = tensor
    if misshapen:
        raise CheckpointError(
            f"{source} does not fit the network: {len(misshapen)} tensors have other shapes "
            f"({_some(misshapen)}); choose the variant and img_size that the file belongs to"
        )
    endless = [name for name, tensor in fitted.items() if not bool(torch.isfinite(tensor).all())]
    if endless:
        raise CheckpointError(
            f"{source} holds values that are not finite in {_some(endless)}; the run that made "
            "it had diverged: use an earlier checkpoint, or get the file again"
        )
    return fitted, dataclasses.replace(report, adapted=tuple(adapted))


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
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float64):
        raise CheckpointError(
            f"{source} holds {name} as {tensor.dtype}, which is no number format of weights; "
            "save the network in float32"
        )
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


# --- writing ---------------------------------------------------------------------------------


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, number formats, shapes and values, the same in every file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Write tensors as a safetensors file, which appears whole or not at all.

    Args:
        path: Ends in .safetensors.
        tensors: By name; number formats and values are kept exactly.
        metadata: Text by name; the hash of the content is added as "content_sha256".
        overwrite: Replace a file that exists.

    Raises:
        FileExistsError: If the file exists and is not to be replaced.
        FileNotFoundError: If its folder does not exist.
        ValueError: If the path does not end in .safetensors.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} would hold safetensors; give it the ending .safetensors")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, or allow overwriting")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; make it first")
    # Cloned, since safetensors refuses tensors that share memory.
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    entries = {"format": "pt", **metadata, "content_sha256": content_sha256(plain)}
    with atomic_path(path, overwrite=overwrite) as draft:
        safetensors.torch.save_file(plain, draft, metadata=entries)
