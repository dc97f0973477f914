"""What every request must pass before a protocol sees it: who sent it, and how large it is.

A web page may send requests to a server on the loopback interface, so the `Host` must be this
machine and an `Origin` must be this server. Addresses written in digits cannot be rebound to
another machine by a name server and are accepted.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, Collection

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

FAILED = "the server failed; its log says more"
STALLED_S = 60.0  # without a byte of a body


class RefusedError(Exception):
    """A request that is answered with an error and a sentence."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Gate:
    """Refuses requests from foreign pages, under foreign names, and without the key.

    Unexpected exceptions are answered with status 500 and without a traceback; the log has it.

    Args:
        app: What comes behind.
        api_key: Needed as `Authorization: Bearer KEY`; None for none.
        hosts: Names of this machine beside `localhost` and addresses in digits.
        open_paths: Paths that need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        hosts: Collection[str],
        open_paths: Collection[str],
    ) -> None:
        self.app = app
        self.api_key = api_key
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers itself or passes on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a websocket is closed without a word
        refusal = self._refusal(Headers(scope=scope), scope["path"])
        if refusal is not None:
            status, detail = refusal
            await JSONResponse({"detail": detail}, status)(scope, receive, send)
            return
        started = False

        async def sent(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except Exception:
            # Starlette would answer and raise again, on which uvicorn drops the connection before
            # the client has read the answer.
            logger.exception("a request failed")
            if started:
                raise
            await JSONResponse({"detail": FAILED}, 500)(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self._is_here(host):
            return 403, "this server does not go by that name; use localhost or its address"
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            return 403, "requests from pages of other servers are refused"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return 403, "requests from pages of other servers are refused"
        if self.api_key is None or path in self.open_paths:
            return None
        given = headers.get("authorization", "").encode(errors="replace")
        if not secrets.compare_digest(given, f"Bearer {self.api_key}".encode()):
            return 401, "the API key is missing or wrong; enter the one the server was started with"
        return None

    def _is_here(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.lower().strip("[]")
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def own_names() -> set[str]:
    """Names under which other machines may know this one."""
    return {socket.gethostname()}


async def limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The parts of a request's body.

    Raises:
        RefusedError: If the body is larger than `max_bytes`, stalls, or ends early.
    """
    too_large = RefusedError(413, f"the request is larger than {max_bytes} bytes; send less")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > max_bytes:
        raise too_large
    size = 0
    parts = request.stream()
    while True:
        try:
            part = await asyncio.wait_for(anext(parts), STALLED_S)
        except StopAsyncIteration:
            return
        except (ClientDisconnect, asyncio.TimeoutError):
            raise RefusedError(400, "the request's body did not arrive; send it again") from None
        size += len(part)
        if size > max_bytes:
            raise too_large
        yield part


async def body_of(request: Request, max_bytes: int) -> bytes:
    """A request's body.

    Raises:
        RefusedError: As `limited`.
    """
    return b"".join([part async for part in limited(request, max_bytes)])
