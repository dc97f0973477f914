"""One spoiled input through a door, and what may not happen."""

import resource
import signal
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sammed3d_backbone.console import EXPECTED

from .doors import DOORS

MOST_S = 20
MOST_BYTES = 3 * 2**30  # beside what the libraries take


class TooSlow(BaseException):
    """Raised by the alarm."""


@dataclass
class Tally:
    """What became of the inputs of one door."""

    accepted: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    faults: list[str] = field(default_factory=list)


def limit_memory():
    """Bounds the memory of this process, for `make fuzz`."""
    status = Path("/proc/self/status").read_text()
    held = int(next(x for x in status.splitlines() if x.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (held + MOST_BYTES,) * 2)


def fuzz(name, inputs, seed, place):
    """Sends spoiled inputs through a door.

    Args:
        name: Name of the door.
        inputs: Their number.
        seed: The same inputs every time.
        place: An empty folder, in which a canary is put.
    """
    door, tally = DOORS[name], Tally()
    canary = place / "canary"
    canary.mkdir()
    (canary / "a.txt").write_text("precious")
    before = signal.signal(signal.SIGALRM, _give_up)
    try:
        for number in range(inputs):
            folder = place / f"{number}"
            content = door.spoil(np.random.default_rng((seed, zlib.crc32(name.encode()), number)))
            for file, text in {**door.extra(), door.name: content}.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(text)
            there = _files(place)
            began = time.monotonic()
            signal.alarm(MOST_S)
            fault = ""
            try:
                door.open(folder / door.name)
                tally.accepted += 1
            except EXPECTED as error:
                tally.refused += 1
                is_named = str(folder) in str(error) or Path(door.name).name in str(error)
                if door.is_named and not is_named:
                    fault = f"no path in {type(error).__name__}: {error}"
            except TooSlow:
                fault = f"more than {MOST_S} s"
            except Exception as error:  # noqa: BLE001 (that is what is looked for)
                fault = f"{type(error).__name__}: {error}"
            finally:
                signal.alarm(0)
            tally.slowest_s = max(tally.slowest_s, time.monotonic() - began)
            if _files(place) != there or Path("EXECUTED").exists():
                fault = "wrote, removed or ran something"
            if fault:
                tally.faults.append(f"{name} {number}: {fault[:300]}")
            for file in sorted(folder.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            folder.rmdir()
    finally:
        signal.signal(signal.SIGALRM, before)
    return tally


def _give_up(*_):
    raise TooSlow


def _files(place):
    return {path: path.stat().st_size for path in place.rglob("*")}
