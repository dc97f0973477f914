"""`make kill-test`: a line for each command, exit code 1 on a loss.

python -m tests.kills [KILLS_PER_COMMAND] [SEED]
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from .harness import COMMANDS, campaign, small_model


def main(kills=13, seed=0):
    """Prints the table; returns the faults."""
    faults, landed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(Path(folder) / "model.safetensors")
        for name in COMMANDS:
            tally = campaign(name, kills, seed, Path(folder), model)
            print(
                f"{name:10} {tally.kills:3} kills, {tally.too_late} came too late, "
                f"{len(tally.faults)} faults",
                flush=True,
            )
            faults += tally.faults
            landed += tally.kills
    print("\n".join([f"{landed} kills, {len(faults)} faults", *faults]))
    return faults


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
