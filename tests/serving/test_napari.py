"""The real plug-in of napari, driven with the mouse, against the server.

    SAMMED3D_NAPARI=/path/to/python pytest -m gui tests/serving/test_napari.py

The variable names the Python of an environment with napari, PyQt6 and napari-nninteractive.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

live_server = pytest.importorskip("live_server", reason="needs the extra serve")

from orientations import as_sent, expected  # noqa: E402

DRIVER = Path(__file__).parents[1] / "support" / "napari_driver.py"
POINT, FAR, OTHER = (14, 16, 10), (8, 10, 8), (26, 4, 18)


@pytest.mark.gui
def test_clicks_in_napari_give_the_predictors_masks(lopsided, scan, tmp_path):
    python = os.environ.get("SAMMED3D_NAPARI")
    if not python:
        pytest.skip("SAMMED3D_NAPARI does not name the Python of an environment with napari")
    display = [] if os.environ.get("DISPLAY") else [shutil.which("xvfb-run"), "-a"]
    if display and not display[0]:
        pytest.skip("needs a display, or xvfb-run")
    image, properties = as_sent(scan)
    np.save(tmp_path / "image.npy", image[0])
    points = [point[::-1] for point in (POINT, FAR, OTHER)]
    (tmp_path / "work.json").write_text(json.dumps({**properties, "points": points}))
    with live_server.serving(lopsided, axes="RAS") as address:
        subprocess.run(
            [*display, python, DRIVER, address, tmp_path],
            env=os.environ | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)},
            check=True,
            timeout=300,
        )
    shown = {path.stem: np.load(path) for path in tmp_path.glob("*.npy")}
    first = expected(lopsided, scan, (POINT, True)).T
    assert np.array_equal(shown["first"], first)
    assert np.array_equal(shown["both"], expected(lopsided, scan, (POINT, True), (FAR, False)).T)
    assert np.array_equal(shown["undone"], first)
    assert np.array_equal(shown["second"], expected(lopsided, scan, (OTHER, True)).T)
    assert np.array_equal(shown["stored"] > 0, first)
    tools = json.loads((tmp_path / "tools.json").read_text())
    assert [name.split()[0] for name, on in tools.items() if on] == ["Point"]
