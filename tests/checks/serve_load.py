"""Eight programs at once on one server: how long they wait, and how much memory it takes.

    python -m tests.checks.serve_load               # 10 minutes -> results/serve_load.json
    python -m tests.checks.serve_load --minutes 1 --out /tmp/load.json

`sammed3d serve` runs with the weights `tiny` on a CT of SAMMED3D_DATA. Each client is the real one
of 3D Slicer, MITK and napari and does what a hasty user would, without a pause: a few clicks on an
organ, undo, the next object, and now and then the scan anew. At the end one client vanishes without
a word, and its lease must end by itself. Exits with 1 if a bound does not hold. Beside
other work on the machine (`machine_load` in the result) the clock says little.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession
from numpy.typing import NDArray

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import write_text
from sammed3d_backbone.provenance import provenance

OUT = Path(__file__).parent / "results" / "serve_load.json"
DATA = Path(os.environ.get("SAMMED3D_DATA", "../shared/data")) / "singles" / "totalsegmentator"
SCAN, ORGANS = "ct_torso.nii.gz", "ct_torso_seg.nii.gz"
CLIENTS = 8
SLOWEST = 4.0  # longest answer of a client, in medians
GIVEN_UP_S = 60.0  # after which the programs stop waiting for an answer
MEMORY_MIB, IMAGES = 1024, 3  # bound: so much, and so many times the images
BACK_MIB = 64  # between the memory before the clients and after them
VANISHED_S = 130  # after which a server must have noticed
MIB = 2**20


class Client:
    """A hasty user.

    Args:
        address: Address of the server.
        seed: Seed of the user's choices.
        image: An image as viewers send it, (1, d0, d1, d2).
        spacing_mm: Along d0, d1, d2.
        organs: Labels, (d0, d1, d2).
        server: The server; its processor time while the user waits is measured.
    """

    def __init__(
        self,
        address: str,
        seed: int,
        image: NDArray[Any],
        spacing_mm: list[float],
        organs: NDArray[Any],
        server: psutil.Process,
    ) -> None:
        self.server = server
        self.rng = np.random.default_rng(seed)
        self.image, self.spacing_mm, self.organs = image, spacing_mm, organs
        # The programs give up after 60 s; here it is seen how long they would have had to wait.
        self.remote = nnInteractiveRemoteInferenceSession(address, read_timeout=600)
        # What the clock says; and the server's processor time, which is what the clock would say if
        # the server had a core to itself: it is never without work here.
        kinds = ("image", "click", "undo", "next object")
        self.seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        self.processor_seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        self.error: str | None = None

    def work(self, until_s: float) -> None:
        """Segments one object after the other until a moment of `time.monotonic`."""
        try:
            objects = 0
            while time.monotonic() < until_s:
                if objects % 10 == 0:
                    self._timed("image", self._open)
                objects += 1
                self._segment(until_s)
        except (httpx.HTTPError, RuntimeError) as error:
            self.error = f"{type(error).__name__}: {error}"

    def _open(self) -> None:
        self.remote.set_image(self.image, {"spacing": self.spacing_mm})
        self.remote.set_target_buffer(np.zeros(self.image.shape[1:], np.uint8))

    def _segment(self, until_s: float) -> None:
        inside = self.organs == self.rng.choice(np.unique(self.organs)[1:])
        for positive in (True, *self.rng.permutation([True, False])[: self.rng.integers(3)]):
            if time.monotonic() > until_s:
                return
            voxel = self.rng.choice(np.argwhere(inside == positive)).tolist()
            self._timed(
                "click", lambda v=voxel, p=positive: self.remote.add_point_interaction(v, bool(p))
            )
        self._timed("undo", self.remote.undo)
        self._timed("next object", self.remote.reset_interactions)

    def _timed(self, kind: str, request: Any) -> None:
        begin, before = time.monotonic(), sum(self.server.cpu_times()[:2])
        request()
        self.seconds[kind].append(time.monotonic() - begin)
        self.processor_seconds[kind].append(sum(self.server.cpu_times()[:2]) - before)


class Watch(threading.Thread):
    """Samples the server's memory and whether it answers, twice a second."""

    def __init__(self, address: str, pid: int) -> None:
        super().__init__(daemon=True)
        self.address, self.process = address, psutil.Process(pid)
        self.over = threading.Event()
        self.mib: list[float] = []
        self.health_s: list[float] = []
        self.refusals: list[tuple[int, str | None]] = []

    def run(self) -> None:
        """Samples until `over` is set; every tenth time it asks for a session too many."""
        with httpx.Client(base_url=self.address, timeout=60) as http:
            while not self.over.wait(0.5):
                self.mib.append(self.process.memory_info().rss / MIB)
                begin = time.monotonic()
                http.get("/healthz").raise_for_status()
                self.health_s.append(time.monotonic() - begin)
                if len(self.mib) % 10 == 0:
                    answer = http.post("/claim")
                    self.refusals.append((answer.status_code, answer.headers.get("Retry-After")))


def summary(seconds: list[float]) -> dict[str, float]:
    """How long answers took."""
    if not seconds:
        return {"answers": 0}
    median = statistics.median(seconds)
    return {
        "answers": len(seconds),
        "median_s": round(median, 4),
        "p95_s": round(float(np.percentile(seconds, 95)), 4),
        "longest_s": round(max(seconds), 4),
        "longest_in_medians": round(max(seconds) / median, 2),
    }


