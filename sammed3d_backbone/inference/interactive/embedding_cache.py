"""A promptable network with a cache of encoded windows, in memory and optionally on disk.

The encoder never sees the prompts, so one pass per window serves every click and object. On disk a
window's file is named by the hash of the weights and of the encoder's input: another volume,
spacing, modality or checkpoint is another file, and nothing has to be invalidated.
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

logger = logging.getLogger(__name__)

CELLS_PER_TOKEN = 4  # along each axis; the decoder doubles its grid twice
EMBEDDING = "embedding"  # name of the tensor in a file
WindowClick = tuple[Triple, bool]  # voxel of a window, and whether the click is positive


class PromptableNetwork(Protocol):
    """What the predictor needs of a `torch.nn.Module`; `Sam3D` has it.

    Shapes:
        image_encoder: (1, 1, S, S, S) -> (1, F, g, g, g); its `img_size` is (S, S, S).
    """

    image_encoder: Any

    def predict_masks(
        self, embedding: Tensor, points: tuple[Tensor, Tensor] | None, mask_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mask logits and predicted Dice.

        Without points the pass uses the mask alone, without a mask a mask of zeros.

        Shapes:
            embedding: (1, F, g, g, g), the image encoder's output.
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
    """

    def __init__(
        self,
        model: PromptableNetwork,
        *,
        max_bytes: int,
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        self.model = model
        self._module = cast("nn.Module", model).eval()
        self.device = next((p.device for p in self._module.parameters()), torch.device("cpu"))
        self.max_bytes = max_bytes
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; give a folder")
        self._embeddings: OrderedDict[Triple, Tensor] = OrderedDict()
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
        self._embeddings.clear()

    def decode(
        self, windows: Windows, start: Triple, clicks: Sequence[WindowClick], prior: Tensor | None
    ) -> tuple[Tensor, float]:
        """One pass of prompt encoder and mask decoder: mask logits and predicted Dice.

        Args:
            windows: Windows of the volume.
            start: The window.
            clicks: Without any, the pass uses the prior alone.
            prior: Logits of the previous pass; None for the first.

        Shapes:
            prior: (s, s, s).
            returns: (s, s, s), on the CPU.
        """
        embedding = self.embedding(windows, start)
        points = None
        if clicks:
            index = torch.tensor([[index for index, _ in clicks]], dtype=torch.float32)
            labels = torch.tensor([[int(positive) for _, positive in clicks]])
            points = (index.to(self.device), labels.to(self.device))
        mask_logits = None if prior is None else prior[None, None].to(embedding)
        with torch.inference_mode():
            logits, predicted_dice = self.model.predict_masks(embedding, points, mask_logits)
        return logits[0, 0].float().cpu(), float(predicted_dice)

    def embedding(self, windows: Windows, start: Triple) -> Tensor:
        """The encoder's output in a window, (1, F, g, g, g), from the cache where possible."""
        if start not in self._embeddings:
            self._embeddings[start] = self._encode(windows.image(start))
        self._embeddings.move_to_end(start)
        embedding = self._embeddings[start]
        while len(self._embeddings) > 1 and self._bytes() > self.max_bytes:
            self._embeddings.popitem(last=False)
        return embedding

    def _encode(self, image: Tensor) -> Tensor:
        path = None if self.folder is None else self._path(self.folder, image)
        if path is not None and (stored := _read_embedding(path)) is not None:
            return stored.to(self.device)
        with torch.inference_mode():
            embedding: Tensor = self.model.image_encoder(image.to(self.device))
        self._bar.update()
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                metadata = {"weights_sha256": self.weights_sha256}
                write(path, {EMBEDDING: embedding}, metadata, overwrite=True)
            except OSError as error:
                logger.warning("encoded windows are not kept: %s", error)
        return embedding

    def _path(self, folder: Path, image: Tensor) -> Path:
        digest = hashlib.sha256(self.weights_sha256.encode())
        digest.update(image.contiguous().numpy().data)
        return folder / f"{digest.hexdigest()}.safetensors"

    def _bytes(self) -> int:
        return sum(embedding.nbytes for embedding in self._embeddings.values())


def _read_embedding(path: Path) -> Tensor | None:
    """The encoder's output in a file; None if the file does not exist or is damaged."""
    if not path.is_file():
        return None
    try:
        tensors, metadata = read(path)
    except (CheckpointError, OSError) as error:
        logger.warning("%s; the window is encoded again", error)
        return None
    if content_sha256(tensors) != metadata.get("content_sha256"):
        logger.warning("%s was altered since it was written; the window is encoded again", path)
        return None
    return tensors[EMBEDDING]
