"""Ways to spoil an input, each a function of a random generator."""

import copy
import struct

VALUES = (
    None,
    True,
    0,
    -1,
    1e308,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "..",
    "/etc/passwd",
    "a/b",
    "\x00",
    "\ud800",
    "x" * 10_000,
    "{x}",
    "(",
    [],
    {},
    [[]],
    [None],
    {"a": None},
    [1, "a", {}],
)
NUMBERS = (
    *(struct.pack("<f", x) for x in (float("nan"), float("inf"), -1.0, 0.0, 1e38, 1e-38)),
    *(struct.pack("<h", x) for x in (-1, 0, 1, 7, 32767, -32768)),
    *(struct.pack("<q", x) for x in (-1, 2**31, 2**62)),
)


def spoiled_bytes(rng, content):
    """The bytes with a few changes of one kind; without a generator as they are."""
    if rng is None:
        return content
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(content) + 1))
        # Headers come first, so half of the changes go there.
        if rng.random() < 0.5:
            place = int(rng.integers(min(len(content) + 1, 400)))
        kind = int(rng.integers(6))
        if kind == 0:
            del content[place:]
        elif kind == 1:
            content[place : place + 1] = bytes(rng.integers(0, 256, 1, dtype="uint8"))
        elif kind == 2:
            number = NUMBERS[int(rng.integers(len(NUMBERS)))]
            content[place : place + len(number)] = number
        elif kind == 3:
            content[place:place] = bytes(rng.integers(0, 256, int(rng.integers(1, 40)), "uint8"))
        elif kind == 4:
            del content[place : place + int(rng.integers(1, 40))]
        else:
            content += content[place : place + 2000]
    return bytes(content)


def spoiled_value(rng, value):
    """Plain values with a few of them replaced, removed, renamed or nested deeply.

    Without a generator as they are.
    """
    if rng is None:
        return value
    root = {"": copy.deepcopy(value)}
    for _ in range(int(rng.integers(1, 3))):
        holder, key = _place(rng, root)
        kind = int(rng.integers(8))
        if kind == 0 and isinstance(holder, dict) and holder is not root:
            holder[str(VALUES[8 + int(rng.integers(8))])] = holder.pop(key)
        elif kind == 1 and holder is not root:
            del holder[key]
        elif kind == 2:
            deep = []
            for _ in range(int(rng.integers(1, 60))):
                deep = [deep]
            holder[key] = deep
        else:
            holder[key] = copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
    return root[""]


def _place(rng, root):
    """A random place in nested dictionaries and lists: what holds it, and its key there."""
    holder, key = root, ""
    while True:
        value = holder[key]
        keys = list(value) if isinstance(value, dict) else []
        keys = list(range(len(value))) if isinstance(value, list) else keys
        if not keys or rng.random() < 0.15:
            return holder, key
        holder, key = value, keys[int(rng.integers(len(keys)))]
