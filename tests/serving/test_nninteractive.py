"""The real client of 3D Slicer, MITK and napari against the server, and the wire underneath."""

import json
import threading
import time
import weakref

import numpy as np
import pytest

httpx = pytest.importorskip("httpx", reason="needs nninteractive-client and the extra serve")
remote_session = pytest.importorskip("nnInteractive.inference.remote.remote_session")
live_server = pytest.importorskip("live_server", reason="needs the extra serve")

from orientations import ORIENTATIONS, Lopsided, as_sent, expected, oriented  # noqa: E402
from standin import StandIn  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.routing import Mount  # noqa: E402

from sammed3d_backbone.data.volume import Volume  # noqa: E402
from sammed3d_backbone.serving import InteractiveSession, leases  # noqa: E402
from sammed3d_backbone.serving import app as app_module  # noqa: E402
from sammed3d_backbone.serving.app import Settings, build_app  # noqa: E402
from sammed3d_backbone.serving.arrays import packed, unpacked  # noqa: E402

RemoteSession = remote_session.nnInteractiveRemoteInferenceSession
claimed, running, serving = live_server.claimed, live_server.running, live_server.serving

POINT, FAR, OTHER = (14, 16, 10), (8, 10, 8), (26, 4, 18)


@pytest.fixture(scope="module")
def address(lopsided):
    """A server for arrays whose axes are RAS in reverse."""
    with serving(lopsided, axes="RAS", max_sessions=4) as address:
        yield address


@pytest.fixture
def remote(address):
    """The real client's session."""
    with RemoteSession(address) as remote:
        yield remote


@pytest.fixture
def opened(remote, scan):
    """The real client's session with the scan in it."""
    image, properties = as_sent(scan)
    remote.set_image(image, properties)
    remote.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
    return remote


def click(point):
    """The body of a request for a positive click."""
    return {"coordinates": point[::-1], "include_interaction": True}


def answer(remote, image, properties, point):
    """The mask that a client gets from one click."""
    remote.set_image(image, properties)
    remote.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
    remote.add_point_interaction(point[::-1], True)
    assert remote.target_buffer.any()
    return remote.target_buffer


def test_masks_are_the_predictors_with_axes_of_every_orientation(lopsided, scan):
    apps = {codes: build_app(lopsided, Settings(axes=codes), name="test") for codes in ORIENTATIONS}
    differing = []
    with (
        running(Starlette(routes=[Mount(f"/{codes}", app) for codes, app in apps.items()])) as root,
        httpx.Client(base_url=root) as http,  # to make 48 of the real client takes seconds
    ):
        for codes in ORIENTATIONS:
            volume, point = oriented(scan, codes, POINT)
            image, properties = as_sent(volume)
            token = http.post(f"/{codes}/claim").json()["lease_token"]
            headers = {
                "X-Lease-Token": token,
                "X-Meta": json.dumps({"image_properties": properties}),
            }
            for path, body in (
                ("set_image", {"content": packed(image)}),
                ("set_target_buffer", {"json": {"shape": image.shape[1:], "dtype": "uint8"}}),
                ("add_point_interaction", {"json": click(point)}),
            ):
                reply = http.post(f"/{codes}/{path}", headers=headers, **body).raise_for_status()
            box = json.loads(reply.headers["X-Meta"])["bbox"]
            mask = np.zeros(image.shape[1:], np.uint8)
            mask[tuple(slice(*ends) for ends in box)] = unpacked(reply.content, 2**20)
            differing.append(int((mask != expected(lopsided, volume, (point, True)).T).sum()))
    assert differing == [0] * 48


def test_masks_are_the_predictors_with_directions_of_every_orientation(lopsided, scan, remote):
    differing = []
    for codes in ORIENTATIONS:
        volume, point = oriented(scan, codes, POINT)
        image, properties = as_sent(volume)
        properties["direction"] = np.diag([-1, -1, 1]) @ volume.affine[:3, :3] / volume.spacing_mm
        mask = expected(lopsided, volume, (point, True)).T
        differing.append(int((answer(remote, image, properties, point) != mask).sum()))
    assert differing == [0] * 48


@pytest.mark.parametrize("codes", ["LPS", "SLA"])
def test_an_affine_in_the_properties_wins_over_axes(lopsided, scan, remote, codes):
    volume, point = oriented(scan, codes, POINT)
    remote.set_image(volume.array[None], {"affine": volume.affine, "spacing": [9, 9, 9]})
    remote.set_target_buffer(np.zeros(volume.shape, np.uint8))
    remote.add_point_interaction(point, True)
    assert np.array_equal(remote.target_buffer.T, expected(lopsided, volume, (point, True)).T)


