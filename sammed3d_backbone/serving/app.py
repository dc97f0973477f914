"""The server: both protocols and the page on one port, behind one gate, with one network."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from sammed3d_backbone import __version__
from sammed3d_backbone.data.preprocessing import Modality
from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.inference.interactive.embedding_cache import PromptableNetwork
from sammed3d_backbone.serving import itksnap, nninteractive, page
from sammed3d_backbone.serving.gate import Gate, RefusedError, own_names
from sammed3d_backbone.serving.labelling import LabellingSession, OpenScan
from sammed3d_backbone.serving.leases import FullError, GoneError, Leases, Session
from sammed3d_backbone.serving.session import InteractiveSession, checked_axes

logger = logging.getLogger(__name__)

CACHE_BYTES = 2**27  # encoded windows of all sessions together
RETRY_S = 10
MAX_CONNECTIONS = 256
# Longer than clients keep an idle connection (httpx: 5 s): if both gave up at the same moment, a
# request that is just being sent would be lost.
KEEP_ALIVE_S = 60
GRACE_S = 2  # for requests under way when the server is interrupted


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Args:
        modality: Modality of all images; clients do not send it.
        axes: See `InteractiveSession`.
        api_key: Needed from every client; None for none.
        hosts: Further names of this machine in requests.
        max_sessions: Clients at a time.
        idle_s: Seconds without work after which a session ends.
        liveness_s: Seconds without a sign of life after which a session ends.
        max_image_bytes: Largest size of one image, uncompressed.
        max_windows: Largest number of windows of one object.
        follow: Whether the page follows objects unless its user says otherwise.
    """

    modality: Modality | None = None
    axes: str = "LPS"
    api_key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    max_sessions: int = 4
    idle_s: float = 4 * 3600.0
    liveness_s: float = 120.0
    max_image_bytes: int = 2**32
    max_windows: int = 8
    follow: bool = True

    def __post_init__(self) -> None:
        checked_axes(self.axes)
        key = self.api_key or ""
        if not (key.isascii() and key.isprintable()):  # clients could not send it
            raise ValueError("the API key may hold letters, digits and marks of ASCII only")
        for name in ("max_sessions", "max_windows", "max_image_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")
        if not (self.idle_s > 0 and self.liveness_s > 0):
            raise ValueError("time-outs are numbers of seconds above 0")


def build_app(
    model: PromptableNetwork,
    settings: Settings,
    *,
    name: str,
    license: str = "!!MISSING!!",
    scan: OpenScan | None = None,
) -> Starlette:
    """The ASGI application.

    Args:
        model: The network, shared by all sessions.
        settings: How the server behaves.
        name: Name of the weights, as ITK-SNAP lists it.
        license: Terms of the weights, as the other programs show them.
        scan: What the page shows; None for no page.
    """
    line = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network")

    def predictor() -> Predictor:
        return Predictor(
            model,
            max_windows=settings.max_windows,
            enforce_clicks=True,
            cache_bytes=CACHE_BYTES // settings.max_sessions,
        )

    def new_session() -> InteractiveSession:
        return InteractiveSession(
            predictor(), modality=settings.modality, axes=settings.axes, license=license
        )

    def leases_of(new_session: Callable[[], Session]) -> Leases[Session]:
        return Leases(
            new_session,
            line,
            max_sessions=settings.max_sessions,
            idle_s=settings.idle_s,
            liveness_s=settings.liveness_s,
        )

    leases = leases_of(new_session)
    sweeps: list[Leases[Any]] = [leases]
    capabilities = capabilities_of(new_session(), model)
    viewers = nninteractive.NnInteractiveProtocol(leases, capabilities, settings.max_image_bytes)
    names = tuple(dict.fromkeys((name, itksnap.MODEL)))
    snap = itksnap.ItkSnapProtocol(leases, __version__, names, settings.max_image_bytes)
    routes: list[BaseRoute] = [*viewers.routes(), *snap.routes()]
    if scan is not None:
        pages = leases_of(lambda: LabellingSession(predictor(), scan))
        routes += page.Page(pages, scan, name, settings.follow).routes()
        sweeps.append(pages)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        sweepers = [asyncio.create_task(leases.keep_swept()) for leases in sweeps]
        try:
            yield
        finally:
            for sweeper, leases in zip(sweepers, sweeps, strict=True):
                sweeper.cancel()
                leases.close()
            line.shutdown(wait=False, cancel_futures=True)  # work that has not begun is dropped

    gate = Middleware(
        Gate,
        api_key=settings.api_key,
        hosts={*settings.hosts, *own_names()},
        open_paths={*nninteractive.OPEN_PATHS, *(page.OPEN_PATHS if scan else ())},
    )
    return Starlette(
        routes=routes,
        middleware=[gate],
        lifespan=lifespan,
        exception_handlers={
            FullError: full,
            GoneError: gone,
            HTTPException: no_route,
            RefusedError: refused,
            TypeError: unusable,
            ValueError: unusable,
            MemoryError: too_large,
            torch.OutOfMemoryError: too_large,
        },
    )


