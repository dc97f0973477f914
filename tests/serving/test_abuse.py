"""Malformed requests to every path: an answer without a traceback, no hang, no growth."""

import gzip
import json
import random
import socket

import numpy as np
import pytest

httpx = pytest.importorskip("httpx", reason="needs nninteractive-client and the extra serve")
live_server = pytest.importorskip("live_server", reason="needs the extra serve")

from orientations import as_sent  # noqa: E402

from sammed3d_backbone.serving.arrays import packed  # noqa: E402

SLOWEST_S = 10
VALUES = [None, True, -1, 0, 3, 10**30, 1e308, float("nan"), "", "uint8", "x" * 5000, [], {}]
VALUES += [[1, 2, 3], [[1, 2, 3]] * 2, [9] * 500, {"a": {"b": [1]}}, "\u0000", "é", "[" * 900]
KEYS = ["shape", "dtype", "coordinates", "include_interaction", "run_prediction", "do_autozoom"]
KEYS += ["image_properties", "spacing", "affine", "direction", "bbox_coords", "interaction_bbox"]
KEYS += ["dimensions", "origin", "components_per_pixel", "component_type", "x"]
POSTS = ["claim", "release", "heartbeat", "set_image", "set_target_buffer", "set_do_autozoom"]
POSTS += ["reset_interactions", "undo", "predict", "add_point_interaction", "add_bbox_interaction"]
POSTS += ["add_scribble_interaction", "add_lasso_interaction", "add_initial_seg_interaction"]
SNAP = ["process_point_interaction", "reset_interactions", "end_session", "upload_raw"]
SNAP += ["process_scribble_interaction", "process_lasso_interaction", "start_session"]


class Requests:
    """Random requests, the same for the same seed; most are nearly right."""

    def __init__(self, seed, scan):
        self.random = random.Random(seed)
        image, self.properties = as_sent(scan)
        mask = np.zeros(image.shape[1:], np.uint8)
        mask[5:9, 5:9, 5:9] = 1
        self.arrays = [packed(image), packed(mask), packed(image.astype(np.float64)), b"NNIA", b""]
        self.voxels = gzip.compress(scan.array.astype("<f4").tobytes(order="F"))
        self.shape = list(image.shape[1:])

    def value(self):
        return self.random.choice(VALUES)

    def message(self):
        right = {
            "shape": self.shape,
            "dtype": "uint8",
            "coordinates": [self.random.randrange(-5, 40) for _ in range(3)],
            "include_interaction": self.random.random() < 0.6,
            "do_autozoom": True,
            "image_properties": dict(self.properties),
            "dimensions": self.shape[::-1],
            "spacing": [1, 1, 1],
            "direction": [1, 0, 0, 0, 1, 0, 0, 0, 1],
        }
        for _ in range(self.random.choice([0, 1, 1, 2, 6])):
            right[self.random.choice(KEYS)] = self.value()
            if self.random.random() < 0.2:
                right["image_properties"] = {self.random.choice(KEYS): self.value()}
        return json.dumps(right if self.random.random() < 0.95 else self.value())

    def damaged(self, data):
        data = bytearray(data)
        for _ in range(self.random.choice([0, 1, 1, 3, 30])):
            if data:
                place = self.random.randrange(min(len(data), self.random.choice([40, 10**9])))
                self.random.choice(
                    [
                        lambda at: data.__setitem__(at, self.random.randrange(256)),
                        lambda at: data.__delitem__(slice(at, at + self.random.randrange(9))),
                        lambda at: data.__setitem__(slice(at, at), b"\xff" * 8),
                    ]
                )(place)
        return bytes(data)

    def next(self, token):
        """Arguments of a request; `token` is that of a living session, mostly."""
        token = token if self.random.random() < 0.9 else self.random.choice(["", "nobody", "é/.."])
        if self.random.random() < 0.6:
            return self._viewer(token)
        return self._snap(token)

    def _viewer(self, token):
        path = self.random.choice(POSTS)
        if path in ("claim", "release") and self.random.random() < 0.8:
            path = "add_point_interaction"
        body = self.message().encode()
        meta = self.message()
        if path in ("set_image", "add_initial_seg_interaction", "add_lasso_interaction"):
            body = self.damaged(self.random.choice(self.arrays))
        elif self.random.random() < 0.3:
            body = self.damaged(body)
        headers = {"X-Lease-Token": token.encode(), "X-Meta": meta.encode()}
        method = "POST" if self.random.random() < 0.95 else self.random.choice(["GET", "PUT"])
        return {"method": method, "url": f"/{path}", "content": body, "headers": headers}

    def _snap(self, token):
        prefix = self.random.choice(["", "/v2"])
        path = self.random.choice(SNAP)
        url = f"{prefix}/{path}/{token or 'x'}"
        if path != "upload_raw":
            values = [self.random.choice([5, 10, -1, "a", "1e400", "nan"]) for _ in range(3)]
            query = dict(zip("xyz", values, strict=True)) if not prefix else {"point": values}
            query["foreground"] = self.random.choice(["true", "false", "é"])
            method = "POST" if "scribble" in path or "lasso" in path else "GET"
            return {"method": method, "url": url, "params": query}
        voxels = self.damaged(self.voxels)
        files = {"file": ("image.gz", voxels), "metadata": (None, self.message())}
        request = httpx.Request("POST", "http://x", files=files)
        content = self.damaged(request.read()) if self.random.random() < 0.3 else request.read()
        headers = {"Content-Type": request.headers["Content-Type"]}
        if self.random.random() < 0.1:
            headers["Content-Type"] = self.random.choice(["", "multipart/form-data", "text/plain"])
        return {"method": "POST", "url": url, "content": content, "headers": headers}


