"""Files that appear complete or not at all, and paths that stay inside their folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

MAX_NAME_BYTES = 200  # file systems allow 255; endings and temporary names need the rest


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Yields the path of an empty temporary file; on success it becomes the file at `path`.

    The temporary file lies in the same folder and keeps the ending of the name. Its content is
    flushed to the disk before it is renamed, so that a crash or a full disk leaves the earlier file
    or none. On an exception it is removed. Permissions are those that `open` would give.

    Args:
        path: The file to write; its folder exists.
        overwrite: Whether to replace an existing file.

    Raises:
        FileExistsError: If the file exists, or appears meanwhile, and is not to be overwritten.
        FileNotFoundError: If the folder does not exist.
    """
    path = Path(path)
    if not overwrite and path.exists():
        raise _exists(path)
    draft = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # tempfile's are 0o600
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        if overwrite:
            draft.replace(path)
        else:
            _move_to_new(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes or replaces a text file in UTF-8, atomically."""
    with atomic_path(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Writes or replaces a JSON file, atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def inside(folder: Path, name: str, ending: str = "") -> Path:
    """The path of a file or folder directly in `folder`.

    Args:
        folder: Need not exist.
        name: One plain path component.
        ending: Appended to the name, for example ".nii.gz".

    Raises:
        ValueError: If the name could leave the folder; see `plain_name`.
    """
    return folder / f"{plain_name(name)}{ending}"


def file_name(text: str) -> str:
    """A plain name for any text, different for different texts.

    Text that is a plain name of letters, digits, ``_``, ``-`` and ``.`` stays as it is. In other
    text the other characters become ``_`` and a hash of the text is appended.
    """
    name = re.sub(r"[^\w.-]", "_", text)
    if name == text and re.fullmatch(r"\w.{0,99}", text):
        return text
    return f"_{name.lstrip('._')[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def plain_name(name: str, what: str = "name") -> str:
    """The name itself, if it can be that of a file on any system and cannot leave its folder.

    Args:
        name: For example the id of a case.
        what: Kind of name, for the error.

    Raises:
        ValueError: If it is empty, starts with a dot, is longer than 200 bytes, or contains a
            separator, a control character or an unpaired surrogate.
    """
    fault = ""
    if not name:
        fault = "it is empty"
    elif name.startswith("."):
        fault = "it starts with a dot"
    elif "/" in name or "\\" in name:
        fault = "it contains a path separator"
    elif any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in name):
        fault = "it contains a control character or an unpaired surrogate"
    elif len(name.encode()) > MAX_NAME_BYTES:
        fault = f"it has {len(name.encode())} bytes, {MAX_NAME_BYTES} are allowed"
    if fault:
        raise ValueError(f"{what} {name!r} cannot be the name of a file: {fault}; rename it")
    return name


def _move_to_new(draft: Path, path: Path) -> None:
    """Renames a file unless the new name exists."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without hard links
        path.open("xb").close()
        draft.replace(path)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists; choose another name, or allow overwriting")
