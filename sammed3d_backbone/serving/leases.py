"""Who may use the server: a lease per client, with its session, its clocks and its place in line.

One network serves all leases. What runs the network waits in one line, first come, first served,
also where programs and pages have leases of their own; everything else (receiving an image, undo)
runs beside it, so that a prediction delays nobody's heartbeat. Within a lease one request is
handled at a time.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Session = TypeVar("Session")
Result = TypeVar("Result")


class GoneError(Exception):
    """The lease does not exist, or no longer."""


class FullError(Exception):
    """All sessions are taken."""


class Lease(Generic[Session]):
    """A client's right to one session.

    Args:
        token: Its secret name.
        session: Its work.
        liveness_s: Seconds without any sign of life after which the client counts as dead; None
            for clients that send none.
    """

    def __init__(self, token: str, session: Session, liveness_s: float | None) -> None:
        self.token = token
        self.session: Session | None = session
        self.liveness_s = liveness_s
        self.seen_s = self.active_s = time.monotonic()
        self.requests = 0  # under way or waiting
        self.turn = asyncio.Lock()


class Leases(Generic[Session]):
    """All leases of one kind of a server.

    Args:
        new_session: Builds the session of a lease.
        line: Runs the network, one piece of work at a time.
        max_sessions: How many leases there may be at a time.
        idle_s: Seconds without work after which a lease ends.
        liveness_s: Seconds without a sign of life after which the lease of a client that promises
            heartbeats ends.
    """

    def __init__(
        self,
        new_session: Callable[[], Session],
        line: ThreadPoolExecutor,
        *,
        max_sessions: int,
        idle_s: float,
        liveness_s: float,
    ) -> None:
        self.max_sessions = max_sessions
        self.idle_s = idle_s
        self.liveness_s = liveness_s
        self._new_session = new_session
        self._leases: dict[str, Lease[Session]] = {}
        self._line = line

    def claim(self, *, heartbeats: bool) -> Lease[Session]:
        """A new lease.

        Args:
            heartbeats: Whether the client promises signs of life.

        Raises:
            FullError: If there are as many as there may be.
        """
        self.sweep()
        if len(self._leases) >= self.max_sessions:
            raise FullError
        token = secrets.token_urlsafe(24)
        lease = Lease(token, self._new_session(), self.liveness_s if heartbeats else None)
        self._leases[token] = lease
        logger.info("a session began; %d of %d in use", len(self._leases), self.max_sessions)
        return lease

    def find(self, token: str | None) -> Lease[Session]:
        """The lease of a token; its client has shown that it lives.

        Raises:
            GoneError: If there is none.
        """
        lease = self.peek(token)
        lease.seen_s = time.monotonic()
        return lease

    def peek(self, token: str | None) -> Lease[Session]:
        """The lease of a token, without touching its clocks.

        Raises:
            GoneError: If there is none.
        """
        lease = self._leases.get(token or "")
        if lease is None or self._is_over(lease):
            raise GoneError
        return lease

    def remaining_s(self, lease: Lease[Session]) -> float:
        """Seconds until a lease ends if nothing is done."""
        return max(0.0, self.idle_s - (time.monotonic() - lease.active_s))

    def release(self, token: str | None, reason: str = "ended") -> bool:
        """Ends a lease and frees its memory; whether there was one."""
        lease = self._leases.pop(token or "", None)
        if lease is None:
            return False
        lease.session = None  # a request under way keeps it until it is done
        return_freed_memory()
        logger.info("a session %s; %d of %d in use", reason, len(self._leases), self.max_sessions)
        return True

    def sweep(self) -> None:
        """Ends the leases of clients that are idle or dead."""
        for lease in [lease for lease in self._leases.values() if self._is_over(lease)]:
            self.release(lease.token, "was left")

    @asynccontextmanager
    async def turn(self, token: str | None) -> AsyncIterator[Lease[Session]]:
        """A lease for one request that works on its session, when earlier ones are done.

        Raises:
            GoneError: If there is no such lease, or it ended while the request waited.
        """
        lease = self.find(token)
        lease.requests += 1
        try:
            async with lease.turn:
                if lease.session is None:
                    raise GoneError
                yield lease
        finally:
            lease.requests -= 1
            lease.seen_s = lease.active_s = time.monotonic()

    async def work(
        self, lease: Lease[Session], work: Callable[[Session], Result], *, network: bool
    ) -> Result:
        """Runs something on a lease's session in a thread.

        Args:
            lease: Whose turn it is.
            work: Gets the session.
            network: Whether it may run the network and must wait in line.

        Raises:
            GoneError: If the lease ended before the work began.
        """

        def run() -> Result:
            session = lease.session
            if session is None:
                raise GoneError
            return work(session)

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._line if network else None, run)

    async def keep_swept(self) -> None:
        """Sweeps until it is cancelled."""
        while True:
            await asyncio.sleep(min(5.0, self.liveness_s / 4))
            self.sweep()

    def close(self) -> None:
        """Ends all leases."""
        for token in list(self._leases):
            self.release(token)

    def _is_over(self, lease: Lease[Session]) -> bool:
        if lease.requests:
            return False
        now = time.monotonic()
        dead = lease.liveness_s is not None and now - lease.seen_s > lease.liveness_s
        return dead or now - lease.active_s > self.idle_s


def return_freed_memory() -> None:
    """Gives freed memory back to the system; glibc keeps it otherwise, other systems do not."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
