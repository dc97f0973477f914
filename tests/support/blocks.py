"""Labels with a known verdict of the curation rules."""

import numpy as np

SHAPE = (40, 24, 24)


def block(value=1, start=4, size=8):
    """A label volume with one block; at 2 mm, a size of 8 passes all rules."""
    array = np.zeros(SHAPE, np.uint8)
    array[start : start + size, 4 : 4 + size, 4 : 4 + size] = value
    return array
