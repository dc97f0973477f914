"""The page of `sammed3d view`: its files, and what it asks for.

The page sends all prompts and receives the changed box of the label map, x fastest, in RAS order;
what else is known travels in the header `X-Meta`. It asks nobody but this server, which its content
security policy also makes the browser enforce.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from sammed3d_backbone.serving.gate import RefusedError, body_of
from sammed3d_backbone.serving.labelling import (
    MAX_VALUE,
    LabellingSession,
    ObjectClick,
    OpenScan,
    Region,
)
from sammed3d_backbone.serving.leases import Leases
from sammed3d_backbone.serving.nninteractive import LEASE, META, message_of

WEB = Path(__file__).parent / "web"
OPEN_PATHS = ("/", *(f"/static/{path.name}" for path in WEB.iterdir()))  # the same for everybody
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self' data:; font-src data:; worker-src blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
MAX_PROMPT_BYTES = 2**20

Value = Annotated[int, Field(ge=1, le=MAX_VALUE)]


class Screen(BaseModel):
    """Body of `/page/open`."""

    max_side: int = Field(2048, ge=64, le=2**14)  # of a 3-D texture


class PagePoint(BaseModel):
    """A click on the page."""

    value: Value
    positive: bool
    point_mm: tuple[float, float, float]


class PagePlace(BaseModel):
    """Where the crosshair rests."""

    point_mm: tuple[float, float, float]


class PagePrompts(BaseModel):
    """All that the page holds."""

    clicks: list[PagePoint]
    names: dict[Value, str]
    locked: list[Value] = []
    follow: bool = True
    is_empty: bool = False  # whether the page shows nothing yet


@dataclass(frozen=True)
class Page:
    """The routes.

    Args:
        leases: The leases of pages.
        scan: What they show.
        weights: Name of the weights.
        follow: Whether objects are followed unless the user says otherwise.
    """

    leases: Leases[LabellingSession]
    scan: OpenScan
    weights: str
    follow: bool

    def routes(self) -> list[BaseRoute]:
        """All paths of the page."""
        return [
            Route("/", self.index, methods=["GET"]),
            Mount("/static", StaticFiles(directory=WEB)),
            Route("/page/open", self.open, methods=["POST"]),
            Route("/page/scan", self.send_scan, methods=["GET"]),
            Route("/page/place", self.receive_place, methods=["POST"]),
            Route("/page/prompts", self.receive_prompts, methods=["POST"]),
            Route("/page/progress", self.progress, methods=["GET"]),
            Route("/page/labels", self.send_labels, methods=["POST"]),
            Route("/page/dicom-seg", self.send_dicom_seg, methods=["POST"]),
            Route("/page/clicks", self.send_clicks, methods=["POST"]),
            Route("/page/close", self.close, methods=["POST"]),
        ]

    async def index(self, _: Request) -> Response:
        """The page itself."""
        headers = {
            "Content-Security-Policy": POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return FileResponse(WEB / "index.html", headers=headers)

    async def open(self, request: Request) -> Response:
        """A new lease, and what there is to show."""
        screen = message_of(await body_of(request, MAX_PROMPT_BYTES), Screen)
        lease = self.leases.claim(heartbeats=True)

        def work(session: LabellingSession) -> Response:
            session.step = self.scan.step(screen.max_side)
            return JSONResponse(
                {
                    "lease": lease.token,
                    "scan": self.scan.sha256,
                    "name": self.scan.name,
                    "modality": self.scan.modality,
                    "is_dicom": self.scan.series is not None,
                    "shape": self.scan.geometry.resampled_shape,
                    "step": session.step,
                    "weights": self.weights,
                    "follow": self.follow,
                    "objects": session.facts(),
                }
            )

        async with self.leases.turn(lease.token):
            return await self.leases.work(lease, work, network=False)

    async def send_scan(self, request: Request) -> Response:
        """The shown voxels as NIfTI."""

        def work(session: LabellingSession, _: bytes) -> Response:
            return zipped(self.scan.image(session.step))

        return await self._on_session(request, work)

    async def receive_place(self, request: Request) -> Response:
        """Where the crosshair rests: the window there is encoded, since a click may follow."""

        def work(session: LabellingSession, body: bytes) -> Response:
            session.encode(self.scan.voxel(message_of(body, PagePlace).point_mm))
            return JSONResponse({})

        return await self._on_session(request, work, network=True)

    async def receive_prompts(self, request: Request) -> Response:
        """All prompts, for the changed box of the label map."""

        def work(session: LabellingSession, body: bytes) -> Response:
            began = time.monotonic()
            asked = message_of(body, PagePrompts)
            region = self._update(session, asked)
            change = session.change(session.everything() if asked.is_empty else region)
            meta: dict[str, Any] = {
                "box": change and [[side.start, side.stop] for side in change[1]],
                "objects": session.facts(),
                "notes": session.notes(),
                "seconds": time.monotonic() - began,
            }
            headers = {META: json.dumps(meta)}
            return zipped(b"" if change is None else change[0].tobytes(order="F"), headers)

        return await self._on_session(request, work, network=True)

    async def progress(self, request: Request) -> Response:
        """How far a prediction is; also a sign of life."""
        lease = self.leases.find(request.headers.get(LEASE))
        windows = 0 if lease.session is None else lease.session.windows_encoded
        return JSONResponse({"windows": windows})

    async def send_labels(self, request: Request) -> Response:
        """The label map as compressed NIfTI."""

        def work(session: LabellingSession, body: bytes) -> Response:
            self._update(session, message_of(body, PagePrompts))
            image = session.label_map().to_nifti()
            return Response(gzip.compress(image.to_bytes(), 1), media_type="application/gzip")

        return await self._on_session(request, work, network=True)

    async def send_dicom_seg(self, request: Request) -> Response:
        """The label map as DICOM-SEG of the series that is shown."""

        def work(session: LabellingSession, body: bytes) -> Response:
            asked = message_of(body, PagePrompts)
            self._update(session, asked)
            return Response(session.dicom_seg(asked.names), media_type="application/dicom")

        return await self._on_session(request, work, network=True)

    async def send_clicks(self, request: Request) -> Response:
        """The clicks as a click list."""

        def work(session: LabellingSession, body: bytes) -> Response:
            asked = message_of(body, PagePrompts)
            names = {name.strip() for name in asked.names.values()}
            if "" in names or len(names) < len(asked.names):
                raise RefusedError(400, "an object has no name, or that of another; rename it")
            self._update(session, asked)
            listed = session.click_list(asked.names).to_json()
            return Response(listed, media_type="application/json")

        return await self._on_session(request, work, network=True)

    async def close(self, request: Request) -> Response:
        """The end of a lease, whether or not there is one."""
        self.leases.release(request.headers.get(LEASE))
        return JSONResponse({})

    def _update(self, session: LabellingSession, asked: PagePrompts) -> Region | None:
        """Brings the label map up to date; it is, unless the session is new."""
        clicks = [
            ObjectClick(c.value, self.scan.voxel(c.point_mm), c.positive) for c in asked.clicks
        ]
        return session.update(clicks, locked=asked.locked, follow=asked.follow)

    async def _on_session(
        self,
        request: Request,
        work: Callable[[LabellingSession, bytes], Response],
        *,
        network: bool = False,
    ) -> Response:
        """Reads the body and works on the session when the lease's earlier requests are done."""
        async with self.leases.turn(request.headers.get(LEASE)) as lease:
            body = await body_of(request, MAX_PROMPT_BYTES)
            return await self.leases.work(lease, lambda s: work(s, body), network=network)


def zipped(body: bytes, headers: dict[str, str] | None = None) -> Response:
    """Bytes that the browser unpacks."""
    packed = {"Content-Encoding": "gzip", **(headers or {})}
    return Response(gzip.compress(body, 1), headers=packed, media_type="application/octet-stream")
