"""NRRD file <-> array and affine, by pynrrd."""

from __future__ import annotations

import bz2
import gzip
import io
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import nrrd
import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.nifti import MAX_BYTES
from sammed3d_backbone.files import inside, require_file

# Signs that turn the axes of a space towards R, A, S.
SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
}
SPACES |= {"".join(word[0] for word in name.split("-")): SPACES[name] for name in [*SPACES]}
CHANNEL_KINDS = ("domain", "list", "vector", "time", "point", "normal", "stub", "none", "???")
MAX_ITEM_BYTES = 8


def read_nrrd(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Voxels and affine of a file; the axis of channels, if any, comes first.

    Shapes:
        returns: (X, Y, Z) or (C, X, Y, Z), and (4, 4), voxel -> RAS+ mm.

    Raises:
        ValueError: If it cannot be read, or its axes have no place in the body.
    """
    try:
        with path.open("rb") as file:
            header = nrrd.read_header(file)
            affine, channels = _affine(header)
            content = _content(path, header, file)
        plain = {
            key: header[key] for key in ("type", "dimension", "sizes", "endian") if key in header
        }
        array = nrrd.read_data({**plain, "encoding": "raw"}, io.BytesIO(content))
    except (
        nrrd.NRRDError,
        ValueError,
        KeyError,
        IndexError,
        StopIteration,
        OSError,
        EOFError,
        zlib.error,
    ) as error:
        reason = " ".join(str(error).split()) or "its header ends early"
        raise ValueError(f"{path} cannot be read as NRRD ({reason}); convert it again") from None
    array = array.astype(np.float32, copy=False)
    return (array if channels is None else np.moveaxis(array, channels, 0)), affine


def write_nrrd(path: Path, array: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Writes or replaces a file, compressed, in the space that ITK and 3D Slicer use.

    Shapes:
        array: (X, Y, Z) or (C, X, Y, Z).
        affine: (4, 4), voxel -> RAS+ mm.
    """
    signs = np.array(SPACES["lps"])
    channels = array.ndim - 3
    nrrd.write(
        str(path),
        array,
        {
            "space": "left-posterior-superior",
            "kinds": ["list"] * channels + ["domain"] * 3,
            "space directions": np.vstack(
                [np.full((channels, 3), np.nan), affine[:3, :3].T * signs]
            ),
            "space origin": affine[:3, 3] * signs,
            "encoding": "gzip",
        },
        compression_level=4,
    )


def _affine(header: Mapping[str, Any]) -> tuple[NDArray[np.float64], int | None]:
    """The affine, and which axis is that of channels."""
    space = str(header.get("space", "none")).lower()
    directions, origin = header.get("space directions"), header.get("space origin")
    if space not in SPACES or directions is None or origin is None:
        raise ValueError(
            f"space {space!r}, directions {'given' if directions is not None else 'missing'}, "
            f"origin {'given' if origin is not None else 'missing'}: its axes have no place in the "
            "body; expected a space such as left-posterior-superior with both"
        )
    if unknown := {*header.get("space units", ())} - {"mm"}:
        raise ValueError(f"space units {sorted(unknown)}: expected mm")
    rows = np.asarray(directions, dtype=np.float64)
    in_space = ~np.isnan(rows).all(axis=1)
    if in_space.sum() != 3 or len(rows) > 4:
        raise ValueError(f"{in_space.sum()} of {len(rows)} axes lie in space: expected 3 of 3 or 4")
    channels = None
    if len(rows) == 4:
        channels = int((~in_space).argmax())
        kind = str((header.get("kinds") or ["none"] * 4)[channels])
        if kind not in CHANNEL_KINDS:
            raise ValueError(
                f"axis {channels} is of kind {kind} instead of intensities: expected one number "
                "per voxel, or channels as a list"
            )
    signs = np.array(SPACES[space])
    affine = np.eye(4)
    affine[:3, :3] = (rows[in_space] * signs).T
    affine[:3, 3] = np.asarray(origin, dtype=np.float64) * signs
    return affine, channels


def _content(path: Path, header: Mapping[str, Any], file: IO[bytes]) -> bytes:
    """The unpacked voxels, of this file or of the one beside it, as far as the header says."""
    sizes = [int(n) for n in header["sizes"]]
    limit = math.prod(sizes) * MAX_ITEM_BYTES
    if min(sizes) < 1 or limit > MAX_BYTES:
        raise ValueError(f"it claims {tuple(sizes)} voxels in its header")
    for field in ("line skip", "lineskip", "byte skip", "byteskip"):
        if int(header.get(field, 0)):
            raise ValueError(f"{field} is not supported")
    beside = header.get("data file", header.get("datafile"))
    if beside is not None:
        other_path = inside(path.parent, beside)
        require_file(other_path)
        with other_path.open("rb") as other:
            return _content(path, {**header, "data file": None, "datafile": None}, other)
    encoding = str(header["encoding"]).lower()
    if encoding in ("gzip", "gz"):
        with gzip.GzipFile(fileobj=file) as packed:
            return packed.read(limit + 1)
    if encoding in ("bzip2", "bz2"):
        with bz2.BZ2File(file) as unpacked:
            return unpacked.read(limit + 1)
    if encoding != "raw":
        raise ValueError(f"encoding {encoding}: expected raw, gzip or bzip2")
    return file.read(limit + 1)
