"""Predictors around a network whose right answer is known, and volumes with bright objects."""

import numpy as np
import pytest
from standin import StandIn

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor


@pytest.fixture
def model():
    """The stand-in network."""
    return StandIn()


@pytest.fixture
def predictor(model):
    """A predictor with 1.5 mm voxels around the stand-in."""
    return Predictor(model)


@pytest.fixture
def balls():
    """A 1.5 mm volume with two bright balls, apart, and their masks."""
    i, j, k = np.ogrid[:90, :80, :70]
    first = (i - 22) ** 2 + (j - 40) ** 2 + (k - 36) ** 2 < 9**2
    second = (i - 36) ** 2 + (j - 54) ** 2 + (k - 36) ** 2 < 7**2
    array = np.where(first | second, 200, 50).astype(np.int16)
    return Volume(array, np.diag([1.5, 1.5, 1.5, 1.0])), first, second