def test_what_the_programs_read_about_the_server(remote):
    assert set(remote.supported_interactions) == {"points", "bbox2d", "bbox3d", "scribble", "lasso"}
    assert [k for k, v in remote.supported_interactions.items() if v] == ["points"]
    assert remote.channel_mapping == {"points": (0, 1)}
    assert len(remote.preferred_scribble_thickness) == 3
    assert remote.supports_undo
    assert remote.supports_initial_label
    assert remote.license
    assert remote.do_autozoom is True
    assert remote.ping()
    assert remote.heartbeat() > 0
    assert remote.lease_status()["remaining_seconds"] <= remote.idle_timeout_seconds


def test_the_sequence_of_slicer(lopsided, scan, remote):
    image, properties = as_sent(scan)
    target = np.zeros(image.shape[1:], np.uint8)
    remote.set_do_autozoom(True)
    remote.set_image(image, properties)
    remote.set_target_buffer(target)
    remote.reset_interactions()
    box = remote.add_point_interaction(POINT[::-1], True)
    first = expected(lopsided, scan, (POINT, True)).T
    assert np.array_equal(target, first)
    found = np.argwhere(first)
    assert box == np.stack([found.min(0), found.max(0) + 1], 1).tolist()
    remote.add_point_interaction(FAR[::-1], False)
    assert np.array_equal(target, expected(lopsided, scan, (POINT, True), (FAR, False)).T)
    assert remote.undo() is True
    assert np.array_equal(target, first)
    # Another segment, then back to the first one, which was edited by hand meanwhile.
    remote.reset_interactions()
    remote.add_point_interaction(OTHER[::-1], True)
    assert np.array_equal(target, expected(lopsided, scan, (OTHER, True)).T)
    remote.reset_interactions()
    remote.add_initial_seg_interaction(first.astype(np.uint8), run_prediction=False)
    assert np.array_equal(target, first)
    remote.add_point_interaction(FAR[::-1], False)
    assert not np.array_equal(target, first)
    assert remote.undo() is True
    assert np.array_equal(target, first)
    assert remote.undo() is True
    assert not target.any()
    assert remote.undo() is False


def test_the_sequence_of_napari(lopsided, scan, remote):
    image, properties = as_sent(scan)
    target = np.zeros(image.shape[1:], np.uint8)
    remote.set_do_autozoom(False)
    remote.set_image(image, properties)
    remote.set_target_buffer(target)
    remote.set_do_autozoom(True)
    remote.add_point_interaction([v + 0.3 for v in POINT[::-1]], True)
    assert np.array_equal(target, expected(lopsided, scan, (POINT, True)).T)
    remote.add_point_interaction([-0.4, 0, 0], False)  # half a voxel outside
    assert remote.undo() is True
    assert np.array_equal(target, expected(lopsided, scan, (POINT, True)).T)


def test_what_the_predictor_would_refuse_is_answered(lopsided, scan, opened):
    assert opened.add_point_interaction(FAR[::-1], False) is None  # negative first
    opened.add_point_interaction(POINT[::-1], True)
    opened.add_point_interaction(POINT[::-1], False)  # contradicts it
    assert not opened.target_buffer.any()
    opened.add_point_interaction(POINT[::-1], True)
    mask = expected(lopsided, scan, (FAR, False), (POINT, True)).T
    assert np.array_equal(opened.target_buffer, mask)
    assert opened.add_point_interaction((-50, 3, 3), True) is None
    assert np.array_equal(opened.target_buffer, mask)


def test_an_object_larger_than_one_window_is_followed_while_that_is_on():
    array = np.full((150, 24, 20), 40, np.int16)
    array[8:142, 7:17, 6:14] = 200
    volume, point, far = Volume(array, np.diag([1.5, 1.5, 1.5, 1.0])), (75, 12, 10), (100, 12, 10)
    model = StandIn()

    def mask(*points, follow):
        return expected(model, volume, *((point, True) for point in points), follow=follow).T

    assert mask(point, follow=True).sum() > 1.5 * mask(point, follow=False).sum()
    with serving(model, axes="RAS") as address, RemoteSession(address) as remote:
        answer(remote, *as_sent(volume), point)
        assert np.array_equal(remote.target_buffer, mask(point, follow=True))
        remote.set_do_autozoom(False)
        remote._predict()
        assert np.array_equal(remote.target_buffer, mask(point, follow=False))
        remote.add_point_interaction(far[::-1], True)
        assert np.array_equal(remote.target_buffer, mask(point, far, follow=False))
        remote.set_do_autozoom(True)
        assert remote.undo() is True
        assert np.array_equal(remote.target_buffer, mask(point, follow=False))  # as it was then
        remote.add_point_interaction(far[::-1], True)
        assert np.array_equal(remote.target_buffer, mask(point, far, follow=True))


