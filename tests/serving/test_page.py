"""What the page asks for, and that it gets the voxels that `Predictor` gives."""

import contextlib
import hashlib
import io
import json

import nibabel as nib
import numpy as np
import pytest

httpx = pytest.importorskip("httpx", reason="needs nninteractive-client and the extra serve")
live_server = pytest.importorskip("live_server", reason="needs the extra serve")

from orientations import ORIENTATIONS, expected, oriented  # noqa: E402

from sammed3d_backbone.data.volume import Volume  # noqa: E402
from sammed3d_backbone.inference.interactive import Predictor  # noqa: E402
from sammed3d_backbone.inference.interactive.click_io import ClickList  # noqa: E402
from sammed3d_backbone.inference.validation import validate_volume  # noqa: E402
from sammed3d_backbone.serving.labelling import (  # noqa: E402
    LabellingSession,
    ObjectClick,
    OpenScan,
    require_plain_axes,
)
from sammed3d_backbone.serving.page import WEB  # noqa: E402

INSIDE, FAR, OTHER = (14, 16, 10), (8, 10, 8), (26, 4, 18)
NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"  # of 0.69.0


@pytest.fixture
def stored(scan):
    """Labels of an earlier segmentation: a part of the first box, and two voxels elsewhere."""
    labels = np.zeros(scan.shape, np.uint8)
    labels[6:12, 8:26, 6:15] = 3
    labels[0, 0, 0:2] = 7
    return labels


@pytest.fixture
def labelling(lopsided, scan, stored):
    """A session on the scan, with or without stored labels."""

    def make(*, with_labels=False):
        opened = OpenScan(validate_volume(scan), "scan", labels=stored if with_labels else None)
        return LabellingSession(Predictor(lopsided, enforce_clicks=True), opened)

    return make


def labels_of(session):
    return session.label_map().array


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_page_gets_the_predictors_voxels_in_ras_order(codes, lopsided, scan):
    volume, point = oriented(scan, codes, INSIDE)
    opened = OpenScan(validate_volume(volume), "scan")
    session = LabellingSession(Predictor(lopsided, enforce_clicks=True), opened)
    mm = (volume.affine @ [*point, 1])[:3]
    assert opened.voxel(mm) == point
    found, place = session.change(session.update([ObjectClick(1, point, True)]))
    shown = np.zeros(scan.shape, np.uint8)
    shown[place] = found
    mask = expected(lopsided, volume, (point, True))
    assert mask.any()
    assert np.array_equal(labels_of(session), mask)
    assert np.array_equal(shown, opened.geometry.oriented(mask))
    image = nib.Nifti1Image.from_bytes(opened.image(1))
    assert "".join(nib.aff2axcodes(image.affine)) == "RAS"
    assert np.array_equal(image.get_fdata(), scan.array)


def test_undo_is_a_shorter_list(labelling, lopsided, scan):
    session = labelling()
    clicks = [ObjectClick(1, INSIDE, True), ObjectClick(2, OTHER, True), ObjectClick(1, FAR, False)]
    maps = []
    for count in (1, 2, 3, 2, 1, 0):
        session.update(clicks[:count])
        maps.append(labels_of(session).copy())
    one, two, three, *back, nothing = maps
    assert np.array_equal(two == 2, expected(lopsided, scan, (OTHER, True)))
    assert not np.array_equal(two, three)
    assert np.array_equal(back, [two, one])
    assert not nothing.any()


def test_a_contradicted_click_is_replaced(labelling, lopsided, scan):
    session = labelling()
    session.update(
        [ObjectClick(1, FAR, False), ObjectClick(1, INSIDE, True), ObjectClick(1, FAR, True)]
    )
    mask = expected(lopsided, scan, (INSIDE, True), (FAR, True))
    assert np.array_equal(labels_of(session), mask)


def test_negative_clicks_alone_change_nothing(labelling):
    assert labelling().update([ObjectClick(1, INSIDE, False)]) is None