def listening(host: str, port: int) -> socket.socket:
    """A socket on which nobody is answered yet; 0 is any free port.

    Raises:
        ValueError: If there is no such port.
        OSError: If the port is in use or the host is not an address of this machine.
    """
    if not 0 <= port < 2**16:  # the C library would take it modulo 65536
        raise ValueError(f"port {port} does not exist; give --port 1 to 65535, or 0 for any")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        advice = "choose another with --port" if error.errno == errno.EADDRINUSE else "check --host"
        raise OSError(f"cannot listen on {host} port {port} ({error.strerror}); {advice}") from None
    return listener


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answers requests until the process is interrupted; logs neither addresses nor paths."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    uvicorn.Server(config).run(sockets=[listener])


def capabilities_of(session: InteractiveSession, model: PromptableNetwork) -> nninteractive.Json:
    """What clients enable their tools by; none of it may be missing, most of it not null."""
    return {
        "supported_interactions": dict(session.supported_interactions),
        "channel_mapping": {k: list(v) for k, v in session.channel_mapping.items()},
        "num_interaction_channels": session.num_interaction_channels,
        "supports_initial_label": session.supports_initial_label,
        "supports_zero_shot_label_refinement": session.supports_zero_shot_label_refinement,
        "preferred_scribble_thickness": list(session.preferred_scribble_thickness),
        "interaction_decay": session.interaction_decay,
        "patch_size": list(model.image_encoder.img_size),
        "do_autozoom": session.do_autozoom,
        "inference_session_version": session.INFERENCE_SESSION_VERSION,
        "license": session.license,
        "supports_undo": session.supports_undo,
    }


# --- errors -----------------------------------------------------------------------------------


async def full(_: Request, __: Exception) -> Response:
    """503 to one client too many."""
    detail = "all sessions are in use; close one in another program, or try again later"
    return JSONResponse({"detail": detail}, 503, headers={"Retry-After": str(RETRY_S)})


async def gone(_: Request, __: Exception) -> Response:
    """410, which makes the programs ask for a new session."""
    return JSONResponse({"detail": "the session has ended; initialize again"}, 410)


async def refused(_: Request, error: Exception) -> Response:
    """What a protocol refuses."""
    assert isinstance(error, RefusedError)
    return JSONResponse({"detail": error.detail}, error.status)


async def unusable(_: Request, error: Exception) -> Response:
    """What the predictor refuses, in its own words."""
    return JSONResponse({"detail": str(error)}, 400)


async def too_large(_: Request, __: Exception) -> Response:
    """413 where the memory does not suffice."""
    detail = "the server's memory does not suffice for this image; send a smaller one"
    return JSONResponse({"detail": detail}, 413)


async def no_route(_: Request, error: Exception) -> Response:
    """404 and 405."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)
