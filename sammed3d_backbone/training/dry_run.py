"""Time and memory of a run, estimated from its first steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from sammed3d_backbone.provenance import resident_bytes
from sammed3d_backbone.training.engine import peak_bytes

MEASURED = 3  # steps
ASSUMED_GIB = 8.0  # of memory, where the system does not tell


class DryRun:
    """Measures network, data and steps from its construction on, without the libraries' memory."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps = device, steps
        self.step_seconds: list[float] = []
        self.case_seconds = 0.0
        self.scored = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_reserved(device)
        else:
            control = Path("/proc/self/clear_refs")
            if control.exists():
                control.write_text("5")  # proc(5): resets VmHWM
            self._before = resident_bytes("VmRSS")

    def measured(self, began: float) -> bool:
        """Notes a step that has just ended; returns whether enough steps were measured."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.step_seconds.append(time.monotonic() - began)
        self.peak_bytes = peak_bytes(self.device) - self._before
        return len(self.step_seconds) == min(MEASURED, self.steps)

    def validated(self, validate_one: Callable[[], object], cases: int) -> None:
        """Measures the validation of one case.

        Args:
            validate_one: Validates a case of medium size.
            cases: Number of cases that the whole run validates, each as often as it does.
        """
        began = time.monotonic()
        validate_one()
        self.case_seconds, self.scored = time.monotonic() - began, cases

    def __str__(self) -> str:
        """Two lines."""
        each = ", ".join(f"{seconds:.2f}" for seconds in self.step_seconds)
        total = timedelta(seconds=round(self.steps * statistics.median(self.step_seconds)))
        validation = timedelta(seconds=round(self.scored * self.case_seconds))
        return (
            f"memory: {self.peak_bytes / 2**30:.2f} GiB on {self.device.type} beside the "
            f"libraries, measured in {len(self.step_seconds)} steps\n"
            f"time: {total} for {self.steps} steps (measured: {each} s a step), {validation} for "
            f"validation ({self.case_seconds:.2f} s for one of {self.scored} cases in all)"
        )

    def figures(self) -> dict[str, object]:
        """The same as plain values."""
        seconds = [round(each, 3) for each in self.step_seconds]
        return {
            "peak_bytes": self.peak_bytes,
            "step_seconds": seconds,
            "case_seconds": round(self.case_seconds, 3),
        }


def free_gib() -> tuple[float, bool]:
    """Free memory of the GPU, or available memory of the machine, in GiB; and if it is a GPU's."""
    if torch.cuda.is_available():
        return round(torch.cuda.mem_get_info()[0] / 2**30, 1), True
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return (round(found[0] / 2**20, 1) if found else ASSUMED_GIB), False
