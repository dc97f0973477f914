"""Drives napari and its plug-in for nnInteractive with the mouse, as a user would.

    xvfb-run -a PYTHON tests/support/napari_driver.py ADDRESS FOLDER

PYTHON is that of an environment with napari, PyQt6 and napari-nninteractive; this package is not
needed in it. FOLDER holds `image.npy` and `work.json` with `spacing` and `points`: a voxel of the
first object, one outside it, and one of a second object. What the layers show after each step is
left there as `NAME.npy`, the window as `window.png`, and the tools that are on as `tools.json`.
"""

import json
import sys
import time
from pathlib import Path

import napari
import numpy as np
from napari_nninteractive._version_check import VersionChecker
from napari_nninteractive.widget_main import nnInteractiveWidget
from qtpy.QtCore import QPoint, Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication

WAIT_S = 120


def main():
    """Initialize, click, click outside, undo, next object, click."""
    address, folder = sys.argv[1], Path(sys.argv[2])
    work = json.loads((folder / "work.json").read_text())
    inside, outside, second = work["points"]
    VersionChecker.start = lambda _: None  # it would ask PyPI
    viewer = napari.Viewer()
    viewer.window.resize(1400, 1000)
    viewer.add_image(np.load(folder / "image.npy"), name="scan", scale=work["spacing"])
    widget = nnInteractiveWidget(viewer)
    viewer.window.add_dock_widget(widget, name="nnInteractive")
    widget.server_url_edit.setText(address)
    widget.image_selection.setCurrentText("scan")

    press(widget.init_button)
    until(lambda: widget.session is not None and widget.point_layer_name in viewer.layers)
    tools = {button.text(): button.isEnabled() for button in widget.interaction_button.buttons}
    (folder / "tools.json").write_text(json.dumps(tools))
    labels = viewer.layers[widget.label_layer_name]

    click(viewer, inside)
    until(lambda: labels.data.any())
    np.save(folder / "first.npy", labels.data)

    press(widget.prompt_button.buttons[1])  # negative
    shown = labels.data.copy()
    click(viewer, outside)
    until(lambda: (labels.data != shown).any())
    np.save(folder / "both.npy", labels.data)
    viewer.window.screenshot(folder / "window.png", flash=False, canvas_only=False)

    press(widget.undo_button)
    until(lambda: np.array_equal(labels.data, shown))
    np.save(folder / "undone.npy", labels.data)

    press(widget.reset_button)  # next object
    until(lambda: not labels.data.any())
    click(viewer, second)
    until(lambda: labels.data.any())
    np.save(folder / "second.npy", labels.data)
    stored = [layer for layer in viewer.layers if layer.name.startswith(("object", "instance"))]
    np.save(folder / "stored.npy", stored[0].data)
    viewer.window.screenshot(folder / "second.png", flash=False, canvas_only=False)
    viewer.close()


def until(condition):
    """Lets the program work until something is the case."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(condition)
        QTest.qWait(50)


def press(button):
    """Presses a button with the mouse."""
    QTest.mouseClick(button, Qt.LeftButton)


def click(viewer, voxel):
    """Clicks on a voxel with the mouse, in its slice."""
    scale = viewer.layers["scan"].scale
    world = np.array(voxel) * scale
    viewer.reset_view()
    viewer.dims.set_point(range(3), world)
    QTest.qWait(500)
    canvas = viewer.window._qt_viewer.canvas
    # From pixel to millimetres the canvas is linear: two rows and columns tell the way back.
    ends = [canvas._map_canvas2world(pixel, canvas.view)[-2:] for pixel in ((0, 0), (9, 9))]
    pixels = (world[-2:] - ends[0]) / (np.subtract(ends[1], ends[0]) / 9)
    row, column = np.rint(pixels).astype(int).tolist()
    QTest.mouseMove(canvas.native, QPoint(column, row))
    QTest.qWait(100)
    QTest.mouseClick(canvas.native, Qt.LeftButton, Qt.NoModifier, QPoint(column, row))
    QApplication.processEvents()


if __name__ == "__main__":
    main()
