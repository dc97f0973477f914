"""An asymmetric network, a small scan, and a session on it."""

import numpy as np
import pytest
from orientations import Lopsided, as_sent

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.serving import InteractiveSession


@pytest.fixture(scope="session")
def lopsided():
    """The asymmetric network."""
    return Lopsided()


@pytest.fixture
def scan():
    """A RAS volume with anisotropic voxels and two bright boxes, the first at (14, 16, 10)."""
    array = np.full((30, 34, 22), 40, dtype=np.int16)
    array[6:22, 8:26, 6:15] = 200
    array[25:29, 2:8, 16:21] = 210
    affine = np.diag([1.5, 1.2, 2.1, 1.0])
    affine[:3, 3] = (-20.0, 13.0, 7.5)
    return Volume(array, affine)


@pytest.fixture
def series(scan, tmp_path):
    """The scan as a folder of DICOM, axial, its axes towards L, P, S."""
    pytest.importorskip("pydicom", reason="needs the extra dicom")
    import dicom_series

    last_x, last_y, _ = np.array(scan.shape) - 1

    def change(image, number):
        stored = scan.array[::-1, ::-1, number].T.astype(np.uint16)
        image.Rows, image.Columns = stored.shape
        image.PixelSpacing = [scan.spacing_mm[1], scan.spacing_mm[0]]
        x, y, z = (scan.affine @ (last_x, last_y, number, 1))[:3]
        image.ImagePositionPatient = [-x, -y, z]
        image.RescaleSlope, image.RescaleIntercept = 1, 0
        image.PixelData = stored.tobytes()

    dicom_series.write_series(tmp_path / "series", slices=scan.shape[2], change=change)
    return tmp_path / "series"


@pytest.fixture
def session(lopsided, scan):
    """A session on the scan with its target buffer, axes RAS."""
    session = InteractiveSession(Predictor(lopsided, enforce_clicks=True), axes="RAS")
    image, properties = as_sent(scan)
    session.set_image(image, properties)
    session.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
    return session