def test_prompts_may_wait_for_predict(lopsided, scan, opened):
    assert opened.add_point_interaction(POINT[::-1], True, run_prediction=False) is None
    assert not opened.target_buffer.any()
    assert opened._predict() is not None
    assert np.array_equal(opened.target_buffer, expected(lopsided, scan, (POINT, True)).T)


def test_a_new_image_on_the_same_lease(lopsided, scan, opened):
    opened.add_point_interaction(POINT[::-1], True)
    volume, point = oriented(scan, "RAS", OTHER)
    image, properties = as_sent(volume)
    opened.set_image(image[:, :-1], properties)
    target = np.zeros(image[0, :-1].shape, np.uint8)
    opened.set_target_buffer(target)
    assert opened.undo() is False
    opened.add_point_interaction(point[::-1], True)
    assert target.any()


def test_tools_that_are_off_are_refused(opened):
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        opened.add_bbox_interaction([[1, 2], [3, 9], [3, 9]], True)
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        opened.add_scribble_interaction(np.ones((3, 3, 3), np.uint8), True)
    assert opened.add_point_interaction(POINT[::-1], True) is not None


@pytest.mark.parametrize(
    ("path", "body", "meta"),
    [
        ("/set_target_buffer", b'{"shape": [1, 2], "dtype": "uint8"}', None),
        ("/set_target_buffer", b'{"shape": [100000, 100000, 100000], "dtype": "uint8"}', None),
        ("/set_target_buffer", b'{"shape": [22, 34, 30], "dtype": "object"}', None),
        ("/set_target_buffer", b"[]", None),
        ("/set_do_autozoom", b"{}", None),
        ("/add_point_interaction", b'{"coordinates": [1, 2], "include_interaction": true}', None),
        ("/add_point_interaction", b'{"coordinates": [1, 2, NaN], "include_interaction": 1}', None),
        ("/add_point_interaction", b"[" * 60000, None),
        ("/add_point_interaction", b"\xff", None),
        ("/set_image", b"", "{}"),
        ("/set_image", b"NNIA", "{}"),
        ("/set_image", packed(np.zeros((1, 4, 4, 4), np.uint8)), "{}"),
        ("/set_image", packed(np.arange(128, dtype=np.uint8).reshape(2, 4, 4, 4)), "{}"),
        ("/set_image", packed(np.arange(64, dtype=np.uint8).reshape(1, 4, 4, 4)), "[1"),
        ("/set_image", packed(np.arange(64) > 9), '{"image_properties": 7}'),
        ("/add_initial_seg_interaction", packed(np.zeros((2, 2, 2), np.uint8)), "{}"),
    ],
)
def test_malformed_requests_are_refused_and_the_session_lives(address, scan, path, body, meta):
    image, properties = as_sent(scan)
    with claimed(address) as http:
        headers = {"X-Meta": json.dumps({"image_properties": properties})}
        http.post("/set_image", content=packed(image), headers=headers).raise_for_status()
        answer = http.post(path, content=body, headers={} if meta is None else {"X-Meta": meta})
        assert answer.status_code in (400, 413)
        assert answer.json()["detail"]
        assert http.post("/heartbeat", content="{}").status_code == 200
        http.post("/release")


def close_client(error):
    """Closes the connection that the client leaves open where it gets no session."""
    for entry in error.traceback:
        if isinstance(entry.locals.get("self"), RemoteSession):
            entry.locals["self"]._http.close()


def test_leases(lopsided):
    with serving(lopsided, max_sessions=1) as address:
        with claimed(address) as http:
            assert http.post("/heartbeat").status_code == 200
            answer = httpx.post(f"{address}/claim")
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
            with pytest.raises(remote_session.ServerAtCapacityError) as error:
                RemoteSession(address)
            close_client(error)
            for _ in range(2):
                assert http.post("/release").json() == {"released": True}
            assert http.get("/lease_status").status_code == 410
            for path in ("/undo", "/heartbeat"):
                assert http.post(path).status_code == 410
                assert httpx.post(address + path).status_code == 410
        remote = RemoteSession(address)
        httpx.post(f"{address}/release", headers={"X-Lease-Token": remote._lease_token})
        with pytest.raises(remote_session.SessionExpiredError):
            remote.undo()
        remote.close()


