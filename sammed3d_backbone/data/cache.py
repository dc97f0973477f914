"""Prepared cases on disk, which the next start reads instead of preparing them again.

One file per case and preprocessing, named by a hash of everything that it depends on, so a changed
source file has another name. Files are memory-mapped, and processes of a machine share the pages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sammed3d_backbone.data.datasets import Case, Dataset
from sammed3d_backbone.files import atomic_path, inside

FORMAT = 1  # version of the content; part of the hash


def cache_path(folder: Path, case: Case, dataset: Dataset, preparation: object) -> Path:
    """The file of a case.

    Args:
        folder: Folder of the cache.
        case: Its files exist.
        dataset: The case's data set.
        preparation: The `Preprocessing` that was applied.
    """
    files = [path.resolve() for path in (*case.images, *case.label_files)]
    depends_on = {
        "format": FORMAT,
        "preparation": dataclasses.asdict(preparation),  # type: ignore[call-overload]
        "files": [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        "values": case.values,
        "numbers": case.numbers,
        "annotated": case.annotated,
        "channels": len(dataset.channels),
        "classes": dataset.classes,
    }
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    return inside(folder, case.id, f"-{digest[:16]}.safetensors")


def read_prepared(path: Path) -> tuple[Tensor, Tensor] | None:
    """Image and label of a file, mapped into memory; None if it is missing or damaged."""
    try:
        tensors = load_file(path)
        return tensors["image"], tensors["label"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def write_prepared(path: Path, image: Tensor, label: Tensor) -> None:
    """Writes image and label; the file is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # As bytes, since the library's own writer leaves a file of its own when it is killed.
    content = save({"image": image.contiguous(), "label": label.contiguous()})
    with atomic_path(path) as draft:
        draft.write_bytes(content)
