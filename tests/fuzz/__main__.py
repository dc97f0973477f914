"""`make fuzz`: spoiled inputs through all doors, a line for each, exit code 1 on a fault.

python -m tests.fuzz [INPUTS_PER_DOOR] [SEED] [DOOR ...]
"""

import logging
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path

from .doors import DOORS
from .harness import fuzz, limit_memory


def main(inputs=240, seed=0, *names):
    """Prints the table; returns the faults."""
    inputs, names = int(inputs), names or [*DOORS]
    warnings.simplefilter("ignore")
    logging.disable()  # nibabel's lines about headers
    limit_memory()
    faults = []
    heads = f"{'inputs':>6} {'refused':>7} {'taken':>6} {'faults':>6}"
    print(f"{'door':40} {heads} {'slowest':>8} {'peak so far':>12}")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            tally = fuzz(name, inputs, int(seed), Path(folder))
            os.chdir("/")
        counts = f"{inputs:6} {tally.refused:7} {tally.accepted:6} {len(tally.faults):6}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"{name:40} {counts} {tally.slowest_s:6.2f} s {peak:8} MiB", flush=True)
        faults += tally.faults
    print(f"{inputs * len(names)} inputs, {len(faults)} faults")
    print("\n".join(faults))
    return faults


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))
