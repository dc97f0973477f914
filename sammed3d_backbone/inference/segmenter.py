"""A fine-tuned network and all it needs <-> one safetensors file; a volume in, labels out.

The file's metadata is a `Card` as JSON: how to build the network, what its outputs mean, and how a
volume becomes its input. `load_model` needs nothing else, `segment_volume` uses it on a `Volume`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sammed3d_backbone.adapters.contract import Encoder
from sammed3d_backbone.adapters.lora import merged
from sammed3d_backbone.data.preparation import Preparation
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.loading.checkpoint import part_of, read, write
from sammed3d_backbone.loading.factory import CARD_KEY, MODEL_ENCODER, encoder, encoder_like
from sammed3d_backbone.loading.inflation import DEPTH_FILTERS
from sammed3d_backbone.loading.registry import locate
from sammed3d_backbone.models.image_encoder import ImageEncoder3D

FORMAT = 1


@dataclass(frozen=True)
class Card:
    """Everything about a fine-tuned network but its tensors.

    Args:
        network: A name in `adapters()`, or "basicunet".
        encoder: Arguments of `factory.encoder`, without weights; empty for a network without it.
        adapter: Arguments of the network's function, without encoder and classes.
        shared: Whether each channel goes through the encoder by itself; see adapters/channels.py.
        bottleneck: Channels of bottlenecks in the encoder, 0 for none; see adapters/bottleneck.py.
        labels: Class value -> name, background included.
        channels: Names of the input channels, in order.
        spacing_mm: Along R, A, S; None keeps each volume's own.
        intensity: A mode of `data.intensity.normalise`.
        crop_vox: Side of the window that slides over a volume.
        overlap: Share of a window that the next one covers again.
        one_piece: Whether every class is one connected part, of which only the largest counts.
        orientation: Axes of the network's input.
        training: Configuration, data set and weights it comes from; for the reader.
        versions: Of the libraries it was trained with.
    """

    network: str
    encoder: Mapping[str, Any]
    adapter: Mapping[str, Any]
    labels: Mapping[int, str]
    channels: tuple[str, ...]
    spacing_mm: tuple[float, float, float] | None
    intensity: str
    crop_vox: int
    overlap: float = 0.5
    shared: bool = False
    bottleneck: int = 0
    one_piece: bool = False
    orientation: str = "RAS"
    training: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """What a user has to know, as lines of `field: value`."""
        spacing = self.spacing_mm
        data = self.training.get("dataset", {})
        rows = {
            "network": f"fine-tuned {self.network}",
            "encoder": _listed(self.encoder) or "none",
            "adapter": _listed(self.adapter) or "as by default",
            "shared": self.shared,
            "bottleneck": self.bottleneck or "none",
            "labels": _listed(self.labels),
            "channels": ", ".join(self.channels),
            "spacing_mm": " x ".join(map(str, spacing)) if spacing else "each volume's own",
            "intensity": self.intensity,
            "orientation": self.orientation,
            "crop_vox": self.crop_vox,
            "overlap": self.overlap,
            "one_piece": self.one_piece,
            "dataset": data.get("name", "not known"),
            "versions": _listed(self.versions) or "not known",
        }
        return "\n".join(f"{key}: {value}" for key, value in rows.items())

    @property
    def preparation(self) -> Preparation:
        """How a volume becomes the network's input."""
        return Preparation(self.spacing_mm, self.intensity, self.crop_vox)

    def to_json(self) -> str:
        """The card as it stands in the file."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Card:
        """The card of a file; what an older file does not say has its default.

        Raises:
            ValueError: If it is of another format, says more than this version knows, or lacks
                what a network cannot be built without.
        """
        values = json.loads(text)
        found = values.pop("format", None)
        if found != FORMAT:
            raise ValueError(
                f"model of format {found}, this version reads {FORMAT}; upgrade sammed3d-backbone"
            )
        known = dataclasses.fields(cls)
        newer = sorted(set(values) - {entry.name for entry in known})
        if newer:
            raise ValueError(
                f"the model's card says {newer}, which this version does not know; "
                "upgrade sammed3d-backbone"
            )
        needed = {e.name for e in known if MISSING is e.default is e.default_factory}
        if not needed <= set(values):
            raise ValueError(
                f"the model's card lacks {sorted(needed - set(values))}; copy the file again, or "
                "train the model again"
            )
        values["labels"] = {int(value): name for value, name in values["labels"].items()}
        values["channels"] = tuple(values["channels"])
        if values["spacing_mm"] is not None:
            values["spacing_mm"] = tuple(values["spacing_mm"])
        return cls(**values)


@dataclass
class Segmenter:
    """A fine-tuned network with its card."""

    model: nn.Module
    card: Card

    def logits(self, image: Tensor) -> Tensor:
        """Class logits of a prepared image, by windows blended with Gaussian weights.

        Shapes:
            image: (C, X, Y, Z), no side smaller than the window.
            returns: (K, X, Y, Z) float32.
        """
        from monai.inferers import sliding_window_inference

        self.model.eval()
        side = self.card.crop_vox
        with torch.inference_mode():
            logits = sliding_window_inference(
                image[None],
                (side, side, side),
                sw_batch_size=2,
                predictor=self.model,
                overlap=self.card.overlap,
                mode="gaussian",
            )
        assert isinstance(logits, Tensor)  # as the network returns one
        return logits[0].float()


def segment_volume(segmenter: Segmenter, volume: Volume, *, nearest: bool = False) -> Volume:
    """Labels of a volume, on its own grid and with its own affine, bit for bit.

    Args:
        segmenter: From `load_model`.
        volume: With the channels of the card.
        nearest: Bring back labels instead of probabilities.

    Raises:
        ValueError: If the number of channels is not the network's.
    """
    card = segmenter.card
    if volume.channels != len(card.channels):
        raise ValueError(
            f"the volume has {volume.channels} channels, the model needs {len(card.channels)}: "
            f"{', '.join(card.channels)}; stack them in this order as a 4-D NIfTI"
        )
    image, geometry = card.preparation.image(volume)
    device = next(segmenter.model.parameters()).device
    probs = segmenter.logits(image.to(device)).softmax(0).cpu()
    labels = geometry.invert_labels(probs, nearest=nearest).numpy()
    if card.one_piece:
        labels = _largest_parts(labels)
    return Volume(labels, volume.affine, volume.header)


def build_network(card: Card, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The card's network with random weights.

    "basicunet" is no network of this package: it is the convolutional baseline to beat.

    Args:
        card: What to build.
        tensors: State dict that it will load; None for a start without one. An encoder that was
            set to another input size keeps the relative tables that it was built with, so their
            size is the tensors' and not the card's.

    Raises:
        ValueError: If the card names no known network.
    """
    if card.network == "basicunet":
        from monai.networks.nets import BasicUNet

        return BasicUNet(3, len(card.channels), len(card.labels), **card.adapter)
    known = adapters()
    if card.network not in known:
        raise ValueError(
            f"unknown network {card.network!r}; this version knows {', '.join(known)}, basicunet"
        )
    backbone = equipped(_build_encoder(card, part_of(tensors or {}, MODEL_ENCODER)), card)
    return known[card.network](backbone, len(card.labels), **card.adapter)


