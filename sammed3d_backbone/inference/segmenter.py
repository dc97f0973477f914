"""A fine-tuned network with its card: loaded, applied to volumes, saved and shared.

`Segmenter.from_pretrained` needs nothing but a file, a folder or a repository on the Hub;
`Segmenter.predict` takes a `Volume` and returns its labels.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sammed3d_backbone.adapters.contract import Encoder
from sammed3d_backbone.adapters.lora import merge_lora
from sammed3d_backbone.adapters.registry import adapter
from sammed3d_backbone.data.preprocessing import Modality
from sammed3d_backbone.data.regions import keep_largest_component
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import locked, read_text, reading, write_text
from sammed3d_backbone.inference.averages import Ensemble, mirrored
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.folder import predict_scans, scans_in
from sammed3d_backbone.inference.hub import model_card, upload
from sammed3d_backbone.inference.sliding import joined, sliding_planes
from sammed3d_backbone.loading.checkpoint import read, write
from sammed3d_backbone.loading.factory import encoder
from sammed3d_backbone.loading.fitting import part_of, require_finite, require_float
from sammed3d_backbone.loading.hub import WEIGHTS_FILE, WEIGHTS_SUFFIXES, locate, sha256_of
from sammed3d_backbone.loading.opening import CARD_KEY, MODEL_ENCODER
from sammed3d_backbone.loading.stored_sizes import encoder_like
from sammed3d_backbone.models.image_encoder import ImageEncoder3D

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
FOLDS = "fold_*.safetensors"  # the models of an ensemble, in one folder
SLAB = 16  # voxels along the first axis that are turned into probabilities at once
_REPOSITORY = re.compile(r"(hf-hub:)?[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass
class Segmenter:
    """A fine-tuned network with its card.

    Args:
        model: Maps (B, C, X, Y, Z) to class logits (B, K, X, Y, Z).
        card: Describes the model and its input.
        files: The safetensors files that it was loaded from.
        precision: The number format of the network. "bf16" is faster where the hardware computes in
            it, and changes single voxels; sums of windows and probabilities stay in float32.

    Example:
        >>> segmenter = Segmenter.from_pretrained("runs/hippocampus")  # doctest: +SKIP
        >>> segmenter.predict(Volume.load("scan.nii.gz")).save("labels.nii.gz")  # doctest: +SKIP
    """

    model: nn.Module
    card: Card
    files: tuple[Path, ...] = ()
    precision: Literal["float32", "bf16"] = "float32"

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        weights_file: str = WEIGHTS_FILE,
    ) -> Segmenter:
        """Loads a fine-tuned model, or several whose logits are averaged, in evaluation mode.

        Args:
            source: A safetensors file, a folder that `save_pretrained` wrote, or a repository on
                the Hub: `OWNER/NAME`, `OWNER/NAME@REVISION`, with or without `hf-hub:` before it. A
                folder of ``fold_0.safetensors``, ``fold_1.safetensors``, ... and a list are an
                ensemble.
            weights_file: Name of the safetensors file in the folder or repository.

        Raises:
            FileNotFoundError: If there is no such file.
            PermissionError: If the Hub asks for a token or for acceptance of terms.
            ConnectionError: If a download failed.
            ValueError: If the file is not a fine-tuned model, its tensors do not fit its card or
                its content_sha256, or are not finite floating-point numbers, or the models of an
                ensemble differ in labels, channels or preprocessing.
        """
        named = [source] if isinstance(source, str | os.PathLike) else [*source]
        sources = [member for each in named for member in _members(each)]
        members = [cls._load(each, weights_file) for each in sources]
        if not members:
            raise ValueError("an empty list of models; give at least one")
        first = members[0]
        for each, member in zip(sources, members, strict=True):
            for key in ("labels", "channels", "preprocessing"):
                if getattr(member.card, key) != getattr(first.card, key):
                    raise ValueError(
                        f"{each} has other {key} than {sources[0]}; give models of one data set "
                        "and one configuration"
                    )
        if len(members) == 1:
            return first
        files = tuple(file for member in members for file in member.files)
        return replace(first, model=Ensemble(member.model for member in members), files=files)

    @classmethod
    def _load(cls, source: str | os.PathLike[str], weights_file: str) -> Segmenter:
        """One model of `from_pretrained`."""
        path, config = _files(source, weights_file)
        tensors, metadata = read(path)
        if CARD_KEY not in metadata and config is None:
            raise ValueError(
                f"{source} has tensors but no card, so the meaning of its outputs is unknown; give "
                "best.safetensors or last.safetensors of a fine-tuning run"
            )
        with reading(path):
            card = Card.from_json(metadata[CARD_KEY] if config is None else config)
            try:
                with torch.device("meta"):  # no values: a card may ask for any amount of memory
                    outline = build_network(card, tensors)
            except RuntimeError as error:  # torch's, of a size below 0
                raise ValueError(f"the card is of no network: {error}") from None
            if config is not None and CARD_KEY in metadata:
                _say_differences(path, card, Card.from_json(metadata[CARD_KEY]))
        for name, own in outline.state_dict().items():
            if own.is_floating_point() and name in tensors:
                require_float(name, tensors[name], str(source))
        require_finite(tensors, str(source))
        try:
            outline.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"{source} does not fit its own card: {error}; copy it again"
            ) from None
        model = build_network(card, tensors)
        model.load_state_dict(tensors)
        return cls(model.eval(), card, (path,))

    @property
    def flip_axes(self) -> tuple[int, ...]:
        """The axes along which the training mirrored, 0 left-right, 1 back-front, 2 feet-head."""
        axes = tuple(self.card.training.get("config", {}).get("flip_axes", ()))
        if not {*axes} <= {0, 1, 2}:
            raise ValueError(f"the card's flip_axes {axes} are not among 0, 1, 2; copy it again")
        return axes

    def save(self, path: Path) -> None:
        """Writes one safetensors file with the card in its metadata; replaces an existing file.

        LoRA updates are merged into the weights that they belong to.

        Raises:
            ValueError: If the model is an ensemble.
        """
        if isinstance(self.model, Ensemble):
            raise ValueError("an ensemble is the folder of its files; save each model by itself")
        tensors = merge_lora(self.model).state_dict()
        write(path, tensors, {CARD_KEY: json.dumps(self.card.to_dict())}, overwrite=True)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `model.safetensors` and `config.json` into a folder; creates it if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / WEIGHTS_FILE)
        write_text(folder / CONFIG_FILE, json.dumps(self.card.to_dict(), indent=2) + "\n")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        message: str | None = None,
        licence: str | None = None,
        scores: Mapping[str, Any] | None = None,
    ) -> str:
        """Uploads model, card and README to the Hub in one commit.

        Args:
            repo_id: `OWNER/NAME`; created if it does not exist.
            private: Whether a new repository is private.
            message: Commit message.
            licence: Licence identifier of the Hub, for example "cc-by-sa-4.0".
            scores: Content of the run's ``scores.json``, for the README.

        Returns:
            The address of the commit.

        Raises:
            ValueError: If the repository's name is not valid.
            PermissionError: If the Hub asks for a token, or for one with write access.
            ConnectionError: If the upload failed.
        """
        readme = model_card(self.card, repo_id, scores=scores, licence=licence)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            readme.save(Path(folder) / "README.md")
            return upload(Path(folder), repo_id, private=private, message=message)

    def predict(
        self,
        volume: Volume,
        *,
        modality: Modality | None = None,
        nearest: bool = False,
        mirror: bool = False,
    ) -> Volume:
        """The labels of a volume, on its grid and with exactly its affine.

        Args:
            volume: Has the channels of the card.
            modality: Chooses the intensity mode where the card has several; None is its default.
            nearest: Resample labels instead of probabilities to the volume's grid.
            mirror: Average with mirror images along the axes that the training mirrored.

        Raises:
            ValueError: If the volume has another number of channels or non-finite voxels.
        """
        return self.labels_and_probabilities(
            volume, modality=modality, nearest=nearest, mirror=mirror
        )[0]

    def predict_folder(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str],
        *,
        modality: Modality | None = None,
        nearest: bool = False,
        mirror: bool = False,
        probabilities: bool = False,
        overwrite: bool = False,
        progress: bool = True,
        jobs: int = 1,
        backend: str | None = None,
    ) -> list[dict[str, Any]]:
        """Writes ``ID.nii.gz`` for every scan of a folder, and ``manifest.json``.

        An interrupted run is resumed. A scan that fails becomes an entry with an error; the others
        are done all the same.

        Args:
            source: Folder of NIfTI files, with channels along the fourth axis or as ``ID_0000``,
                ``ID_0001``, ..., and of folders of DICOM series.
            target: Folder of the results; made if needed.
            modality: See `predict`.
            nearest: See `predict`.
            mirror: See `predict`.
            probabilities: Also write ``ID.npz`` with the array ``probabilities``, (K, X, Y, Z)
                float16 on the scan's grid.
            overwrite: Whether to replace results of another model or of other settings.
            progress: Whether to show a progress bar.
            jobs: Number of processes that predict, each with the network in its memory.
            backend: Where they run, such as ``dask://HOST:PORT``; see `parallel.workers`.

        Returns:
            The entries of the manifest, a dictionary per scan; ``error`` is None where it worked.

        Raises:
            ValueError: If there is no scan, the results would lie among the scans, or a network
                without files is to be sent to workers.
            FileExistsError: If there are other results, or another process writes there.
        """
        source, target = Path(source), Path(target)
        if target.resolve().is_relative_to(source.resolve()):
            raise ValueError(
                f"{target} lies in {source}, whose scans stay as they are; choose another"
            )
        settings: dict[str, Any] = {"modality": modality, "nearest": nearest, "mirror": mirror}
        about = {
            "model": [{"file": p.name, "sha256": sha256_of(p)} for p in self.files],
            "settings": {
                **settings,
                "probabilities": probabilities,
                "precision": self.precision,
            },
        }
        predict = partial(_predicted, ByFiles(self), wanted=probabilities, **settings)
        scans = scans_in(source)
        with locked(target):
            return predict_scans(
                predict,
                scans,
                target,
                about,
                overwrite=overwrite,
                progress=progress,
                jobs=jobs,
                backend=backend,
            )

    def labels_and_probabilities(
        self,
        volume: Volume,
        *,
        modality: Modality | None = None,
        nearest: bool = False,
        mirror: bool = False,
        wanted: bool = False,
    ) -> tuple[Volume, Tensor | None]:
        """What `predict` returns, and class probabilities on the same grid if they are wanted.

        Shapes:
            returns: labels (X, Y, Z), probabilities (K, X, Y, Z) float32.
        """
        card = self.card
        if volume.channels != len(card.channels):
            raise ValueError(
                f"the volume has {volume.channels} channels, the model needs {len(card.channels)}: "
                f"{', '.join(card.channels)}; stack them in this order as a 4-D NIfTI"
            )
        image, geometry = card.preprocessing.image(volume, modality)
        device = next(self.model.parameters()).device
        parts = self._probabilities(image.to(device), modality, mirror=mirror)
        given = None
        if wanted:
            whole = joined(parts, image.shape[1:])
            given, parts = geometry.invert(whole), iter([whole])
        labels = geometry.invert_labels(parts, nearest=nearest).numpy()
        if card.keep_largest_component:
            labels = keep_largest_component(labels)
        return Volume(labels, volume.affine, volume.header), given

    @torch.inference_mode()
    def _probabilities(
        self, image: Tensor, modality: Modality | None, *, mirror: bool
    ) -> Iterator[Tensor]:
        """Class probabilities on the CPU, in the parts of `sliding_planes`."""
        for logits in self._parts(image, modality, mirror=mirror):
            probs = logits.float().cpu()
            for slab in probs.split(SLAB, dim=1):  # in place, as a second one may not fit
                slab.copy_(slab.softmax(0))
            yield probs

    def logits(
        self, image: Tensor, modality: Modality | None = None, *, mirror: bool = False
    ) -> Tensor:
        """Class logits of a preprocessed image, from overlapping windows with Gaussian weights.

        Args:
            image: An image that `Preprocessing.image` returned.
            modality: See `predict`.
            mirror: See `predict`.

        Shapes:
            image: (C, X, Y, Z), no side smaller than the window.
            returns: (K, X, Y, Z) float32.
        """
        return joined(self._parts(image, modality, mirror=mirror), image.shape[1:]).float()

    def _parts(self, image: Tensor, modality: Modality | None, *, mirror: bool) -> Iterator[Tensor]:
        """What `logits` returns, in the parts of `sliding_planes`."""
        if self.precision not in ("float32", "bf16"):
            raise ValueError(f"precision={self.precision!r}: expected 'float32' or 'bf16'")
        self.model.eval()
        used = self.card.preprocessing
        network = mirrored(self.model, self.flip_axes if mirror else ())

        def logits(crops: Tensor) -> Tensor:
            crops = used.crops(crops, modality)
            half = self.precision == "bf16"  # whatever autocast the caller is in
            with torch.autocast(crops.device.type, torch.bfloat16, enabled=half):
                return network(crops).float()

        return sliding_planes(logits, image, used.crop_vox, self.card.overlap)


@dataclass(frozen=True)
class ByFiles:
    """A segmenter that another process opens from its files, once, when this is sent there."""

    segmenter: Segmenter

    def __reduce__(self) -> tuple[Callable[..., ByFiles], tuple[Any, ...]]:
        one = self.segmenter
        if not one.files:
            raise ValueError("a network without files cannot be sent to workers; save and load it")
        device = str(next(one.model.parameters()).device)
        files = tuple(path.resolve() for path in one.files)
        return _by_files, (files, device, {"card": one.card, "precision": one.precision})


def _by_files(files: tuple[Path, ...], device: str, changes: Mapping[str, Any]) -> ByFiles:
    return ByFiles(replace(_opened(files, device), **changes))


@lru_cache(maxsize=1)
def _opened(files: tuple[Path, ...], device: str) -> Segmenter:
    segmenter = Segmenter.from_pretrained(files)
    segmenter.model.to(device)
    return segmenter


def _predicted(sent: ByFiles, volume: Volume, **options: Any) -> tuple[Volume, Tensor | None]:  # noqa: ANN401
    """`Segmenter.labels_and_probabilities`, wherever the segmenter is."""
    return sent.segmenter.labels_and_probabilities(volume, **options)


def build_network(card: Card, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The card's network with random initialisation.

    "basicunet" is MONAI's convolutional network, the baseline without our encoder.

    Args:
        card: Describes the network.
        tensors: State dict that will be loaded into it; None if there is none. The relative
            position tables of an encoder keep the size they were built with when the input size
            changes, so their size is taken from the tensors and not from the card.

    Raises:
        ValueError: If the card names an unknown network.
    """
    if card.network == "basicunet":
        from monai.networks.nets import BasicUNet

        return BasicUNet(3, len(card.channels), len(card.labels), **card.adapter)
    build = adapter(card.network)
    backbone = wrap_encoder(_build_encoder(card, part_of(tensors or {}, MODEL_ENCODER)), card)
    return build(backbone, len(card.labels), **card.adapter)


