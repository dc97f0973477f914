"""A run's newest checkpoint in one small file, and back, so that training continues elsewhere.

    python recipes/pack_checkpoint.py RUN FILE.safetensors
    python recipes/pack_checkpoint.py --unpack FILE.safetensors RUN
    python recipes/pack_checkpoint.py --unpack FILE.safetensors RUN --other-config

RUN is the folder of a run. The file holds weights and averaged weights in float16, the optimiser's
moments in bfloat16 (its step counts in float32), configuration, log and progress: half of a
checkpoint's size. After `--unpack` the recipe's own command resumes the run, at its step, with its
schedule and its next samples; what is lost is the rounding to 16 bits. With `--other-config` the
configuration is not written, so that the command may change what it asks for, such as the number of
clicks; parts of the network and the optimiser have to stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sammed3d_backbone import console
from sammed3d_backbone.files import write_text
from sammed3d_backbone.loading.checkpoint import read, write
from sammed3d_backbone.training.runs import (
    AVERAGE,
    INDEX,
    MODEL,
    OPTIMIZER,
    Progress,
    Run,
    write_checkpoint,
)

TYPES = {MODEL: torch.float16, AVERAGE: torch.float16, OPTIMIZER: torch.bfloat16}


def pack(run: Path, file: Path) -> None:
    """Writes the newest checkpoint of a run into one file.

    Raises:
        FileNotFoundError: If the run has no checkpoint.
    """
    found = Run(run).checkpoints
    if not found:
        raise FileNotFoundError(f"{run} holds no checkpoint; let the run get to its first one")
    tensors = {
        f"{part}:{name}": _rounded(name, tensor, kind)
        for part, kind in TYPES.items()
        for name, tensor in load_file(found[-1] / part).items()
    }
    index = json.loads((found[-1] / INDEX).read_text(encoding="utf-8"))
    log = [line for line in Run(run).records() if line["step"] <= index["progress"]["step"]]
    entries = {
        "progress": json.dumps(index["progress"]),
        "config": (run / "config.yaml").read_text(encoding="utf-8"),
        "log": "".join(json.dumps(line) + "\n" for line in log),
    }
    write(file, tensors, entries, overwrite=True)


def unpack(file: Path, run: Path, *, other_config: bool = False) -> None:
    """Makes the folder of a run that resumes where the packed one was.

    Raises:
        FileExistsError: If the run has checkpoints already.
        ValueError: If the file is not a packed checkpoint.
    """
    if Run(run).checkpoints:
        raise FileExistsError(f"{run} holds checkpoints; give the folder of a new run")
    tensors, metadata = read(file)
    if missing := {"progress", "config", "log"} - metadata.keys():
        raise ValueError(f"{file} lacks {sorted(missing)}; give a file that this script wrote")
    files: dict[str, dict[str, Tensor]] = {part: {} for part in TYPES}
    for key, tensor in tensors.items():
        part, _, name = key.partition(":")
        files[part][name] = tensor.float() if tensor.is_floating_point() else tensor
    progress = Progress(**json.loads(metadata["progress"]))
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_text(run / "metrics.jsonl", metadata["log"])
    if not other_config:
        write_text(run / "config.yaml", metadata["config"])
    write_checkpoint(run / "checkpoints" / f"{progress.step:07d}", files, progress)
    print(f"{run}: {dataclasses.asdict(progress)}")


def _rounded(name: str, tensor: Tensor, kind: torch.dtype) -> Tensor:
    is_count = name.endswith("/step") or not tensor.is_floating_point()
    return tensor if is_count else tensor.to(kind)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--unpack", action="store_true")
    parser.add_argument("--other-config", action="store_true")
    arguments = parser.parse_args()
    work = partial(unpack, other_config=arguments.other_config) if arguments.unpack else pack
    sys.exit(
        console.run_program(partial(work, arguments.source, arguments.target), "pack_checkpoint")
    )
