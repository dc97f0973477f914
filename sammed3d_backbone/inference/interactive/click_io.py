"""Click lists as JSON: clicks on a volume, with hashes of the volume and weights, and settings.

With the same volume, weights and settings a list reproduces the masks exactly; with others it is
refused. A list written by hand needs only its clicks, and may give points in mm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sammed3d_backbone.data.datasets import unique_keys
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import read_text
from sammed3d_backbone.inference.interactive.prompts import OBJECT, object_name

CLICKS_FORMAT = "sammed3d-clicks/2"
LARGEST = 1e9  # of a coordinate
CLICK_TYPES = {"object": str, "positive": bool, "point_vox": list, "point_mm": list}


@dataclass(frozen=True)
class ClickList:
    """The content of a click list.

    Args:
        clicks: Arguments of `Predictor.click`, in order.
        volume_sha256: Hash of the volume; None if it is not recorded.
        weights_sha256: Hash of the weights; None if it is not recorded.
        settings: Settings of the predictor that the list depends on.
    """

    clicks: tuple[Mapping[str, Any], ...]
    volume_sha256: str | None = None
    weights_sha256: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> ClickList:
        """Reads a click list.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a click list; the message says where.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no click list at {path}; check the path")
        try:
            content = json.loads(read_text(path), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(content, dict) or not isinstance(content.get("clicks"), list):
            raise ValueError(f'{path} has no list "clicks"; give a file of `save_clicks`')
        if (given := content.pop("format", CLICKS_FORMAT)) != CLICKS_FORMAT:
            raise ValueError(f"{path} has format {given!r}, this version reads {CLICKS_FORMAT!r}")
        if not isinstance(content.get("settings", {}), dict):
            raise ValueError(f"{path} has settings {content['settings']!r}; expected an object")
        known = cls.__dataclass_fields__.keys()
        if unknown := sorted(content.keys() - known):
            raise ValueError(f"{path} has unknown entries {unknown}; expected {sorted(known)}")
        for number, click in enumerate(content["clicks"], start=1):
            if not isinstance(click, dict) or not all(
                isinstance(value, CLICK_TYPES.get(key, ()))
                and (not isinstance(value, list) or all(map(_is_number, value)))
                for key, value in click.items()
            ):
                raise ValueError(
                    f"{path}, click {number}: {click!r}; expected an object with "
                    f"{', '.join(f'{key} ({kind.__name__})' for key, kind in CLICK_TYPES.items())}"
                )
            try:
                object_name(click.get("object", OBJECT))
            except ValueError as error:
                raise ValueError(f"{path}, click {number}: {error}") from None
        return cls(**{**content, "clicks": tuple(content["clicks"])})

    def to_json(self) -> str:
        """The text of the file, with a line per click."""
        values = {"format": CLICKS_FORMAT, **vars(self)}
        clicks = ",\n  ".join(json.dumps(click) for click in values.pop("clicks"))
        return json.dumps(values, indent=1)[:-2] + f',\n "clicks": [\n  {clicks}\n ]\n}}\n'


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST  # also no NaN


def volume_sha256(volume: Volume) -> str:
    """A hash of shape, affine and values as float32, independent of their storage in memory."""
    digest = hashlib.sha256(f"{volume.shape}".encode())
    digest.update(np.ascontiguousarray(volume.affine, dtype="<f8").data)
    for plane in volume.array:  # a plane at a time, so that no copy of the volume is made
        digest.update(np.ascontiguousarray(plane, dtype="<f4").data)
    return digest.hexdigest()
