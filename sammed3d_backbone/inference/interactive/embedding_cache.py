"""A promptable network with a cache of encoded windows, in memory and optionally on disk.

The encoder never sees the prompts, so one pass per window serves every click and object. On disk a
window's file is named by the hash of the weights and of the encoder's input: another volume,
spacing, modality or checkpoint is another file, and nothing has to be invalidated. It holds all
tensors of an `Encoding`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.inference.interactive.windows import Windows
from sammed3d_backbone.loading.checkpoint import CheckpointError, content_sha256, read, write
from sammed3d_backbone.loading.fitting import require_finite_output
from sammed3d_backbone.models.sam import Encoding

logger = logging.getLogger(__name__)

CELLS_PER_TOKEN = 4  # along each axis; the decoder doubles its grid twice
CACHE_FORMAT = 2  # version of the files; part of the hash in their names
EMBEDDING, MAP = "embedding", "map"  # names of the tensors in a file; maps are numbered
WindowClick = tuple[Triple, bool]  # voxel of a window, and whether the click is positive


class PromptableNetwork(Protocol):
    """The interface of networks for the predictor; `Sam3D` has it.

    Shapes:
        image_encoder: (1, 1, S, S, S) -> (1, F, g, g, g); its `img_size` is (S, S, S).
    """

    image_encoder: Any

    def encode(self, x: Tensor) -> Encoding:
        """Encodes a window, (1, 1, S, S, S)."""

    def predict_masks(
        self, encoding: Encoding, points: tuple[Tensor, Tensor] | None, mask_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mask logits and predicted Dice.

        Without points the pass uses the mask alone, without a mask a mask of zeros.

        Shapes:
            encoding: of the window; its embedding is (1, F, g, g, g).
            points: voxel indices (1, N, 3) of the window and labels (1, N), 1 inside, 0 outside.
            mask_logits: (1, 1, s, s, s) of an earlier pass; s = 4 * g.
            returns: (1, 1, s, s, s) and (1, 1).
        """


class EmbeddingCache:
    """A promptable network with a cache of encoded windows of one volume.

    Args:
        model: Is set to evaluation mode.
        max_bytes: Bound on the encoded windows in memory; the least recently used are dropped.
        folder: Keeps encoded windows for other sessions; None keeps them in memory only.
        progress: Show a bar of encoded windows on standard error.

    Raises:
        NotADirectoryError: If the folder is a file.
        TypeError: If the model is not a promptable network.
        ValueError: If its parameters are not float32, or have no values.
    """

    def __init__(
        self,
        model: PromptableNetwork,
        *,
        max_bytes: int,
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        _require_promptable(model)
        self.model = model
        self._module = cast("nn.Module", model).eval()
        self.device = next((p.device for p in self._module.parameters()), torch.device("cpu"))
        self.max_bytes = max_bytes
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; give a folder")
        self.passes = 0  # of the encoder
        self._encodings: OrderedDict[Triple, Encoding] = OrderedDict()
        # Shown with the first window, and on a terminal only.
        self._bar = tqdm(
            desc="encoding", unit=" window", disable=None if progress else True, delay=1e-9
        )

    @cached_property
    def weights_sha256(self) -> str:
        """A hash of all values of the network."""
        return content_sha256(self._module.state_dict())

    def clear(self) -> None:
        """Drops all encoded windows in memory, for another volume."""
        self._encodings.clear()

    def decode(
        self, windows: Windows, start: Triple, clicks: Sequence[WindowClick], prior: Tensor | None
    ) -> Tensor:
        """One pass of prompt encoder and mask decoder: mask logits.

        Args:
            windows: Windows of the volume.
            start: The window.
            clicks: Without any, the pass uses the prior alone.
            prior: Logits of the previous pass; None for the first.

        Shapes:
            prior: (s, s, s).
            returns: (s, s, s), on the CPU.
        """
        encoding = self.encoding(windows, start)
        points = None
        if clicks:
            index = torch.tensor([[index for index, _ in clicks]], dtype=torch.float32)
            labels = torch.tensor([[int(positive) for _, positive in clicks]])
            points = (index.to(self.device), labels.to(self.device))
        mask_logits = None if prior is None else prior[None, None].to(encoding.embedding)
        with torch.inference_mode(), self._float32():
            logits, _ = self.model.predict_masks(encoding, points, mask_logits)
        require_finite_output(logits)
        return logits[0, 0].float().cpu()

    def encoding(self, windows: Windows, start: Triple) -> Encoding:
        """An encoded window, from the cache where possible."""
        if start not in self._encodings:
            self._encodings[start] = self._encode(windows.image(start))
        self._encodings.move_to_end(start)
        encoding = self._encodings[start]
        while len(self._encodings) > 1 and self._bytes() > self.max_bytes:
            self._encodings.popitem(last=False)
        return encoding

    def _encode(self, image: Tensor) -> Encoding:
        path = None if self.folder is None else self._path(self.folder, image)
        if path is not None and (stored := _read_encoding(path)) is not None:
            return Encoding(
                stored.embedding.to(self.device), tuple(m.to(self.device) for m in stored.maps)
            )
        with torch.inference_mode(), self._float32():
            encoding = self.model.encode(image.to(self.device))
        self.passes += 1
        self._bar.update()
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                metadata = {"weights_sha256": self.weights_sha256}
                write(path, _tensors(encoding), metadata, overwrite=True)
            except OSError as error:
                logger.warning("encoded windows are not kept: %s", error)
        return encoding

    def _float32(self) -> torch.autocast:
        """Keeps the caller's autocast out: windows are kept, and a mask depends on prompts only."""
        return torch.autocast(self.device.type, enabled=False)

    def _path(self, folder: Path, image: Tensor) -> Path:
        digest = hashlib.sha256(f"{CACHE_FORMAT} {self.weights_sha256}".encode())
        digest.update(image.contiguous().numpy().data)
        return folder / f"{digest.hexdigest()}.safetensors"

    def _bytes(self) -> int:
        encodings = self._encodings.values()
        return sum(tensor.nbytes for one in encodings for tensor in _tensors(one).values())


def _require_promptable(model: object) -> None:
    """Refuses what cannot answer prompts, and networks in another number format."""
    wanted = ("image_encoder", "encode", "predict_masks")
    missing = [name for name in wanted if not hasattr(model, name)]
    if missing or not isinstance(model, nn.Module):
        raise TypeError(
            f"{type(model).__name__} lacks {missing or 'torch.nn.Module as a base'}; give a "
            "promptable network, as sam(...) builds it"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.dtype in (torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(
                f"the network's {name} is {parameter.dtype} on {parameter.device}; the predictor "
                "computes in float32: call .float() on a network with values"
            )


def _tensors(encoding: Encoding) -> dict[str, Tensor]:
    """The tensors of an encoding by their names in a file."""
    return {EMBEDDING: encoding.embedding} | {
        f"{MAP}_{number}": values for number, values in enumerate(encoding.maps)
    }


def _read_encoding(path: Path) -> Encoding | None:
    """The encoded window in a file; None if the file does not exist or is damaged."""
    if not path.is_file():
        return None
    try:
        tensors, metadata = read(path)
    except (CheckpointError, OSError) as error:
        logger.warning("%s; the window is encoded again", error)
        return None
    if "content_sha256" not in metadata or EMBEDDING not in tensors:
        logger.warning("%s is not an encoded window of ours; it is encoded again", path)
        return None
    maps = (tensors[f"{MAP}_{number}"] for number in range(len(tensors) - 1))
    return Encoding(tensors[EMBEDDING], tuple(maps))
