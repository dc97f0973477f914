"""Click lists as JSON: what was clicked on which volume, with which weights and settings.

Replayed on the same, a list gives the same masks bit for bit; on anything else it is refused. A
list written by hand may leave out all but the clicks, and give places in mm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive.prompts import Click

FORMAT = "sammed3d-clicks/1"
POINT_KEYS = ("point_vox", "point_mm")
KEYS = {"format", "volume_sha256", "weights_sha256", "settings", "clicks"}


@dataclass(frozen=True)
class ClickList:
    """The content of a file.

    Args:
        clicks: Arguments of `Predictor.click`, in order.
        volume_sha256: Of the volume they were made on; None if the file does not say.
        weights_sha256: Of the network; likewise.
        settings: Of the predictor; those that the file does not name are free.
    """

    clicks: tuple[Mapping[str, Any], ...]
    volume_sha256: str | None = None
    weights_sha256: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def volume_sha256(volume: Volume) -> str:
    """A hash of shape, affine and values as float32, whatever their type and order in memory."""
    digest = hashlib.sha256(f"{volume.shape}".encode())
    digest.update(np.ascontiguousarray(volume.affine, dtype="<f8").data)
    for plane in volume.array:  # a plane at a time, so that no copy of the volume is made
        digest.update(np.ascontiguousarray(plane, dtype="<f4").data)
    return digest.hexdigest()


def to_json(
    clicks: Iterable[Click], volume_sha256: str, weights_sha256: str, settings: Mapping[str, Any]
) -> str:
    """The text of a click list."""
    entries = [
        {"object": c.object, "point_vox": list(c.point_vox), "positive": c.positive} for c in clicks
    ]
    head = {
        "format": FORMAT,
        "volume_sha256": volume_sha256,
        "weights_sha256": weights_sha256,
        "settings": dict(settings),
    }
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    return json.dumps(head, indent=1)[:-2] + f',\n "clicks": [\n  {lines}\n ]\n}}\n'


def read(path: str | Path) -> ClickList:
    """The click list of a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no click list; the message says where.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no click list at {path}; check the path")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); give a file of `save_clicks`") from None
    if not isinstance(content, dict) or not isinstance(content.get("clicks"), list):
        raise ValueError(f'{path} holds no "clicks"; give a file of `save_clicks`')
    if content.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{path} is of format {content['format']!r}, this version reads {FORMAT!r}; "
            "upgrade sammed3d-backbone"
        )
    unknown = sorted(content.keys() - KEYS)
    if unknown:
        raise ValueError(f"{path} names {unknown}; known are {sorted(KEYS)}")
    for number, entry in enumerate(content["clicks"], start=1):
        _require_click(path, number, entry)
    return ClickList(
        tuple(content["clicks"]),
        content.get("volume_sha256"),
        content.get("weights_sha256"),
        content.get("settings", {}),
    )


def _require_click(path: Path, number: int, entry: object) -> None:
    known = {"object", "positive", *POINT_KEYS}
    if not isinstance(entry, dict) or not entry.keys() <= known:
        raise ValueError(f"{path}, click {number}: {entry!r}; a click has {sorted(known)}")
    if not isinstance(entry.get("positive", True), bool):
        raise ValueError(f'{path}, click {number}: "positive" is true or false')
    if not isinstance(entry.get("object", ""), str):
        raise ValueError(f'{path}, click {number}: "object" is a name')
