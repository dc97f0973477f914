"""Where the cases of a data set are computed: here, or by the workers of a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import joblib

DASK = "dask://"
BACKENDS = ("loky", "threading", "sequential", "ray")  # of joblib, that give results one by one
MAX_JOBS = 1024  # processes start at once, and each takes memory
ANSWER_S = 10  # seconds in which a scheduler has to answer


@contextlib.contextmanager
def workers(backend: str | None, jobs: int) -> Iterator[None]:
    """Runs what joblib runs inside the block on a back end.

    Args:
        backend: ``dask://HOST:PORT``, a running Dask scheduler, whose workers need this package and
            the same paths; or one of `BACKENDS`. None leaves the choice to the call of joblib.
        jobs: Number of workers; -1 for all cores. A cluster computes with all that it has.

    Raises:
        ValueError: If there are too many workers, the back end is not known, or its package is
            missing.
        ConnectionError: If no scheduler answers.
    """
    if jobs == 0:
        raise ValueError("jobs is 0; give 1 or more, or -1 for all cores")
    if jobs > MAX_JOBS:
        raise ValueError(f"jobs is {jobs}; give at most {MAX_JOBS}")
    if backend is None:
        yield
    elif backend.startswith(DASK):
        client = _client(backend.removeprefix(DASK))
        with client, joblib.parallel_config("dask", client=client):
            yield
    elif backend not in BACKENDS:
        raise ValueError(
            f"backend {backend!r} is not known; give {', '.join(BACKENDS)} or {DASK}..."
        )
    else:
        if backend == "ray":
            _register_ray()
        with joblib.parallel_config(backend, n_jobs=jobs):
            yield


def _client(address: str) -> contextlib.AbstractContextManager[object]:
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(
            f"backend {DASK}{address} needs Dask; pip install 'sammed3d-backbone[cluster]'"
        ) from None
    try:
        client: contextlib.AbstractContextManager[object] = Client(
            f"tcp://{address}", timeout=ANSWER_S, set_as_default=False
        )
        return client
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Dask scheduler answers at {address} ({error}); start `dask scheduler` and "
            "`dask worker`, or correct the address"
        ) from None


def _register_ray() -> None:
    try:
        from ray.util.joblib import register_ray
    except ImportError:
        raise ValueError("backend ray needs Ray; pip install ray") from None
    register_ray()
