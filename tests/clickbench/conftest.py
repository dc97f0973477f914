"""Small targets and data sets."""

import numpy as np
import pytest
from standins import Sphere, box, made_set, played_into

from sammed3d_backbone.clickbench.cases import ClickTarget
from sammed3d_backbone.data.volume import Volume


@pytest.fixture
def cube():
    """Makes a target: 4 x 4 x 4 voxels in the middle of 10 x 10 x 10."""

    def make(start=(3, 3, 3), side=4, spacing_mm=(1.0, 1.0, 1.0), shape=(10, 10, 10)):
        truth = box(shape, start, side)
        image = Volume(truth.astype(np.float32), np.diag([*spacing_mm, 1.0]))
        return ClickTarget("made", "case", "case", "cube", image, truth, "ct")

    return make


@pytest.fixture
def data(tmp_path):
    """A folder with a labels.json: two volumes, two classes each, one of them too small."""
    return made_set(tmp_path / "made")


@pytest.fixture(scope="package")
def finished(tmp_path_factory):
    """Data, and the folder of a finished run of `SHORT` on them; both only to be read."""
    place = tmp_path_factory.mktemp("finished")
    return made_set(place / "made"), played_into(place / "out", Sphere(4.0), place / "made")