def wrap_encoder(backbone: ImageEncoder3D, card: Card) -> Encoder:
    """The encoder with the card's bottleneck adapters and per-channel sharing."""
    from sammed3d_backbone.adapters.bottleneck import add_bottlenecks
    from sammed3d_backbone.adapters.channels import SharedEncoder

    if card.bottleneck:
        add_bottlenecks(backbone, width=card.bottleneck)
    return SharedEncoder(backbone, len(card.channels)) if card.shared else backbone


def _members(source: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    """The files of an ensemble's folder, else the source itself."""
    path = Path(source).expanduser()
    folds = sorted(path.glob(FOLDS)) if path.is_dir() else []
    return [*folds] if folds else [source]


def _files(source: str | os.PathLike[str], weights_file: str) -> tuple[Path, str | None]:
    """The local safetensors file of a model, and the text of the `config.json` beside it."""
    text, path = os.fspath(source), Path(source).expanduser()
    if path.is_dir():
        config = path / CONFIG_FILE
        card = read_text(config) if config.exists() else None
        return locate(path, weights_file)[1], card
    if path.exists() or path.suffix in WEIGHTS_SUFFIXES or not _REPOSITORY.fullmatch(text):
        return locate(source)[1], None
    repository = f"hf-hub:{text.removeprefix('hf-hub:')}"
    tensors = locate(repository, weights_file)[1]
    try:
        return tensors, read_text(locate(repository, CONFIG_FILE)[1])
    except FileNotFoundError:  # a repository with one file, whose metadata is the card
        return tensors, None


def _say_differences(path: Path, card: Card, own: Card) -> None:
    """Says in which fields a changed `config.json` wins over the card that the tensors carry."""
    one, other = card.to_dict(), own.to_dict()
    if changed := [key for key in one if one[key] != other[key]]:
        logger.warning("%s: %s of config.json, not of the file", path, ", ".join(changed))


def _build_encoder(card: Card, stored: Mapping[str, Tensor]) -> ImageEncoder3D:
    """The card's encoder with random initialisation, in the sizes of the tensors to be loaded."""
    network = encoder(**card.encoder, pretrained=False)
    if card.shared:
        stored = part_of(stored, MODEL_ENCODER)
    if stored:
        by_tensors = ("img_size", "patch_size")  # taken from the tensors, or set below
        kept = {name: value for name, value in card.encoder.items() if name not in by_tensors}
        img_size = network.img_size
        network = encoder_like(stored, **{**kept, "rel_pos": network.rel_pos})
        network.set_input_size(img_size)
    return network
