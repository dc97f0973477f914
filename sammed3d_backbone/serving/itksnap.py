"""The wire of ITK-SNAP's AI tools, as the documentation of `itksnap-dls` describes it.

Images arrive as gzip of float32 with x fastest, with spacing, origin and direction, so geometry is
exact. Answers hold the whole mask. Both the routes of released versions and those under `/v2` are
served. Errors carry an HTTP error code beside `{"error": ...}`: the program reads a mask out of
every answer that has none.
"""

from __future__ import annotations

import base64
import gzip
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sammed3d_backbone.serving.gate import RefusedError, limited
from sammed3d_backbone.serving.leases import GoneError, Leases
from sammed3d_backbone.serving.nninteractive import message_of
from sammed3d_backbone.serving.session import InteractiveSession

MODEL = "nnInteractive"  # the one name that released versions start without asking
EXTRA_BYTES = 2**16  # metadata and the boundaries of a form


class Metadata(BaseModel):
    """What comes beside an image; lists run over x, y, z."""

    dimensions: tuple[int, int, int]
    spacing: tuple[float, float, float]
    direction: tuple[float, float, float, float, float, float, float, float, float]
    components_per_pixel: int = 1
    component_type: str = "float32"


class InMemory(MultiPartParser):
    """Parses a form without writing parts of it to disk."""

    spool_max_size = 2**62


@dataclass(frozen=True)
class ItkSnapProtocol:
    """The routes.

    Args:
        leases: The leases of the server.
        version: Shown by ITK-SNAP.
        models: Names of the network that are listed.
        max_image_bytes: Largest size of an image.
    """

    leases: Leases[InteractiveSession]
    version: str
    models: tuple[str, ...]
    max_image_bytes: int

    def routes(self) -> list[Route]:
        """All paths of the protocol."""
        point = "process_point_interaction/{session}"
        paths: list[tuple[str, str, Callable[[Request], Any]]] = [
            ("GET", "/status", self.status),
            ("GET", "/v2/models", self.list_models),
            ("GET", "/start_session", self.start),
            ("GET", "/v2/start_session/{model}", self.start),
            ("POST", "/upload_raw/{session}", self.upload),
            ("POST", "/v2/upload_raw/{session}", self.upload),
            ("GET", f"/{point}", self.click),
            ("GET", f"/v2/{point}", self.click),
            ("POST", "/process_scribble_interaction/{session}", self.refuse_prompt),
            ("POST", "/process_lasso_interaction/{session}", self.refuse_prompt),
            ("GET", "/reset_interactions/{session}", self.reset),
            ("GET", "/v2/reset_interactions/{session}", self.reset),
            ("GET", "/end_session/{session}", self.end),
            ("GET", "/v2/end_session/{session}", self.end),
        ]
        return [Route(path, answered(work), methods=[method]) for method, path, work in paths]

    async def status(self, _: Request) -> Json:
        """Answers that the server runs."""
        return {"status": "ok", "version": self.version}

    async def list_models(self, _: Request) -> Json:
        """The network, under each of its names."""
        can = {"channels": [1], "dimensions": 3, "interactions": ["point"]}
        return {"models": [{"id": name, **can} for name in self.models]}

    async def start(self, _: Request) -> Json:
        """A new session; any model's name means the one network."""
        return {"session_id": self.leases.claim(heartbeats=False).token}

    async def upload(self, request: Request) -> Json:
        """Receives an image."""
        async with self.leases.turn(request.path_params["session"]) as lease:
            meta, data = await self._form(request)

            def work(session: InteractiveSession) -> Json:
                image = inflated(data, meta)
                properties = {"spacing": meta.spacing[::-1], "direction": meta.direction}
                session.set_image(image[None], properties)
                session.set_target_buffer(np.zeros(image.shape, np.uint8))
                return {"message": "image received"}

            return await self.leases.work(lease, work, network=False)

    async def click(self, request: Request) -> Json:
        """A click, and the whole mask."""
        query = request.query_params
        texts = query.getlist("point") or [query.get(axis, "") for axis in "xyz"]
        try:
            x, y, z = (float(text) for text in texts)
        except ValueError:
            raise RefusedError(400, "point: give x, y and z as numbers") from None
        positive = query.get("foreground", "false").lower() in ("true", "1")

        def work(session: InteractiveSession) -> Json:
            session.add_point_interaction((z, y, x), positive)
            mask = np.asarray(session.target_buffer, np.int8)
            text = base64.b64encode(gzip.compress(mask.tobytes(), compresslevel=1))
            return {"status": "success", "result": text.decode()}

        async with self.leases.turn(request.path_params["session"]) as lease:
            return await self.leases.work(lease, work, network=True)

    async def reset(self, request: Request) -> Json:
        """The next object."""

        def work(session: InteractiveSession) -> Json:
            session.reset_interactions()
            return {"status": "success"}

        async with self.leases.turn(request.path_params["session"]) as lease:
            return await self.leases.work(lease, work, network=False)

    async def end(self, request: Request) -> Json:
        """The end of a session, whether or not there is one."""
        found = self.leases.release(request.path_params["session"])
        return {"message": "Session ended" if found else "Invalid session"}

    async def refuse_prompt(self, request: Request) -> Json:
        """Scribbles and lassos."""
        self.leases.find(request.path_params["session"])
        raise RefusedError(400, "this network takes clicks only; click on the object")

    async def _form(self, request: Request) -> tuple[Metadata, bytes]:
        """Metadata and compressed voxels of an upload."""
        parts = limited(request, self.max_image_bytes + EXTRA_BYTES)
        try:
            form = await InMemory(
                request.headers, parts, max_files=1, max_fields=1, max_part_size=EXTRA_BYTES
            ).parse()
        except (MultiPartException, KeyError, ValueError) as error:
            raise RefusedError(400, f"the upload is not a form ({error}); send it again") from None
        try:
            metadata, file = form.get("metadata"), form.get("file")
            if not isinstance(metadata, str) or file is None or isinstance(file, str):
                raise RefusedError(400, "an upload has two parts, file and metadata; send both")
            return checked(message_of(metadata, Metadata), self.max_image_bytes), await file.read()
        finally:
            await form.close()


