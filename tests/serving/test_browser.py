"""The page of `sammed3d view` in a real browser: Debian's chromium, without a graphics card.

Needs `apt-get install chromium`; playwright downloads nothing.
"""

import shutil
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="NO BROWSER TEST: needs playwright")
live_server = pytest.importorskip("live_server", reason="needs the extra serve")

from orientations import expected as predicted  # noqa: E402
from orientations import oriented  # noqa: E402

from sammed3d_backbone.data.volume import Volume  # noqa: E402
from sammed3d_backbone.inference.interactive import Predictor  # noqa: E402
from sammed3d_backbone.serving import labelling  # noqa: E402
from sammed3d_backbone.serving.labelling import OpenScan  # noqa: E402

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
PATIENCE_MS = 120_000
INSIDE, FAR, OTHER = (14, 16, 10), (8, 10, 8), (26, 4, 18)  # of the scan in RAS order

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER TEST: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that may neither fail nor ask another host."""
    page = browser.new_page(viewport={"width": 900, "height": 600})
    page.set_default_timeout(PATIENCE_MS)
    hosts, errors = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert hosts - {None} == {"127.0.0.1"}  # None: data and blobs of the page itself
    assert not errors


@pytest.fixture
def path(scan, write_volume):
    """The scan as a file with its axes towards P, L, S."""
    volume, _ = oriented(scan, "PLS", INSIDE)
    return write_volume("scan.nii.gz", volume.array, affine=volume.affine)


@pytest.fixture
def expected(lopsided, scan, path):
    """The mask that the predictor itself gives on the file, from voxels of the RAS order."""

    def predict(*clicks, start=None):
        own = [(oriented(scan, "PLS", voxel)[1], positive) for voxel, positive in clicks]
        return predicted(lopsided, Volume.load(path), *own, start=start)

    return predict


def tells(page, text, place="#status"):
    sync_api.expect(page.locator(place)).to_contain_text(text, timeout=PATIENCE_MS)


def opened(page, address):
    page.goto(address)
    tells(page, "Place the crosshair")


def press(page, key):
    """Presses a key, and waits for the answer of the server."""
    page.keyboard.press(key)
    page.evaluate("() => sent")


def place(page, scan, voxel):
    """Moves the crosshair by the keyboard to a voxel of the RAS order."""
    page.locator("#views").focus()
    target = (scan.affine @ [*voxel, 1])[:3]
    steps = np.round((target - page.evaluate("crosshair")) / scan.spacing_mm).astype(int)
    axes = (("ArrowLeft", "ArrowRight"), ("ArrowDown", "ArrowUp"), ("PageDown", "PageUp"))
    for keys, count in zip(axes, steps, strict=True):
        for _ in range(abs(count)):
            page.keyboard.press(keys[int(count > 0)])
    assert np.allclose(page.evaluate("crosshair"), target, atol=1e-3)


def shown(page, scan, value):
    """The voxels of an object in the viewer, in the order of the file."""
    bitmap = np.array(page.evaluate("Array.from(viewer.drawBitmap)"))
    volume = Volume(bitmap.reshape(scan.shape, order="F") == value, scan.affine)
    return oriented(volume, "PLS", INSIDE)[0].array


def saved(page, button, target):
    with page.expect_download() as download:
        page.locator(button).click()
    download.value.save_as(target)
    return target


def test_objects_are_clicked_undone_and_saved(page, lopsided, scan, path, expected, tmp_path):
    with live_server.serving(lopsided, OpenScan.load(path), api_key="secret") as address:
        opened(page, f"{address}/#key=secret")
        assert "secret" not in page.url
        before = page.evaluate("crosshair")
        views = page.locator("#views").bounding_box()
        page.mouse.click(views["x"] + 0.2 * views["width"], views["y"] + 0.8 * views["height"])
        assert page.evaluate("crosshair") != before
        assert page.evaluate("clicks.length") == 0
        contrast = "[viewer.volumes[0].cal_min, viewer.volumes[0].cal_max]"
        before = page.evaluate(contrast)
        page.mouse.down(button="right")
        page.mouse.move(views["x"] + 60, views["y"] + views["height"] - 60, steps=8)
        page.mouse.up(button="right")
        assert page.evaluate(contrast) != before

        place(page, scan, INSIDE)
        press(page, "p")
        tells(page, "Answered in")
        first = expected((INSIDE, True))
        assert np.array_equal(shown(page, scan, 1), first)
        place(page, scan, FAR)
        press(page, "n")
        second = expected((INSIDE, True), (FAR, False))
        assert not np.array_equal(first, second)
        assert np.array_equal(shown(page, scan, 1), second)
        press(page, "u")
        assert np.array_equal(shown(page, scan, 1), first)
        press(page, "r")
        assert np.array_equal(shown(page, scan, 1), second)

        page.keyboard.press("o")
        page.get_by_label("Name of object 2").fill("spleen")
        place(page, scan, OTHER)
        press(page, "p")
        third = expected((OTHER, True))
        assert np.array_equal(shown(page, scan, 2), third)
        assert np.array_equal(shown(page, scan, 1), second)

        assert page.locator("#save-dicom").is_hidden()
        labels = nib.load(saved(page, "#save-labels", tmp_path / "labels.nii.gz"))
        clicks = saved(page, "#save-clicks", tmp_path / "clicks.json")
    assert np.array_equal(labels.affine, nib.load(path).affine)
    assert np.array_equal(labels.get_fdata(), np.where(third, 2, second))
    predictor = Predictor(lopsided, enforce_clicks=True, max_windows=8)
    predictor.set_volume(path)
    predictor.load_clicks(clicks)
    assert predictor.objects == ["object 1", "spleen"]


def test_clicks_are_marked_near_their_slices(page, lopsided, scan, path):
    marks = page.locator("#marks span")

    def count(query, expected):
        sync_api.expect(page.locator(f"#marks {query}")).to_have_count(expected)

    with live_server.serving(lopsided, OpenScan.load(path)) as address:
        opened(page, address)
        place(page, scan, INSIDE)
        press(page, "p")
        count(".positive.selected", 3)
        axes = {"ArrowLeft", "ArrowDown", "PageUp"}
        for axis in axes:  # leaves the two slices that are across, each of the three in turn
            place(page, scan, INSIDE)
            for key in axes - {axis}:
                page.keyboard.press(f"Shift+{key}")
            count("span", 1)
            box = marks.bounding_box()
            page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            assert np.allclose(page.evaluate("crosshair"), (scan.affine @ [*INSIDE, 1])[:3])
        place(page, scan, FAR)
        count("span", 0)
        press(page, "n")
        count(".negative.selected", 3)
        page.keyboard.press("ArrowLeft")
        count("span", 3)
        page.keyboard.press("ArrowLeft")
        count("span", 2)
        page.keyboard.press("o")
        count("span", 2)
        count(".selected", 0)
        press(page, "u")
        count("span", 0)


def test_a_dicom_series_is_saved_as_dicom_seg(page, lopsided, scan, series, tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
    masks = [
        predicted(lopsided, Volume.load(series), (oriented(scan, "LPS", voxel)[1], True))
        for voxel in (INSIDE, OTHER)
    ]
    with live_server.serving(lopsided, OpenScan.load(series)) as address:
        opened(page, address)
        page.get_by_label("Name of object 1").fill("liver")
        place(page, scan, INSIDE)
        press(page, "p")
        page.keyboard.press("o")
        place(page, scan, OTHER)
        press(page, "p")
        path = saved(page, "#save-dicom", tmp_path / "seg.dcm")
    seg = pydicom.dcmread(path)
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["liver", "object 2"]
    assert seg.pixel_array.sum() == np.any(masks, axis=0).sum()


def test_a_stored_mask_is_corrected(page, lopsided, scan, path, expected, write_volume):
    start = expected((OTHER, True))
    labels = write_volume(
        "labels.nii.gz", 4 * start.astype(np.uint8), affine=Volume.load(path).affine
    )
    with live_server.serving(lopsided, OpenScan.load(path, labels=labels)) as address:
        opened(page, address)
        assert np.array_equal(shown(page, scan, 4), start)
        place(page, scan, INSIDE)
        press(page, "p")
        corrected = expected((INSIDE, True), start=start)
        assert np.array_equal(shown(page, scan, 4), corrected)
        page.get_by_role("button", name="Drop the clicks on object 4").click()
        page.evaluate("() => sent")
        assert np.array_equal(shown(page, scan, 4), start)


def test_clicks_are_kept_while_the_server_is_away(page, lopsided, scan, path, expected):
    with live_server.serving(lopsided, OpenScan.load(path)) as address:
        opened(page, address)
        place(page, scan, INSIDE)
        press(page, "p")
    place(page, scan, FAR)
    page.keyboard.press("n")
    tells(page, "Your clicks are kept", "#message")
    with live_server.serving(lopsided, OpenScan.load(path), port=urlsplit(address).port):
        page.evaluate("() => sent")
        assert np.array_equal(shown(page, scan, 1), expected((INSIDE, True), (FAR, False)))
        assert page.locator("#message").is_hidden()


def test_a_scan_that_is_too_large_is_shown_at_lower_resolution(
    page, lopsided, scan, path, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(labelling, "MAX_SHOWN_VOXELS", 5000)
    with live_server.serving(lopsided, OpenScan.load(path)) as address:
        opened(page, address)
        tells(page, "every 2nd voxel", "#message")
        place_mm = page.evaluate("crosshair")
        press(page, "p")
        labels = nib.load(saved(page, "#save-labels", tmp_path / "labels.nii.gz"))
    voxel = np.round((np.linalg.inv(scan.affine) @ [*place_mm, 1])[:3]).astype(int)
    assert np.array_equal(labels.get_fdata() == 1, expected((tuple(voxel), True)))


def test_what_is_missing_is_said(page, browser, lopsided, path):
    with live_server.serving(lopsided, OpenScan.load(path), api_key="secret") as address:
        page.goto(address)
        tells(page, "key", "#message")
        page.add_init_script(
            "const all = HTMLCanvasElement.prototype.getContext;"
            "HTMLCanvasElement.prototype.getContext = function (kind, ...more) {"
            "  return kind === 'webgl2' ? null : all.call(this, kind, ...more);"
            "};"
        )
        page.reload()
        tells(page, "WebGL2", "#message")