def equipped(backbone: ImageEncoder3D, card: Card) -> Encoder:
    """The encoder with all that the card puts into and around it."""
    from sammed3d_backbone.adapters.bottleneck import add_bottlenecks
    from sammed3d_backbone.adapters.channels import SharedEncoder

    if card.bottleneck:
        add_bottlenecks(backbone, width=card.bottleneck)
    return SharedEncoder(backbone, len(card.channels)) if card.shared else backbone


def adapters() -> dict[str, Callable[..., nn.Module]]:
    """The networks around an encoder, by the names that cards give them.

    Each is a function of an encoder, the number of classes and `Card.adapter`.
    """
    from sammed3d_backbone.adapters.flexible_unet import flexible_unet
    from sammed3d_backbone.adapters.heads import expanding_head, linear_head
    from sammed3d_backbone.adapters.segresnet import segresnet
    from sammed3d_backbone.adapters.unetr import unetr

    return {
        "unetr": unetr,
        "flexible_unet": flexible_unet,
        "segresnet": segresnet,
        "linear_head": linear_head,
        "expanding_head": expanding_head,
    }


def save_model(path: Path, segmenter: Segmenter) -> None:
    """Writes network and card as one safetensors file, complete or not at all.

    What LoRA has learned is added to the weights that it belongs to.
    """
    tensors = merged(segmenter.model).state_dict()
    write(path, tensors, {CARD_KEY: segmenter.card.to_json()}, overwrite=True)


