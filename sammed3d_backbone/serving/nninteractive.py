"""The wire of `nninteractive-client` 2.x: 3D Slicer, MITK, napari and scripts.

JSON or an array in, JSON or the changed box of the mask out; metadata travel in the header `X-Meta`
beside an array. The programs end a session at any error but 410 and 503, so what a user may do in
good faith is answered, not refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sammed3d_backbone.serving.arrays import packed, unpacked
from sammed3d_backbone.serving.gate import RefusedError, body_of
from sammed3d_backbone.serving.leases import Leases
from sammed3d_backbone.serving.session import Box, InteractiveSession

META = "X-Meta"
LEASE = "X-Lease-Token"
OPEN_PATHS = ("/healthz",)
MAX_JSON_BYTES = 2**16
BUFFER_TYPES = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | {"bool"}

Message = TypeVar("Message", bound=BaseModel)
Json = Mapping[str, Any]


class Buffer(BaseModel):
    """Body of `/set_target_buffer`."""

    shape: tuple[int, int, int]
    dtype: str


class Autozoom(BaseModel):
    """Body of `/set_do_autozoom`."""

    do_autozoom: bool


class PointPrompt(BaseModel):
    """Body of `/add_point_interaction`."""

    coordinates: tuple[float, float, float]
    include_interaction: bool
    run_prediction: bool = True


class SeedPrompt(BaseModel):
    """Metadata of `/add_initial_seg_interaction`."""

    run_prediction: bool = False


class ImageMeta(BaseModel):
    """Metadata of `/set_image`."""

    image_properties: dict[str, Any] | None = None


@dataclass(frozen=True)
class NnInteractiveProtocol:
    """The routes.

    Args:
        leases: The leases of the server.
        capabilities: What `/capabilities` answers.
        max_image_bytes: Largest size of an image or a mask.
    """

    leases: Leases[InteractiveSession]
    capabilities: Json
    max_image_bytes: int

    def routes(self) -> list[Route]:
        """All paths of the protocol."""
        posts: dict[str, Callable[[Request], Any]] = {
            "/claim": self.claim,
            "/release": self.release,
            "/heartbeat": self.heartbeat,
            "/set_image": self.set_image,
            "/set_target_buffer": self.set_target_buffer,
            "/set_do_autozoom": self.set_do_autozoom,
            "/reset_interactions": self.reset_interactions,
            "/undo": self.undo,
            "/predict": self.predict,
            "/add_point_interaction": self.add_point,
            "/add_initial_seg_interaction": self.add_seed,
            "/add_bbox_interaction": self.refuse_prompt,
            "/add_scribble_interaction": self.refuse_prompt,
            "/add_lasso_interaction": self.refuse_prompt,
        }
        gets = {
            "/healthz": self.healthz,
            "/capabilities": self.get_capabilities,
            "/lease_status": self.lease_status,
        }
        return [
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
        ]

    # --- leases --------------------------------------------------------------------------------

    async def healthz(self, _: Request) -> Response:
        """Whether the server runs."""
        return JSONResponse({"ok": True})

    async def get_capabilities(self, _: Request) -> Response:
        """What the programs enable their tools by."""
        return JSONResponse(self.capabilities)

    async def claim(self, _: Request) -> Response:
        """A new lease."""
        lease = self.leases.claim(heartbeats=True)
        return JSONResponse(
            {
                "lease_token": lease.token,
                "idle_timeout_seconds": self.leases.idle_s,
                "liveness_timeout_seconds": self.leases.liveness_s,
                "max_sessions": self.leases.max_sessions,
            }
        )

    async def release(self, request: Request) -> Response:
        """The end of a lease, whether or not there is one."""
        self.leases.release(request.headers.get(LEASE))
        return JSONResponse({"released": True})

    async def heartbeat(self, request: Request) -> Response:
        """A sign of life; it does not count as work."""
        lease = self.leases.find(request.headers.get(LEASE))
        return JSONResponse({"remaining_seconds": self.leases.remaining_s(lease)})

    async def lease_status(self, request: Request) -> Response:
        """How long a lease still has."""
        lease = self.leases.peek(request.headers.get(LEASE))
        return JSONResponse(
            {
                "remaining_seconds": self.leases.remaining_s(lease),
                "idle_timeout_seconds": self.leases.idle_s,
            }
        )

    # --- image and target ----------------------------------------------------------------------

    async def set_image(self, request: Request) -> Response:
        """Receives an image."""
        meta = meta_of(request, ImageMeta)

        def work(session: InteractiveSession, body: bytes) -> Response:
            session.set_image(unpacked(body, self.max_image_bytes), meta.image_properties)
            shape = session.original_image_shape
            return JSONResponse({"original_image_shape": list(shape or ())})

        return await self._on_session(request, work, self.max_image_bytes)

    async def set_target_buffer(self, request: Request) -> Response:
        """Remembers what the client's buffer holds: zeros."""

        def work(session: InteractiveSession, body: bytes) -> Response:
            asked = message_of(body, Buffer)
            if asked.dtype not in BUFFER_TYPES:
                raise RefusedError(400, "dtype of a target buffer: give bool or an integer type")
            image = session.original_image_shape
            if image is None or asked.shape != image[1:]:  # before memory is asked for
                raise RefusedError(400, f"shape of a target buffer: give that of {image}")
            session.set_target_buffer(np.zeros(asked.shape, np.uint8))
            return JSONResponse({})

        return await self._on_session(request, work)

    async def set_do_autozoom(self, request: Request) -> Response:
        """Switches following on or off."""

        def work(session: InteractiveSession, body: bytes) -> Response:
            session.set_do_autozoom(message_of(body, Autozoom).do_autozoom)
            return JSONResponse({})

        return await self._on_session(request, work)

    async def reset_interactions(self, request: Request) -> Response:
        """The next object."""

        def work(session: InteractiveSession, _: bytes) -> Response:
            session.reset_interactions()
            return JSONResponse({})

        return await self._on_session(request, work)

    # --- prompts -------------------------------------------------------------------------------

    async def add_point(self, request: Request) -> Response:
        """A click."""

        def work(session: InteractiveSession, body: bytes) -> Response:
            asked = message_of(body, PointPrompt)
            box = session.add_point_interaction(
                asked.coordinates, asked.include_interaction, asked.run_prediction
            )
            return prediction(session, box, ran=asked.run_prediction)

        return await self._on_session(request, work, network=True)

    async def add_seed(self, request: Request) -> Response:
        """A mask to start from."""
        asked = meta_of(request, SeedPrompt)

        def work(session: InteractiveSession, body: bytes) -> Response:
            mask = unpacked(body, self.max_image_bytes)
            box = session.add_initial_seg_interaction(mask, asked.run_prediction)
            return prediction(session, box, ran=asked.run_prediction)

        return await self._on_session(
            request, work, self.max_image_bytes, network=asked.run_prediction
        )

    async def predict(self, request: Request) -> Response:
        """An answer to prompts that came without asking for one."""

        def work(session: InteractiveSession, _: bytes) -> Response:
            return prediction(session, session._predict(), ran=True)

        return await self._on_session(request, work, network=True)

    async def undo(self, request: Request) -> Response:
        """One prompt back."""

        def work(session: InteractiveSession, _: bytes) -> Response:
            ran = session.undo()
            return prediction(session, session._last_paste_bbox, ran=ran)

        return await self._on_session(request, work)

    async def refuse_prompt(self, request: Request) -> Response:
        """Boxes, scribbles and lassos, which `/capabilities` switches off."""
        self.leases.find(request.headers.get(LEASE))
        raise RefusedError(400, "this network takes clicks and masks only; click on the object")

    async def _on_session(
        self,
        request: Request,
        work: Callable[[InteractiveSession, bytes], Response],
        max_bytes: int = 0,
        *,
        network: bool = False,
    ) -> Response:
        """Reads the body and works on the session when the lease's earlier requests are done."""
        async with self.leases.turn(request.headers.get(LEASE)) as lease:
            body = await body_of(request, max_bytes + MAX_JSON_BYTES)
            return await self.leases.work(lease, lambda s: work(s, body), network=network)


def prediction(session: InteractiveSession, box: Box | None, *, ran: bool) -> Response:
    """The changed box of the target buffer, and where it lies."""
    meta: dict[str, Any] = {"ran_prediction": ran, "bbox": box, "dtype": "uint8", "shape": None}
    body = b""
    if box is not None and isinstance(session.target_buffer, np.ndarray):
        region = session.target_buffer[tuple(slice(low, high) for low, high in box)]
        meta["shape"] = list(region.shape)
        body = packed(region)
    return Response(
        body,
        media_type="application/octet-stream",
        headers={META: json.dumps(meta, separators=(",", ":"))},
    )


def message_of(text: bytes | str, kind: type[Message]) -> Message:
    """A JSON message.

    Raises:
        RefusedError: If it is not one of its kind.
    """
    try:
        return kind.model_validate_json(text or "{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the request"
        raise RefusedError(400, f"{place}: {first['msg']}") from None


def meta_of(request: Request, kind: type[Message]) -> Message:
    """The metadata beside an array.

    Raises:
        RefusedError: If they are not of their kind.
    """
    return message_of(request.headers.get(META, "{}"), kind)