def test_the_object_clicked_last_wins_unless_another_is_locked(labelling):
    session = labelling()
    first, second = (
        ObjectClick(1, INSIDE, True),
        ObjectClick(2, INSIDE, True),
    )  # the same mask twice
    for clicks, locked, winner in (
        ([first, second], (), 2),
        ([second, first], (), 1),
        ([second, first], (2,), 2),
    ):
        session.update(clicks, locked=locked)
        assert set(np.unique(labels_of(session))) == {0, winner}


def test_stored_labels_are_shown_and_corrected(labelling, lopsided, scan, stored):
    session = labelling(with_labels=True)
    assert np.array_equal(labels_of(session), stored)
    assert set(session.facts()) == {3, 7}
    session.update([ObjectClick(3, INSIDE, True)])
    corrected = expected(lopsided, scan, (INSIDE, True), start=stored == 3)
    assert np.array_equal(labels_of(session) == 3, corrected)
    assert np.array_equal(labels_of(session) == 7, stored == 7)
    session.update([])
    assert np.array_equal(labels_of(session), stored)


def test_a_locked_stored_label_is_not_grown_into(labelling, stored):
    session = labelling(with_labels=True)
    session.update([ObjectClick(1, INSIDE, True)], locked=[3])
    assert np.array_equal(labels_of(session) == 3, stored == 3)
    session.update([ObjectClick(1, INSIDE, True)])
    assert not np.array_equal(labels_of(session) == 3, stored == 3)


def test_a_large_scan_is_shown_at_lower_resolution_and_segmented_at_full(labelling, lopsided, scan):
    session = labelling()
    assert session.scan.step(2048) == 1
    session.step = session.scan.step(12)
    assert session.step == 3  # 34 voxels at most
    image = nib.Nifti1Image.from_bytes(session.scan.image(3))
    assert np.array_equal(image.get_fdata(), scan.array[::3, ::3, ::3])
    assert np.allclose(image.affine @ [2, 3, 1, 1], scan.affine @ [6, 9, 3, 1])
    found, place = session.change(session.update([ObjectClick(1, INSIDE, True)]))
    shown = np.zeros(image.shape, np.uint8)
    shown[place] = found
    assert np.array_equal(shown, expected(lopsided, scan, (INSIDE, True))[::3, ::3, ::3])


@pytest.mark.parametrize(
    ("change", "token"),
    [
        (lambda labels, affine: (labels[1:], affine), "shape"),
        (lambda labels, affine: (labels, affine + np.diag([0.1, 0.1, 0.1, 0])), "mm"),
        (lambda labels, affine: (labels.astype(np.int16) * 100, affine), "255"),
        (lambda labels, affine: (labels * np.float32(0.5), affine), "whole"),
    ],
)
def test_labels_that_do_not_fit_are_refused(write_volume, scan, stored, change, token):
    array, affine = change(stored, scan.affine)
    labels = write_volume("labels.nii.gz", array, affine=affine)
    image = write_volume("scan.nii.gz", scan.array, affine=scan.affine)
    with pytest.raises(ValueError, match=token):
        OpenScan.load(image, labels=labels)


def test_axes_that_the_viewer_would_name_otherwise_are_refused():
    turn = np.deg2rad(45.1)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    with pytest.raises(ValueError, match="45"):
        require_plain_axes(affine)


# --- over HTTP ------------------------------------------------------------------------------


@pytest.fixture
def served(lopsided):
    """Serves a scan, and yields a client without a lease."""

    @contextlib.contextmanager
    def serve(scan, **settings):
        with (
            live_server.serving(lopsided, scan, **settings) as address,
            httpx.Client(base_url=address, timeout=30) as http,
        ):
            yield http

    return serve


def opened(http):
    """What the page is told first; the client holds the lease from now on."""
    answer = http.post("/page/open", json={}).raise_for_status().json()
    http.headers["X-Lease-Token"] = answer["lease"]
    return answer


