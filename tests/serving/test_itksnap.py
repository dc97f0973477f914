"""The requests of ITK-SNAP, in their order, against the server."""

import base64
import gzip
import json

import numpy as np
import pytest

httpx = pytest.importorskip("httpx", reason="needs nninteractive-client and the extra serve")
live_server = pytest.importorskip("live_server", reason="needs the extra serve")

from orientations import ORIENTATIONS, expected, oriented  # noqa: E402

from tests.checks.itksnap_shape import shapes  # noqa: E402

POINT, FAR, OTHER = (14, 16, 10), (8, 10, 8), (26, 4, 18)


@pytest.fixture(scope="module")
def http(lopsided):
    """A client of a server whose `axes` are wrong on purpose: this wire carries a direction."""
    with (
        live_server.serving(lopsided, axes="SAR", max_sessions=4) as address,
        httpx.Client(base_url=address, timeout=30) as http,
    ):
        yield http


@pytest.fixture(params=["", "/v2"])
def prefix(request):
    """Routes of released versions, and newer ones."""
    return request.param


@pytest.fixture
def start(http, prefix):
    """Starts a session; it is ended after the test."""
    path = "/start_session" if not prefix else "/v2/start_session/nnInteractive"
    token = http.get(path).raise_for_status().json()["session_id"]
    yield token
    http.get(f"{prefix}/end_session/{token}")


