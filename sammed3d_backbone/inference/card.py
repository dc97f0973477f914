"""The card of a fine-tuned network: how to build it, what its outputs mean, what it expects.

It is stored twice: as the metadata of the safetensors file, so that one file is enough, and as
`config.json` beside it, as the Hub expects.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sammed3d_backbone.data.datasets import class_names, unique_keys
from sammed3d_backbone.data.preprocessing import Preprocessing

CARD_FORMAT = 2
MAX_OVERLAP = 0.95  # of windows along an axis; with it, a voxel lies in 8,000 of them


@dataclass(frozen=True)
class Card:
    """Everything about a fine-tuned network except its tensors.

    Args:
        network: A name in `adapters.registry.ADAPTERS`, or "basicunet".
        encoder: Arguments of `encoder()` without weights; empty for a network without an encoder.
        adapter: Arguments of the adapter's function without encoder and number of classes.
        labels: Class value -> name, including the background.
        channels: Names of the input channels, in order.
        preprocessing: Preprocessing of a scan; `crop_vox` is the sliding window.
        overlap: Fraction by which neighbouring windows overlap, from 0 to `MAX_OVERLAP`.
        shared: Whether each channel passes through the encoder separately; see
            adapters/channels.py.
        bottleneck: Width of the bottleneck adapters in the encoder, 0 for none; see
            adapters/bottleneck.py.
        keep_largest_component: Whether only the largest connected component of each class is kept.
        training: Configuration, data set and initial weights of the training run, for the reader.
        versions: Library versions of the training run.
    """

    network: str
    encoder: Mapping[str, Any]
    adapter: Mapping[str, Any]
    labels: Mapping[int, str]
    channels: tuple[str, ...]
    preprocessing: Preprocessing
    overlap: float = 0.5
    shared: bool = False
    bottleneck: int = 0
    keep_largest_component: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic)

    def __post_init__(self) -> None:
        problems: list[str] = []
        names = class_names(self.labels.items(), problems)
        if sorted(names) != [*range(len(self.labels))] or not names:
            problems.append(f"the values are {sorted(names)} instead of 0, 1, 2, ...")
        if problems:
            raise ValueError(f"labels={dict(self.labels)}: {problems[0]}")
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise ValueError(f"overlap={self.overlap:g}; give a number from 0 to {MAX_OVERLAP:g}")

    def __str__(self) -> str:
        """The fields that a user needs, as lines of `field: value`."""
        rows = {
            "network": f"fine-tuned {self.network}",
            "encoder": _listed(self.encoder) or "none",
            "adapter": _listed(self.adapter) or "default",
            "shared": self.shared,
            "bottleneck": self.bottleneck or "none",
            "labels": _listed(self.labels),
            "channels": ", ".join(self.channels),
            **self.preprocessing_rows(),
            "overlap": self.overlap,
            "keep_largest_component": self.keep_largest_component,
            "dataset": self.training.get("dataset", {}).get("name", "unknown"),
            "versions": _listed(self.versions) or "unknown",
        }
        return "\n".join(f"{key}: {value}" for key, value in rows.items())

    def preprocessing_rows(self) -> dict[str, str]:
        """The preprocessing as readable text, by field."""
        used = self.preprocessing
        spacing = used.spacing_mm
        return {
            "spacing_mm": " x ".join(map(str, spacing)) if spacing else "that of each scan",
            "intensity": _listed(used.intensity),
            "statistics": f"of each {used.statistics}",
            "crop_vox": " x ".join(map(str, used.crop_vox)),
            "orientation": used.orientation,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {"format": CARD_FORMAT, **values, "preprocessing": self.preprocessing.to_dict()}

    @classmethod
    def from_json(cls, text: str) -> Card:
        """The card in a file; optional fields that the file does not have get their defaults.

        Raises:
            ValueError: If the text is not a card, has another format version or unknown fields, or
                lacks a field that is needed to build the network.
        """
        try:
            values = dict(json.loads(text, object_pairs_hook=unique_keys))
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a card of a fine-tuned model: {error}; copy it again") from None
        if (found := values.pop("format", None)) != CARD_FORMAT:
            raise ValueError(
                f"the card has format {found}, this version reads {CARD_FORMAT}; upgrade "
                "sammed3d-backbone, or train the model again if the format is older"
            )
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(
                f"the card's field {'.'.join(map(str, first['loc']))!r} is not valid "
                f"({first['msg']}); upgrade sammed3d-backbone, or copy the file again"
            ) from None


def _listed(values: Mapping[Any, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
