"""Weights files: tensors and metadata out of a file without running it, and into a file.

Independent of model classes, the weights table and the Hub. The only module that reads pickles.
"""

import hashlib
import json
import os
import threading
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from sammed3d_backbone.files import atomic_path, require_file

ENCODER = "image_encoder."
# Parts of the promptable network that an encoder does not use.
OTHER_PARTS = ("prompt_encoder.", "mask_decoder.")
# The decoder of a UNETR on the encoder of the same file, see `unetr_decoder.py`.
UNETR = "unetr."
# The convolution that reads the input channels, on axis 1 of its kernel.
STEM = "patch_embed.proj.weight"
# Box corners of the challenge's files: stored, but their training gave no boxes.
CORNERS = tuple(f"prompt_encoder.point_embeddings.{i}.weight" for i in (2, 3))
MOST_SHARED = 8  # bytes of tensors for a byte of a file, where tensors share memory
# Prefixes that wrappers of torch, Lightning and others put before the names of a network.
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")
# Keys under which training checkpoints hold the tensors.
STATES = ("model_state_dict", "state_dict", "model", "net", "network")


class CheckpointError(ValueError):
    """A weights file that cannot be used; the message says why and what to do."""


def abbreviated(names: Sequence[str], limit: int = 4) -> str:
    """The first few names of a list and how many more there are."""
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class _Inert:
    """Stands in for a plain object of a pickle: stores its arguments and does nothing."""

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
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
)
# torch keeps its list of allowed globals per process; two readers must not clear each other's.
_ALLOWING = threading.Lock()


def read(
    path: str | os.PathLike[str], *, check_hash: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weights file by name, and what the file says about itself.

    Wrapper prefixes (`module.`) are removed; everything else keeps its name, number format and
    value. Nothing in the file is run.

    Args:
        path: A .safetensors file, or one written by `torch.save`.
        check_hash: Refuse tensors that do not fit the "content_sha256" of the file's metadata.

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
        raise IsADirectoryError(
            f"{path} is a folder; give the weights file inside it: {abbreviated(inside)}"
        )
    require_file(path)
    with path.open("rb") as file:
        start = file.read(512)
    _refuse_other_files(path, start)
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path, start)
        layout = "safetensors"
    else:
        tensors, metadata, layout = _read_torch(path, start)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; is it the right file?")
    if check_hash and metadata.get("content_sha256") not in (None, content_sha256(tensors)):
        raise CheckpointError(
            f"{path} was altered since it was written: its tensors do not fit its content_sha256; "
            "copy or download it again"
        )
    tensors, wrappers = _unwrapped(tensors)
    parts = [layout, *(f"prefix {wrapper!r} removed" for wrapper in wrappers), _extent(tensors)]
    return tensors, {**metadata, "layout": ", ".join(parts)}


def _refuse_other_files(path: Path, start: bytes) -> None:
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
    if start[8:9] == b"{" and (b'"dtype"' in start or start[9:23] == b'"__metadata__"'):
        raise CheckpointError(f"{path} looks like safetensors; rename it to .safetensors")
    _refuse_bomb(path)
    stand_ins: list[object] = [(_Inert, name) for name in _PLAIN_GLOBALS]
    with _ALLOWING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error below says what torch warns of
        try:
            with safe_globals(stand_ins):  # type: ignore[arg-type]
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged pickles raise nearly anything
            raise CheckpointError(_refusal(path)) from error
    return _tensors_in(path, content)


def _refuse_bomb(path: Path) -> None:
    """Refuses an archive that unpacks to more than its own size; `torch.save` does not compress."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError):
        return  # torch says what is wrong
    if unpacked > path.stat().st_size:
        raise CheckpointError(
            f"{path} would unpack to {unpacked:,} bytes, and torch.save does not compress; save "
            "it again with torch.save"
        )


def _refusal(path: Path) -> str:
    """The reason why torch's restricted reader refused a file, without its advice to trust it."""
    try:
        unsafe = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001 (another format of pickles, or damaged in any way)
        unsafe = []
    if unsafe := [name for name in unsafe if name not in _PLAIN_GLOBALS]:
        return (
            f"{path} refused: its pickle imports {abbreviated(unsafe)}, which is code and not "
            "tensors; nothing was run. Save `model.state_dict()` instead of the model or trainer, "
            "and do not trust a file from elsewhere"
        )
    return (
        f"{path} is not a readable weights file: it is damaged, or its pickle holds more than "
        "tensors; nothing was run. Download it again, or save `model.state_dict()` with torch.save"
    )


def _tensors_in(path: Path, content: object) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors and plain facts of an unpickled file, and the layout they were in."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not tensors by name; save "
            "`model.state_dict()` instead"
        )
    layout, tensors = "bare", content
    for key in STATES:
        if isinstance(content.get(key), Mapping):
            layout, tensors = key, content[key]
            break
    strange = [str(name) for name, value in tensors.items() if not _is_plain(name, value)]
    if strange:
        raise CheckpointError(
            f"{path} holds {abbreviated(strange)} where dense tensors by name are needed; save "
            f"`model.state_dict()`, bare or under one of {', '.join(STATES)}"
        )
    claimed = sum(tensor.nbytes for tensor in tensors.values())
    if claimed > MOST_SHARED * path.stat().st_size:
        raise CheckpointError(
            f"{path} claims tensors of {claimed:,} bytes, far more than it holds; save contiguous "
            "tensors"
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
    """The plain values of a training checkpoint beside its tensors, as text."""
    facts = {}
    for key, value in content.items():
        if isinstance(value, _Inert) and isinstance(value.state, Mapping):
            state = _without_folders(value.state)
            facts[str(key)] = json.dumps(state, default=lambda _: "not read", sort_keys=True)
        elif isinstance(value, (str, int, float)):
            facts[str(key)] = str(_without_folders(value))
    return facts


def _without_folders(value: object) -> object:
    """Plain values with the names of files, but not of the folders that they lay in."""
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        return PurePath(value).name
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    return [*map(_without_folders, value)] if isinstance(value, list | tuple) else value


def _unwrapped(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without the prefixes that wrappers put before the names of a network.

    What lies beside the network, such as a criterion, keeps its name.
    """
    removed = []
    stems = [name for name in tensors if name.endswith(STEM)]
    while found := next(
        (w for w in WRAPPERS if all(name.startswith(w) for name in stems or tensors)), None
    ):
        stems = [name.removeprefix(found) for name in stems]
        tensors = {name.removeprefix(found): tensor for name, tensor in tensors.items()}
        removed.append(found)
    return tensors, removed


def _extent(tensors: Mapping[str, Tensor]) -> str:
    """The parts of the promptable network that the tensors cover."""
    if any(name.startswith(OTHER_PARTS) for name in tensors):
        extent = "full model of the challenge" if CORNERS[0] in tensors else "full model"
    elif any(name.startswith(ENCODER) for name in tensors):
        extent = f"encoder only, under {ENCODER!r}"
    else:
        extent = "encoder only"
    if any(name.startswith(UNETR) for name in tensors):
        extent += " and the decoder of a UNETR"
    return f"{extent}, {len(tensors)} tensors"


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, number formats, shapes and values, the same in every file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file with sorted metadata, which the library writes in random order."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + text.ljust(size) + content[8 + size :]


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Writes tensors as a safetensors file, atomically; equal content gives equal bytes.

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
        draft.write_bytes(_with_sorted_metadata(safetensors.torch.save(plain, entries)))
