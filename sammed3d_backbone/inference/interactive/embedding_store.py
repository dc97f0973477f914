"""Encoded windows in a folder, so that a volume opened again needs no encoder at all.

A window's file is named by the hash of the weights and of the very numbers that the encoder would
see: another volume, spacing, modality or checkpoint is another file, and nothing has to be
invalidated. A file that is damaged is made anew; a folder that cannot be written is only read.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from torch import Tensor

from sammed3d_backbone.loading.checkpoint import CheckpointError, content_sha256, read, write

logger = logging.getLogger(__name__)

NAME = "embedding"


class Store:
    """A folder of encoded windows.

    Args:
        folder: Is made if it does not exist.
        weights_sha256: Of the network.

    Raises:
        NotADirectoryError: If the folder is a file.
    """

    def __init__(self, folder: str | Path, weights_sha256: str) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; give a folder for encoded windows")
        self.weights_sha256 = weights_sha256

    def load(self, image: Tensor) -> Tensor | None:
        """The encoder's map of an image, (1, F, g, g, g); None if it is not there."""
        path = self._path(image)
        if not path.is_file():
            return None
        try:
            tensors, metadata = read(path)
        except (CheckpointError, OSError) as error:
            logger.warning("%s; it is encoded again", error)
            return None
        if content_sha256(tensors) != metadata.get("content_sha256"):
            logger.warning("%s was altered since it was written; it is encoded again", path)
            return None
        return tensors[NAME]

    def save(self, image: Tensor, embedding: Tensor) -> None:
        """Keeps the encoder's map of an image."""
        path = self._path(image)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(path, {NAME: embedding}, {"weights_sha256": self.weights_sha256}, overwrite=True)
        except OSError as error:
            logger.warning("encoded windows are not kept: %s", error)

    def _path(self, image: Tensor) -> Path:
        digest = hashlib.sha256(self.weights_sha256.encode())
        digest.update(image.contiguous().numpy().data)
        return self.folder / f"{digest.hexdigest()}.safetensors"