def prompts(scan, *clicks, **more):
    listed = [
        {"value": v, "positive": sign, "point_mm": (scan.affine @ [*p, 1])[:3].tolist()}
        for v, p, sign in clicks
    ]
    return {"clicks": listed, "names": {"1": "liver", "2": "spleen"}, **more}


def test_the_page_saves_what_it_shows(served, lopsided, scan, tmp_path, write_volume):
    path = write_volume("scan.nii.gz", scan.array, affine=scan.affine)
    scan = Volume.load(path)  # an affine as NIfTI stores it
    asked = prompts(scan, (1, INSIDE, True), (2, OTHER, True), (1, FAR, False))
    with served(OpenScan.load(path)) as http:
        answer = opened(http)
        assert answer["shape"] == list(scan.shape)
        image = nib.Nifti1Image.from_bytes(http.get("/page/scan").content)
        assert np.array_equal(image.affine, scan.affine)
        reply = http.post("/page/prompts", json=asked).raise_for_status()
        meta = json.loads(reply.headers["X-Meta"])
        shown = np.zeros(scan.shape, np.uint8)
        box = tuple(slice(low, high) for low, high in meta["box"])
        size = [high - low for low, high in meta["box"]]
        shown[box] = np.frombuffer(reply.content, np.uint8).reshape(size, order="F")
        assert set(meta["objects"]) == {"1", "2"}
        (tmp_path / "labels.nii.gz").write_bytes(http.post("/page/labels", json=asked).content)
        (tmp_path / "clicks.json").write_text(http.post("/page/clicks", json=asked).text)
        assert http.post("/page/prompts", json=asked).content == b""  # nothing has changed
    saved = Volume.load(tmp_path / "labels.nii.gz")
    assert np.array_equal(saved.affine, scan.affine)
    assert np.array_equal(saved.array, shown)
    assert np.array_equal(shown == 1, expected(lopsided, scan, (INSIDE, True), (FAR, False)))
    predictor = Predictor(lopsided, enforce_clicks=True, max_windows=8)
    predictor.set_volume(scan)
    predictor.load_clicks(ClickList.load(tmp_path / "clicks.json"))
    assert predictor.objects == ["liver", "spleen"]
    assert np.array_equal(predictor.predict("spleen").mask, shown == 2)


def test_a_window_is_encoded_while_the_crosshair_rests(served, scan):
    asked = prompts(scan, (1, INSIDE, True), follow=False)
    with served(OpenScan(validate_volume(scan), "scan")) as http:
        opened(http)
        place = {"point_mm": asked["clicks"][0]["point_mm"]}
        http.post("/page/place", json=place).raise_for_status()
        assert http.get("/page/progress").json() == {"windows": 1}
        http.post("/page/prompts", json=asked).raise_for_status()
        assert http.get("/page/progress").json() == {"windows": 1}
        assert http.post("/page/place", json={"point_mm": [1e6, 0, 0]}).status_code == 400
        assert http.post("/page/place", json={"point_mm": [1]}).status_code == 400


def test_a_new_lease_gets_everything_at_once(served, scan, stored):
    asked = prompts(scan, (1, OTHER, True))
    with served(OpenScan(validate_volume(scan), "scan", labels=stored)) as http:
        opened(http)
        http.post("/page/prompts", json=asked).raise_for_status()
        http.post("/page/close")
        assert http.post("/page/prompts", json=asked).status_code == 410
        opened(http)
        reply = http.post("/page/prompts", json={**asked, "is_empty": True}).raise_for_status()
        low, high = np.transpose(json.loads(reply.headers["X-Meta"])["box"])
    assert (low <= [0, 0, 0]).all()  # a stored label
    assert (high > OTHER).all()


