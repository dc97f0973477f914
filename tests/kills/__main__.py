"""`make kill-test`: a line for each command, exit code 1 on a fault.

python -m tests.kills [KILLS_PER_COMMAND] [SEED] [COMMAND ...]
"""

import sys
import tempfile
import time
from pathlib import Path

from .harness import COMMANDS, DISTURBANCES, campaign, small_model


def main(kills=13, seed=0, *names):
    """Prints the table; returns the faults."""
    faults, landed = [], 0
    others = [name for name in DISTURBANCES if name != "kill"]
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(Path(folder) / "model.safetensors")
        for name in names or COMMANDS:
            began = time.monotonic()
            tally = campaign(name, int(kills), int(seed), Path(folder), model, others)
            counts = f"{tally.kills:3} kills, {tally.too_late} came too late, {', '.join(others)}"
            took = time.monotonic() - began
            print(f"{name:10} {counts}: {len(tally.faults)} faults, {took:.0f} s", flush=True)
            faults += tally.faults
            landed += tally.kills
    print("\n".join([f"{landed} kills, {len(faults)} faults", *faults]))
    return faults


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))