def abused(address, requests, count):
    """Sends requests; returns how often each status came back."""
    statuses = {}
    with httpx.Client(base_url=address, timeout=SLOWEST_S) as http:
        token = ""
        for number in range(count):
            if number % 20 == 0:  # a session that the requests have not ended yet
                http.post("/release", headers={"X-Lease-Token": token})
                token = http.post("/claim").json()["lease_token"]
                headers = {
                    "X-Lease-Token": token,
                    "X-Meta": json.dumps({"image_properties": requests.properties}),
                }
                http.post("/set_image", content=requests.arrays[0], headers=headers)
                body = {"shape": requests.shape, "dtype": "uint8"}
                http.post("/set_target_buffer", json=body, headers=headers)
            request = requests.next(token)
            answer = http.request(**request)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500 or answer.status_code == 503, (request, answer.text)
            assert "Traceback" not in answer.text
            if answer.status_code == 200 and answer.json is None:
                raise AssertionError
            http.post("/release", headers={"X-Lease-Token": answer_token(answer)})
    return statuses


def answer_token(answer):
    """The session that an answer has opened, so that the server does not fill up."""
    try:
        content = answer.json()
    except ValueError:
        return ""
    content = content if isinstance(content, dict) else {}
    return content.get("lease_token") or content.get("session_id") or ""


def test_malformed_requests_are_answered(lopsided, scan):
    with live_server.serving(lopsided, axes="RAS") as address:
        statuses = abused(address, Requests(0, scan), 200)
        assert statuses[200] > 20
        assert sum(statuses.values()) == 200
        assert httpx.get(f"{address}/healthz").json() == {"ok": True}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_malformed_requests_are_answered_and_memory_stays(lopsided, scan, seed):
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    with live_server.serving(lopsided, axes="RAS") as address:
        abused(address, Requests(100 + seed, scan), 100)
        before = process.memory_info().rss
        statuses = abused(address, Requests(seed, scan), 500)
        assert process.memory_info().rss - before < 200 * 2**20
        print(statuses)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"POST /claim HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /claim HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nabc",
        b"POST /set_image HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /%00%ff%2e%2e HTTP/1.1\r\nHost: localhost\r\nX-Lease-Token: \xff\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n",
    ],
)
def test_what_is_not_http_harms_nobody(lopsided, data):
    with live_server.serving(lopsided) as address:
        url = httpx.URL(address)
        with socket.create_connection((url.host, url.port), timeout=5) as raw:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            assert b"Traceback" not in raw.recv(65536)
        assert httpx.get(f"{address}/healthz").json() == {"ok": True}


def test_bodies_larger_than_the_limit_are_refused_before_they_are_read(lopsided):
    with (
        live_server.serving(lopsided, max_image_bytes=10**5) as address,
        live_server.claimed(address) as http,
    ):
        for path, size in (("/set_image", 10**6), ("/undo", 10**5)):
            assert http.post(path, content=bytes(size)).status_code == 413
            assert http.post(path, content=iter([bytes(size)])).status_code == 413
        image = packed(np.zeros((1, 100, 100, 100), np.uint8))
        assert len(image) < 10**4
        assert http.post("/set_image", content=image).status_code == 400