class Clock:
    """The clock of all leases, which a test may put forward."""

    def __init__(self):
        self.now_s = 0.0

    def monotonic(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    return clock


def test_a_dead_or_idle_client_loses_its_lease(lopsided, clock):
    with serving(lopsided, max_sessions=1, liveness_s=60) as address, claimed(address) as dead:
        clock.now_s += 50
        assert httpx.post(f"{address}/claim").status_code == 503
        clock.now_s += 20
        with claimed(address) as alive:
            for _ in range(4):
                clock.now_s += 50
                assert alive.post("/heartbeat").status_code == 200
        assert dead.post("/undo").status_code == 410
    with serving(lopsided, max_sessions=1, idle_s=60) as address, claimed(address) as idle:
        clock.now_s += 50
        assert idle.post("/heartbeat").json()["remaining_seconds"] == 10
        assert idle.get("/lease_status").status_code == 200
        clock.now_s += 20
        assert idle.post("/heartbeat").status_code == 410


def test_what_a_dead_client_held_is_freed_by_the_server_alone(lopsided, scan):
    held = []

    class Counted(InteractiveSession):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            held.append(weakref.ref(self._predictor))

    image, properties = as_sent(scan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_module, "InteractiveSession", Counted)
        with (
            serving(lopsided, axes="RAS", liveness_s=0.2) as address,
            claimed(address) as http,
        ):
            headers = {"X-Meta": json.dumps({"image_properties": properties})}
            if http.post("/set_image", content=packed(image), headers=headers).is_success:
                http.post("/add_point_interaction", json=click(POINT))
            deadline = time.monotonic() + 30
            while held[-1]() is not None:  # no request comes that could find the lease over
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_the_key(lopsided):
    with serving(lopsided, api_key="secret") as address:
        assert httpx.get(f"{address}/healthz").status_code == 200
        for path in ("/capabilities", "/lease_status", "/status", "/start_session", "/nowhere"):
            for headers in ({}, {"Authorization": "Bearer Secret"}, {"Authorization": "secret"}):
                assert httpx.get(address + path, headers=headers).status_code == 401
        with pytest.raises(httpx.HTTPStatusError, match="401") as error:
            RemoteSession(address, api_key="wrong")
        close_client(error)
        with RemoteSession(address, api_key="secret") as remote:
            assert remote.heartbeat() > 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1527"}, 200),
        ({"Host": "[::1]:1527"}, 200),
        ({"Host": "192.168.3.4"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:1527"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_foreign_pages_and_names_are_refused(address, headers, status):
    for path in ("/healthz", "/v2/models"):
        assert httpx.get(address + path, headers=headers).status_code == status


def test_the_server_answers_while_a_prediction_runs_and_other_clients_are_untouched(scan, clock):
    started, finish = threading.Event(), threading.Event()

    class Slow(Lopsided):
        def predict_masks(self, *args):
            started.set()
            assert finish.wait(30)
            return super().predict_masks(*args)

    image, properties = as_sent(scan)
    with serving(Slow(), axes="RAS") as address, claimed(address) as http:
        headers = {"X-Meta": json.dumps({"image_properties": properties})}
        http.post("/set_image", content=packed(image), headers=headers)
        http.post("/set_target_buffer", json={"shape": image.shape[1:], "dtype": "uint8"})
        answers = []
        request = threading.Thread(
            target=lambda: answers.append(http.post("/add_point_interaction", json=click(POINT)))
        )
        request.start()
        assert started.wait(30)
        begin = time.monotonic()
        assert httpx.get(f"{address}/healthz").json() == {"ok": True}
        lease = {"X-Lease-Token": http.headers["X-Lease-Token"]}
        assert httpx.post(f"{address}/heartbeat", headers=lease).status_code == 200
        with claimed(address) as other:  # receives its image meanwhile
            answer = other.post("/set_image", content=packed(image), headers=headers)
            assert answer.status_code == 200
        assert time.monotonic() - begin < 5
        clock.now_s += 200  # beyond the time-out: a prediction under way is a sign of life
        finish.set()
        request.join()
        assert answers[0].status_code == 200
        assert json.loads(answers[0].headers["X-Meta"])["bbox"]


def test_a_failure_is_answered_without_its_traceback(scan):
    class Broken(Lopsided):
        broken = True

        def predict_masks(self, *args):
            if self.broken:
                raise RuntimeError("broken")
            return super().predict_masks(*args)

    image, properties = as_sent(scan)
    model = Broken()
    with serving(model, axes="RAS") as address, RemoteSession(address) as remote:
        remote.set_image(image, properties)
        remote.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
        with pytest.raises(httpx.HTTPStatusError, match="500") as error:
            remote.add_point_interaction(POINT[::-1], True)
        assert "broken" not in error.value.response.text
        model.broken = False
        assert remote.add_point_interaction(POINT[::-1], True) is not None
