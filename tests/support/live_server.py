"""The server on a free port of the loopback interface."""

import contextlib
import threading
import time

import httpx
import uvicorn

from sammed3d_backbone.serving.app import Settings, build_app


def serving(model, scan=None, port=0, name="test", **settings):
    """Yields the server's address; with a scan there is the page as well."""
    return running(build_app(model, Settings(**settings), name=name, scan=scan), port)


@contextlib.contextmanager
def running(app, port=0):
    """Yields the address of an application."""
    config = uvicorn.Config(
        app, port=port, http="h11", ws="none", log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@contextlib.contextmanager
def claimed(address):
    """Yields an HTTP client that holds a lease; the lease stays."""
    with httpx.Client(base_url=address, timeout=30) as http:
        answer = http.post("/claim").raise_for_status().json()
        http.headers["X-Lease-Token"] = answer["lease_token"]
        yield http