def started() -> tuple["subprocess.Popen[str]", str]:
    """A server with eight sessions, and its address."""
    command = [sys.executable, "-c", "from sammed3d_backbone.cli import main; main()", "serve"]
    command += ["--variant", "tiny", "--weights", "tiny", "--modality", "ct", "--axes", "RAS"]
    command += ["--port", "0", "--max-sessions", str(CLIENTS)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"http://[\d.]+:\d+", line):
            return server, found[0]
    raise RuntimeError("the server did not start")


def measured(minutes: float) -> dict[str, Any]:
    """Starts the server, lets the clients work, and tells what was seen."""
    scan, organs = Volume.load(DATA / SCAN), Volume.load(DATA / ORGANS)
    image = np.ascontiguousarray(scan.array.T[None])
    spacing_mm = list(reversed(scan.spacing_mm))
    load_before = os.getloadavg()[1]  # of five minutes; the cores are not this check's alone
    server, address = started()
    try:
        process = psutil.Process(server.pid)

        def new_client(seed: int) -> Client:
            return Client(address, seed, image, spacing_mm, organs.array.T, process)

        def resident() -> float:
            time.sleep(2)
            return process.memory_info().rss / MIB

        at_start = resident()
        first = new_client(100)  # what is loaded on first use stays
        first.work(time.monotonic() + 10)
        first.remote.close()
        before = resident()
        clients = [new_client(seed) for seed in range(CLIENTS)]
        watch = Watch(address, server.pid)
        watch.start()
        until_s = time.monotonic() + 60 * minutes
        threads = [threading.Thread(target=c.work, args=(until_s,)) for c in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        watch.over.set()
        watch.join()
        at_work = resident()
        for client in clients[1:]:
            client.remote.close()
        with_dead = resident()
        clients[0].remote._http.close()  # no release
        gone_s = 0
        lease = {"X-Lease-Token": clients[0].remote._lease_token}
        while gone_s < VANISHED_S:
            if httpx.get(f"{address}/lease_status", headers=lease).status_code == 410:
                break
            time.sleep(5)
            gone_s += 5
        time.sleep(10)
        after = resident()
    finally:
        server.terminate()
        server.wait(30)
    return {
        "minutes": minutes,
        "machine_load": {
            "before": round(load_before, 1),
            "after": round(os.getloadavg()[1], 1),
        },
        "scan": {"file": SCAN, "shape": scan.shape, "mib": round(image.nbytes / MIB, 2)},
        "clients": [
            {"error": client.error}
            | {kind: summary(seconds) for kind, seconds in client.seconds.items()}
            | {"click, processor time": summary(client.processor_seconds["click"])}
            for client in clients
        ],
        "health": summary(watch.health_s),
        "one_too_many": sorted({str(refusal) for refusal in watch.refusals}),
        "resident_mib": {
            "at_start": round(at_start, 1),
            "after_one_client": round(before, 1),
            "highest": round(max(watch.mib), 1),
            "after_work": round(at_work, 1),
            "with_one_vanished_client": round(with_dead, 1),
            "after_all_leases": round(after, 1),
        },
        "vanished_client_noticed_after_s": gone_s,
    }


def broken_bounds(seen: dict[str, Any]) -> list[str]:
    """Which bounds do not hold, in words."""
    broken = []
    for number, client in enumerate(seen["clients"]):
        if client["error"]:
            broken.append(f"client {number}: {client['error']}")
        if client["click"]["answers"] and client["click"]["longest_in_medians"] > SLOWEST:
            broken.append(f"client {number} waited {client['click']['longest_in_medians']} medians")
        if client["click"]["answers"] and client["click"]["longest_s"] > GIVEN_UP_S:
            broken.append(f"client {number} waited {client['click']['longest_s']} s")
    memory = seen["resident_mib"]
    if memory["highest"] > MEMORY_MIB + IMAGES * CLIENTS * seen["scan"]["mib"]:
        broken.append(f"{memory['highest']} MiB were resident")
    if memory["after_all_leases"] > memory["after_one_client"] + BACK_MIB:
        broken.append(f"{memory['after_all_leases']} MiB stay resident")
    if any(not refusal.startswith("(503, '") for refusal in seen["one_too_many"]):
        broken.append(f"a client too many got {seen['one_too_many']}")
    if seen["vanished_client_noticed_after_s"] >= VANISHED_S:
        broken.append("the lease of a vanished client did not end")
    return broken


def main() -> int:
    """Measures, writes, and returns 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description="Eight programs at once on one server.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    seen = measured(args.minutes)
    broken = broken_bounds(seen)
    about = provenance(Path(__file__).parent)
    write_text(
        args.out,
        json.dumps({"provenance": about, "broken_bounds": broken, **seen}, indent=1) + "\n",
    )
    print(json.dumps(seen["resident_mib"]), json.dumps(seen["one_too_many"]))
    for client in seen["clients"]:
        print(
            {kind: found for kind, found in client.items() if kind.startswith(("error", "click"))}
        )
    print("\n".join(broken) or "all bounds hold")
    return int(bool(broken))


if __name__ == "__main__":
    raise SystemExit(main())