def load_model(path: str | Path) -> Segmenter:
    """The network of a file that `save_model` wrote, ready for `segment_volume`.

    Args:
        path: A file, or `repo_id:file` or `repo_id@revision:file` on the Hub.

    Raises:
        FileNotFoundError: If there is no such file.
        PermissionError: If the Hub wants a token, or acceptance of its terms.
        ConnectionError: If a download broke.
        ValueError: If the file is no such model, or its tensors do not fit its card.
    """
    _, file = locate(path)
    tensors, metadata = read(file)
    if CARD_KEY not in metadata:
        raise ValueError(
            f"{path} holds tensors without a card, so what they segment is unknown; pass a model "
            "that recipes/finetune_unetr.py wrote: best.safetensors or last.safetensors of a run"
        )
    card = Card.from_json(metadata[CARD_KEY])
    model = build_network(card, tensors)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own card: {error}; copy it again") from None
    return Segmenter(model.eval(), card)


def without_folder(text: str) -> str:
    """The last part of an absolute path, any other text as it is: cards travel, folders do not.

    A path may stand behind the prefix that asks for inflation, which is kept.
    """
    prefix, _, place = text.partition(":")
    if prefix in DEPTH_FILTERS:
        return f"{prefix}:{without_folder(place)}"
    return Path(text).name if Path(text).is_absolute() else text


def take_over(
    model: nn.Module, card: Card, source: str, val: Collection[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Copies all values of a fine-tuned model.

    Returns:
        What is then to be said about the start, and the cases that the values were trained on.

    Raises:
        ValueError: If it segments other classes, has other sizes, or has seen cases of `val`.
    """
    earlier = load_model(source)
    if dict(earlier.card.labels) != dict(card.labels):
        raise ValueError(
            f"init={source} knows {earlier.card.labels}, the data have {card.labels}; pass it as "
            "weights= to take its encoder only"
        )
    cases = tuple(earlier.card.training.get("cases", ()))
    if seen := {*cases} & {*val}:
        raise ValueError(
            f"init={source} was trained on {len(seen)} of the cases to validate on, "
            f"{min(seen)} for one; take the fold that it was trained on"
        )
    try:
        model.load_state_dict(earlier.model.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"init={source} has other sizes ({str(error).splitlines()[1].strip()}); give the "
            "variant=, img_size= and feature_size= that it was trained with"
        ) from None
    before = earlier.card.training.get("start", {})
    name = without_folder(source)
    return {
        "weights": f"all values of the fine-tuned {name}",
        "contamination": before.get("contamination", f"not known: {name} does not say"),
    }, cases


def library_versions() -> dict[str, str]:
    """What a result depends on beside its configuration."""
    names = ("sammed3d-backbone", "torch", "monai", "timm", "accelerate", "nibabel", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"  # this package, imported from a checkout
    return found


def _largest_parts(labels: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """The labels with every class reduced to its largest part; voxels that share a corner touch.

    Shapes:
        labels: (X, Y, Z), 0 is background.
        returns: (X, Y, Z) of the same type.
    """
    from sammed3d_backbone.curation.rules import labelled_parts

    kept = np.zeros_like(labels)
    for value in np.unique(labels[labels > 0]):
        parts, sizes = labelled_parts(labels == value)
        kept[parts == 1 + sizes.argmax()] = value
    return kept


def _listed(values: Mapping[Any, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _build_encoder(card: Card, stored: Mapping[str, Tensor]) -> ImageEncoder3D:
    """The card's encoder with random weights, for the tensors that it will load, if any."""
    network = encoder(**card.encoder, weights="none")
    if card.shared:
        stored = part_of(stored, MODEL_ENCODER)
    if stored:
        told = ("img_size", "patch_size")  # by the tensors, or set below
        kept = {name: value for name, value in card.encoder.items() if name not in told}
        img_size = network.img_size
        network = encoder_like(stored, **kept)
        network.set_input_size(img_size)
    return network
