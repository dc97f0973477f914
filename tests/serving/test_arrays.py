"""The array format, against the client's own code and against damage."""

import contextlib

import blosc2
import numpy as np
import pytest

from sammed3d_backbone.serving.arrays import packed, unpacked

serialization = pytest.importorskip("nnInteractive.inference.remote.serialization")

LIMIT = 2**24
TYPES = ("bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "float32")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (7,), (1, 40, 64, 33), (70765,)])
def test_both_codes_read_what_the_other_wrote(rng, dtype, shape):
    array = (rng.normal(size=shape) * 50).astype(dtype)
    for values in (array, np.zeros_like(array)):
        assert np.array_equal(serialization.unpack_array(packed(values)), values)
        for codec in (blosc2.Codec.ZSTD, blosc2.Codec.LZ4):
            read = unpacked(serialization.pack_array(values, codec=codec), LIMIT)
            assert read.dtype == values.dtype
            assert np.array_equal(read, values)


# What versions 2.5.1 and 2.6.0 of the client write.
IMAGE = """
4e4e494101010405696e743136010000000000000002000000000000000300000000000000040000000000000001000000
300000000000000050000000000000000501970230000000300000005000000000000000000005000000000000000000
fafffbfffcfffdfffeffffff00000100020003000400050006000700080009000a000b000c000d000e000f0010001100"""
MASK = """
4e4e49410101030575696e743806000000000000000700000000000000080000000000000001000000
50010000000000004600000000000000050195015001000050010000460000000000000000000500
0000000000000000240000001e00000028b52ffd605000a500001000010680501f04a66e750a8a1518080a506e07"""


def test_recorded_bytes_are_read_and_the_header_is_written_alike():
    image = np.arange(-6, 18, dtype=np.int16).reshape(1, 2, 3, 4)
    mask = np.zeros((6, 7, 8), np.uint8)
    mask[2:4, 3:5, 1:7] = 1
    for text, array in ((IMAGE, image), (MASK, mask)):
        data = bytes.fromhex(text)
        read = unpacked(data, LIMIT)
        assert read.dtype == array.dtype
        assert np.array_equal(read, array)
        end = 8 + len(array.dtype.name) + 8 * array.ndim + 4 + 8  # up to the chunk's length
        assert packed(array)[:end] == data[:end]
        assert np.array_equal(serialization.unpack_array(packed(array)), array)


def test_arrays_that_are_not_contiguous(rng):
    array = rng.integers(0, 9, (5, 6, 7)).astype(">i2")
    for values in (array.T, array[::2, 1:], array[::-1]):
        assert np.array_equal(unpacked(packed(values), LIMIT), values)


def test_short_names_of_types_are_read_as_well():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    data = packed(array).replace(b"\x07float32", b"\x02f4")
    assert np.array_equal(unpacked(data, LIMIT), array)


@pytest.mark.parametrize("name", [b"O", b"V8", b"U4", b"M8[s]", b"f4,f4", b"[" * 200, b"\xff", b""])
def test_other_types_are_refused(name):
    data = packed(np.zeros((3, 4), np.uint8))
    data = data[:7] + bytes([len(name)]) + name + data[8 + len(b"uint8") :]
    with pytest.raises(ValueError, match="array"):
        unpacked(data, LIMIT)


@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**62, 4), (2**31,), (-1, -8)])
def test_declared_sizes_are_refused_before_memory_is_asked_for(shape):
    data = bytearray(packed(np.zeros((1,) * len(shape), np.uint8)))
    start = 8 + len("uint8")
    data[start : start + 8 * len(shape)] = np.array(shape, "<i8").tobytes()
    with pytest.raises(ValueError, match="array"):
        unpacked(bytes(data), LIMIT)


def test_damage_is_refused(rng):
    whole = packed(rng.integers(0, 300, (1, 9, 8, 7)).astype(np.int16))
    for end in range(0, len(whole), 7):
        with pytest.raises(ValueError, match="array"):
            unpacked(whole[:end], LIMIT)
    with pytest.raises(ValueError, match="array"):
        unpacked(whole + b"\0", LIMIT)
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            data[place] = rng.integers(256)
        with contextlib.suppress(ValueError):  # and no other error
            assert unpacked(bytes(data), LIMIT).nbytes <= LIMIT
