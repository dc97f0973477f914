"""Files that appear complete or not at all, and paths that stay inside their folder."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

LOCK = ".lock"  # in a folder that a process writes results into
# Of errors that say that nothing more can be written, whatever the input.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
MALFORMED = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
    csv.Error,
)
MAX_NAME_BYTES = 200  # file systems allow 255; endings and temporary names need the rest
MAX_TEXT_BYTES = 2**28  # of a file of text that is read at once


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
    # A long name is cut in front, since file systems allow 255 bytes.
    draft = path.with_name(f".{secrets.token_hex(4)}.{path.name[-50:]}")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # tempfile's are 0o600
    try:
        yield draft
        sync(draft)
        if overwrite:
            draft.replace(path)
        else:
            _move_to_new(draft, path)
        with contextlib.suppress(OSError):  # not every file system knows it for folders
            sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder, if need be with those above it.

    Raises:
        NotADirectoryError: If a file has its name or that of a folder above it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path} is a file or lies below one; give a folder") from None


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder of results, made if need be, against other processes.

    The lock is the operating system's, so it ends with the process, however that ends. Its file
    names the process for the others, and is removed at the end.

    Raises:
        FileExistsError: If another process holds the folder.
        NotADirectoryError: See `make_folder`.
    """
    import fcntl  # not on Windows

    make_folder(folder)
    path = folder / LOCK
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise FileExistsError(
                    f"{folder} is in use by {file.read(200) or 'another process'}; wait for its "
                    "end, stop it, or choose another folder"
                ) from None
            if not _is_named(file.fileno(), path):
                continue  # its holder removed it between opening and locking
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def copy_file(source: Path, target: Path, *, overwrite: bool = True) -> None:
    """Copies a file atomically; arguments and errors are those of `atomic_path`."""
    with atomic_path(target, overwrite=overwrite) as draft:
        shutil.copyfile(source, draft)


def write_text(path: Path, text: str, *, overwrite: bool = True) -> None:
    """Writes a text file in UTF-8; arguments and errors are those of `atomic_path`."""
    with atomic_path(path, overwrite=overwrite) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Writes or replaces a JSON file, atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def require_file(path: Path) -> None:
    """Refuses what may block or never end when it is read: devices, FIFOs and sockets.

    Raises:
        FileNotFoundError: If nothing has that name.
        IsADirectoryError: If it is a folder.
        ValueError: If it is not a regular file.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file in it")
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}; check the path")
    if not path.is_file():
        raise ValueError(f"{path} is a device, FIFO or socket; save its content as a file first")


def read_text(path: Path) -> str:
    """The content of a file of text in UTF-8, with or without a byte-order mark.

    Raises:
        FileNotFoundError: If nothing has that name.
        IsADirectoryError: If it is a folder.
        ValueError: If it is not a regular file, not text, or too large to be what it should be.
    """
    require_file(path)
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, and a file of text may have {MAX_TEXT_BYTES:,}; give "
            "another file, or split it"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it so") from None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what values of wrong types in a file lead to into an error that names the file.

    Raises:
        ValueError: If the file is not of the expected form.
    """
    try:
        yield
    except MALFORMED as error:
        if isinstance(error, ValueError) and path.name in str(error):
            raise
        text = str(error)
        raise ValueError(
            f"{path} is not of the expected form ({type(error).__name__}: {text[:200]}); correct "
            "it, or copy it again"
        ) from None


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


def without_folders(text: str, paths: Iterable[Path]) -> str:
    """A message in which the folders of some files are left out, for results that are passed on."""
    for folder in {path.parent for path in paths} - {Path()}:
        text = text.replace(f"{folder}{os.sep}", "")
    return text


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


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists; choose another name, or allow overwriting")