def checked(meta: Metadata, max_bytes: int) -> Metadata:
    """Metadata of an image that can be received.

    Raises:
        RefusedError: If it is of another kind, or too large.
    """
    if meta.components_per_pixel != 1 or meta.component_type != "float32":
        raise RefusedError(400, "an image with one component of float32 is needed; select it")
    if min(meta.dimensions) < 1 or 4 * math.prod(meta.dimensions) > max_bytes:
        raise RefusedError(
            413, f"dimensions {meta.dimensions}: an image has 1 to {max_bytes} bytes; crop it"
        )
    return meta


Json = Mapping[str, Any]


def answered(work: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """An endpoint whose refusals are in the protocol's own words."""

    async def endpoint(request: Request) -> Response:
        try:
            return JSONResponse(await work(request))
        except GoneError:
            return JSONResponse({"error": "Invalid session"}, 404)
        except RefusedError as error:
            return JSONResponse({"error": error.detail}, error.status)
        except (TypeError, ValueError) as error:
            return JSONResponse({"error": str(error)}, 400)

    return endpoint


def inflated(data: bytes, meta: Metadata) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Voxels (z, y, x) out of gzip, never more than the metadata declare.

    Raises:
        RefusedError: If the data do not hold exactly those.
    """
    size = 4 * math.prod(meta.dimensions)
    decoder = zlib.decompressobj(wbits=31)
    try:
        raw = decoder.decompress(data, size + 1)
    except zlib.error as error:
        raise RefusedError(400, f"file is not gzip ({error}); send it again") from None
    if len(raw) != size:
        raise RefusedError(400, f"file holds {len(raw)} bytes instead of {size}; send it again")
    return np.frombuffer(bytearray(raw), "<f4").reshape(meta.dimensions[::-1])  # writable