def form(volume, **changes):
    """An upload as ITK-SNAP sends it, the voxels of x fastest."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    metadata = {
        "dimensions": volume.shape,
        "spacing": volume.spacing_mm,
        "origin": lps[:3, 3].tolist(),
        "direction": (lps[:3, :3] / volume.spacing_mm).ravel().tolist(),
        "components_per_pixel": 1,
        "component_type": "float32",
    }
    voxels = gzip.compress(volume.array.astype("<f4").tobytes(order="F"), compresslevel=1)
    return {
        "files": {"file": ("image.gz", changes.pop("voxels", voxels), "application/gzip")},
        "data": {"metadata": json.dumps(metadata | changes)},
    }


def clicked(http, prefix, token, shape, point, positive=True):
    """The mask after a click."""
    x, y, z = point
    query = {"point": [x, y, z]} if prefix else {"x": x, "y": y, "z": z}
    query["foreground"] = "true" if positive else "false"
    answer = http.get(f"{prefix}/process_point_interaction/{token}", params=query)
    content = answer.raise_for_status().json()
    assert content["status"] == "success"
    raw = gzip.decompress(base64.b64decode(content["result"]))
    return np.frombuffer(raw, np.int8).reshape(shape, order="F")


def test_the_sequence_of_the_program(http, prefix, start, lopsided, scan):
    assert http.get("/status").json()["status"] == "ok"
    models = http.get("/v2/models").json()["models"]
    assert "nnInteractive" in [model["id"] for model in models]
    assert models[0].keys() == {"id", "channels", "dimensions", "interactions"}
    upload = f"{prefix}/upload_raw/{start}?filename=upload.nii.gz"
    http.post(upload, **form(scan)).raise_for_status()

    def click(point, positive=True):
        return clicked(http, prefix, start, scan.shape, point, positive)

    assert np.array_equal(click(POINT), expected(lopsided, scan, (POINT, True)))
    both = expected(lopsided, scan, (POINT, True), (FAR, False))
    assert np.array_equal(click(FAR, False), both)
    assert not click(POINT, False).any()  # it contradicts the first click
    # Another label, so another object.
    assert http.get(f"{prefix}/reset_interactions/{start}").json() == {"status": "success"}
    assert not click(FAR, False).any()
    mask = expected(lopsided, scan, (FAR, False), (OTHER, True))
    assert np.array_equal(click(OTHER), mask)
    http.post(upload, **form(scan)).raise_for_status()
    assert np.array_equal(click(POINT), expected(lopsided, scan, (POINT, True)))


def test_masks_are_the_predictors_in_every_orientation(http, lopsided, scan):
    token = http.get("/start_session").json()["session_id"]
    differing = []
    for codes in ORIENTATIONS:
        volume, point = oriented(scan, codes, POINT)
        http.post(f"/upload_raw/{token}", **form(volume)).raise_for_status()
        mask = clicked(http, "", token, volume.shape, point)
        assert mask.any()
        differing.append(int((mask != expected(lopsided, volume, (point, True))).sum()))
    http.get(f"/end_session/{token}")
    assert differing == [0] * 48


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"voxels": b"no gzip"}, 400),
        ({"voxels": gzip.compress(bytes(40))}, 400),
        ({"voxels": gzip.compress(bytes(10**7))}, 400),
        ({"dimensions": [30, 34]}, 400),
        ({"dimensions": [0, 34, 22]}, 413),
        ({"dimensions": [10**6, 10**6, 10**6]}, 413),
        ({"spacing": [1, 1, -1]}, 400),
        ({"direction": [0] * 9}, 400),
        ({"components_per_pixel": 3}, 400),
        ({"component_type": "int16"}, 400),
        ({"metadata": "{"}, 400),
    ],
)
def test_uploads_that_cannot_be_used_are_refused(http, prefix, start, scan, changes, status):
    sent = form(scan) | {"data": changes} if "metadata" in changes else form(scan, **changes)
    answer = http.post(f"{prefix}/upload_raw/{start}", **sent)
    assert answer.status_code == status
    assert answer.json()["error"]
    # Without an image the program must not read a mask out of an answer.
    query = {"x": 1, "y": 2, "z": 3, "foreground": "true"}
    click = http.get(f"/process_point_interaction/{start}", params=query)
    assert click.status_code == 400


def test_unknown_sessions_and_tools_are_refused(http, prefix, start):
    for path in ("process_point_interaction", "reset_interactions"):
        answer = http.get(f"{prefix}/{path}/nobody", params={"x": 1, "y": 2, "z": 3})
        assert answer.status_code == 404
        assert answer.json() == {"error": "Invalid session"}
    assert http.get(f"{prefix}/end_session/nobody").status_code == 200
    assert http.post(f"{prefix}/upload_raw/{start}", content=b"x").status_code == 400
    assert http.post(f"/process_scribble_interaction/{start}").status_code == 400
    for query in ({"x": "a", "y": 1, "z": 2}, {"x": 1}, {}, {"point": [1, 2]}):
        path = f"{prefix}/process_point_interaction/{start}"
        assert http.get(path, params=query).status_code == 400


MASK = (200, {"status": "str", "result": "str"})
ENDED = (200, {"message": "str"})


@pytest.mark.parametrize("start", ["/start_session", "/v2/start_session/nnInteractive"])
def test_answers_have_the_shape_of_the_programs_own_server(lopsided, start):
    """What `itksnap_dls --mock-models` 0.1.6 answered to tests/checks/itksnap_shape.py.

    One difference is meant: it answers 200 when a session has ended. ITK-SNAP then reads a mask of
    no voxels over the whole image; at an error code it says that the request has failed.
    """
    with live_server.serving(lopsided) as address, httpx.Client(base_url=address) as http:
        found = shapes(http)
    model = {"id": "str", "channels": ["int"], "dimensions": "int", "interactions": ["str"]}
    assert found["/status"] == (200, {"status": "str", "version": "str"})
    assert found["/v2/models"] == (200, {"models": [model]})
    assert found[start] == (200, {"session_id": "str"})
    prefix = "/v2" if start.startswith("/v2") else ""
    ours = {path: shape for path, shape in found.items() if path.startswith(f"{prefix}/")}
    for path, shape in {
        "upload_raw": (200, {"message": "str"}),
        "process_point_interaction": MASK,
        "reset_interactions": (200, {"status": "str"}),
    }.items():
        assert ours[f"{prefix}/{path}"] == shape
        assert ours[f"{prefix}/{path} of an ended session"] == (404, {"error": "str"})
    for path in ("end_session", "end_session of an ended session"):
        assert ours[f"{prefix}/{path}"] == ENDED


def test_sessions_of_both_protocols_share_one_limit(lopsided):
    with live_server.serving(lopsided, max_sessions=1) as address:
        token = httpx.get(f"{address}/start_session").json()["session_id"]
        assert httpx.get(f"{address}/start_session").status_code == 503
        assert httpx.post(f"{address}/claim").status_code == 503
        httpx.get(f"{address}/end_session/{token}")
        assert httpx.post(f"{address}/claim").status_code == 200
