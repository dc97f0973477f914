"""`make fuzz`: spoiled inputs through all doors, a line for each, exit code 1 on a fault.

python -m tests.fuzz [INPUTS_PER_DOOR] [SEED]
"""

import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path

from .doors import DOORS
from .harness import fuzz, limit_memory


def main(inputs=240, seed=0):
    """Prints the table; returns the faults."""
    warnings.simplefilter("ignore")
    limit_memory()
    faults = []
    print(f"{'door':40} {'inputs':>6} {'refused':>7} {'taken':>6} {'faults':>6} {'slowest':>8}")
    for name in DOORS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            tally = fuzz(name, inputs, seed, Path(folder))
            os.chdir("/")
        counts = f"{inputs:6} {tally.refused:7} {tally.accepted:6} {len(tally.faults):6}"
        print(f"{name:40} {counts} {tally.slowest_s:6.2f} s", flush=True)
        faults += tally.faults
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{inputs * len(DOORS)} inputs, {len(faults)} faults, peak {peak} MiB")
    print("\n".join(faults))
    return faults


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