def test_corrected_masks_and_equal_names_are_refused_in_click_lists(served, scan, stored):
    with served(OpenScan(validate_volume(scan), "scan", labels=stored)) as http:
        opened(http)
        asked = prompts(scan, (3, INSIDE, True))
        assert "mask" in http.post("/page/clicks", json=asked).json()["detail"]
        asked["names"]["2"] = "liver"
        assert "name" in http.post("/page/clicks", json=asked).json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"clicks": 3}',
        b'{"clicks": [], "names": {}, "locked": [256]}',
        b'{"clicks": [{"value": 1, "positive": true, "point_mm": [1e9, 0, 0]}], "names": {}}',
        b'{"clicks": [{"value": 0, "positive": true, "point_mm": [0, 20, 10]}], "names": {}}',
    ],
)
def test_malformed_prompts_are_refused(served, scan, body):
    with served(OpenScan(validate_volume(scan), "scan")) as http:
        opened(http)
        for path in ("/page/prompts", "/page/labels", "/page/clicks", "/page/dicom-seg"):
            assert http.post(path, content=body).status_code == 400


def test_a_dicom_series_is_saved_as_segment_saves_it(served, lopsided, scan, series, tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
    volume = Volume.load(series)
    points = [oriented(scan, "LPS", voxel)[1] for voxel in (INSIDE, OTHER)]
    liver, spleen = (expected(lopsided, volume, (point, True)) for point in points)
    labels = np.where(spleen, 2, liver).astype(np.uint8)
    names = {1: "liver", 2: "spleen"}
    Volume(labels, volume.affine, volume.header).save(tmp_path / "own.dcm", names=names)
    own = pydicom.dcmread(tmp_path / "own.dcm")
    asked = prompts(scan, (1, INSIDE, True), (2, OTHER, True))
    with served(OpenScan.load(series)) as http:
        assert opened(http)["is_dicom"]
        empty = http.post("/page/dicom-seg", json=prompts(scan))
        assert (empty.status_code, "label" in empty.json()["detail"]) == (400, True)
        reply = http.post("/page/dicom-seg", json=asked).raise_for_status()
    saved = pydicom.dcmread(io.BytesIO(reply.content))
    assert [segment.SegmentLabel for segment in saved.SegmentSequence] == ["liver", "spleen"]
    assert saved.ReferencedSeriesSequence == own.ReferencedSeriesSequence
    assert saved.PerFrameFunctionalGroupsSequence == own.PerFrameFunctionalGroupsSequence
    assert np.array_equal(saved.pixel_array, own.pixel_array)


def test_dicom_seg_needs_a_dicom_series(served, scan):
    with served(OpenScan(validate_volume(scan), "scan")) as http:
        assert not opened(http)["is_dicom"]
        refused = http.post("/page/dicom-seg", json=prompts(scan, (1, INSIDE, True)))
        assert refused.status_code == 400
        assert "DICOM" in refused.json()["detail"]


def test_the_key_guards_everything_but_the_files_that_all_pages_share(served, scan):
    with served(OpenScan(validate_volume(scan), "scan"), api_key="k") as http:
        page = http.get("/")
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert http.get("/static/page.js").status_code == 200
        assert http.get("/static/../page.py").status_code in (401, 404)
        assert http.post("/page/open", json={}).status_code == 401
        http.headers["Authorization"] = "Bearer k"
        assert opened(http)["objects"] == {}
        foreign = http.post("/page/open", json={}, headers={"Origin": "http://example.org"})
        assert foreign.status_code == 403


def test_pages_have_places_of_their_own(served, scan):
    with served(OpenScan(validate_volume(scan), "scan"), max_sessions=1) as http:
        opened(http)
        assert http.post("/page/open", json={}).status_code == 503
        assert http.post("/claim").status_code == 200


def test_the_viewer_is_the_one_that_was_reviewed():
    script = (WEB / "niivue.umd.js").read_bytes()
    assert hashlib.sha256(script).hexdigest() == NIIVUE_SHA256
    assert "Copyright (c) 2021, Niivue" in (WEB / "LICENCES.txt").read_text(encoding="utf-8")
