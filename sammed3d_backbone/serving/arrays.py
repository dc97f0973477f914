"""Arrays on the wire of nnInteractive's clients: a header, then chunks compressed by blosc2.

Layout, little endian: `NNIA`, version 1, codec, number of axes, length of the type's name (a byte
each); the name in ASCII; the shape as int64; the number of chunks as uint32; per chunk its length
before and after compression as uint64, and its bytes. C order.

Whatever a header declares is checked against a limit before memory is asked for.
"""

from __future__ import annotations

import math
import struct

import blosc2
import numpy as np
from numpy.typing import NDArray

MAGIC = b"NNIA"
VERSION = 1
CODECS = {1: blosc2.Codec.ZSTD, 2: blosc2.Codec.LZ4}
# By the names that clients send: "float32", or "f4" before version 2.5.1. A table, because NumPy
# evaluates what it does not know.
DTYPES = {
    name: dtype
    for dtype in map(np.dtype, ("bool", *"bhilqBHILQefd"))
    for name in (dtype.name, dtype.str[1:])
}
CHUNK_BYTES = 2**30
MAX_AXES = 8
FRAME_HEADER_BYTES = 16  # a blosc2 chunk is never shorter


def packed(array: NDArray[np.generic]) -> bytes:
    """An array as bytes, by ZSTD at level 1.

    Shapes:
        array: any; of bool, integer or float type.
    """
    array = np.asarray(array, order="C")
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    name = array.dtype.name.encode()
    raw = array.reshape(-1).view(np.uint8).data
    starts = range(0, len(raw), CHUNK_BYTES)
    head = struct.pack("<4s4B", MAGIC, VERSION, 1, array.ndim, len(name)) + name
    parts = [head, struct.pack(f"<{array.ndim}qI", *array.shape, len(starts))]
    for start in starts:
        chunk = raw[start : start + CHUNK_BYTES]
        # With another typesize blosc2 cannot read back a buffer of zeros of some lengths.
        frame = blosc2.compress2(
            chunk,
            codec=CODECS[1],
            clevel=1,
            typesize=array.itemsize,
            filters=[blosc2.Filter.NOFILTER],
        )
        parts += [struct.pack("<QQ", len(chunk), len(frame)), frame]
    return b"".join(parts)


def unpacked(data: bytes, max_bytes: int) -> NDArray[np.generic]:
    """The array that bytes hold.

    Args:
        data: What a client sent.
        max_bytes: Largest size of the array that is accepted.

    Raises:
        ValueError: If the bytes are not such an array, or it would be larger than `max_bytes`.
    """
    view = memoryview(data)
    try:
        dtype, shape, chunks, offset = _header(view)
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"the array's header is damaged ({error}); send it again") from None
    size = math.prod(shape) * dtype.itemsize
    if size > max_bytes:
        raise ValueError(
            f"an array of {shape} voxels of {dtype} takes {size} bytes, and at most {max_bytes} "
            "are accepted; send a smaller image"
        )
    spans = []
    for _ in range(chunks):
        if len(view) - offset < 16:
            raise ValueError("the array ends within a chunk; send it again")
        before, after = struct.unpack_from("<QQ", view, offset)
        offset += 16
        if not FRAME_HEADER_BYTES <= after <= len(view) - offset:
            raise ValueError("the array ends within a chunk; send it again")
        spans.append((before, view[offset : offset + after]))
        offset += after
    if offset != len(view) or sum(before for before, _ in spans) != size:
        raise ValueError(f"the array's chunks do not hold {size} bytes; send it again")
    array: NDArray[np.generic] = np.empty(size // dtype.itemsize, dtype)
    start = 0
    for before, frame in spans:
        _decompress(frame, array[start : start + before // dtype.itemsize], before)
        start += before // dtype.itemsize
    return array.reshape(shape)


def _header(view: memoryview) -> tuple[np.dtype[np.generic], tuple[int, ...], int, int]:
    """Type, shape, number of chunks, and where they begin."""
    magic, version, codec, axes, length = struct.unpack_from("<4s4B", view)
    if magic != MAGIC or version != VERSION or codec not in CODECS or axes > MAX_AXES:
        raise ValueError("the body is not an array of nnInteractive's format 1")
    name = str(view[8 : 8 + length], "ascii")
    if name not in DTYPES:
        raise ValueError(f"an array of type {name!r} cannot be used; send integers or floats")
    shape = struct.unpack_from(f"<{axes}q", view, 8 + length)
    if any(n < 0 for n in shape):
        raise ValueError(f"an array cannot have the shape {shape}")
    offset = 8 + length + 8 * axes
    (chunks,) = struct.unpack_from("<I", view, offset)
    return DTYPES[name].newbyteorder("<"), shape, chunks, offset + 4


def _decompress(frame: memoryview, target: NDArray[np.generic], size: int) -> None:
    """Decompresses one chunk in place, after its own header agrees with the array's."""
    try:
        before, after, _ = blosc2.get_cbuffer_sizes(frame)
        if before != size or after != len(frame) or size % target.itemsize or not size:
            raise ValueError("its sizes disagree")
        blosc2.decompress2(frame, dst=target)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"a chunk of the array is damaged ({error}); send it again") from None
