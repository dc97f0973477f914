"""The promptable network, driven as it was trained, with the encoder's work remembered.

Comes in: a window's start, points in its voxels, the logits of an earlier pass; goes out: one logit
per cell. The encoder never sees the prompts, so one pass per window serves every click and object.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.inference.interactive.embedding_store import Store
from sammed3d_backbone.inference.interactive.windows import Windows
from sammed3d_backbone.loading.checkpoint import content_sha256

CELLS_PER_TOKEN = 4  # along each axis; the decoder doubles its grid twice


class Promptable(Protocol):
    """What the predictor asks of a network; `Sam3D` has it.

    Shapes:
        image_encoder: (1, 1, S, S, S) -> (1, F, g, g, g); its `img_size` is (S, S, S).
    """

    image_encoder: Any

    def decode_and_rate(
        self, embedding: Tensor, points: tuple[Tensor, Tensor] | None, mask_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits of a pass, and the Dice that the network expects of them.

        Without points it goes by the mask alone, without a mask by zeros.

        Shapes:
            embedding: (1, F, g, g, g), the image encoder's output.
            points: voxel indices (1, N, 3) of the window and labels (1, N), 1 inside, 0 outside.
            mask_logits: (1, 1, s, s, s) of an earlier pass; s = 4 * g.
            returns: (1, 1, s, s, s) and (1, 1).
        """

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of every module of torch."""

    def state_dict(self) -> dict[str, Tensor]:
        """As of every module of torch."""

    def eval(self) -> object:
        """As of every module of torch."""


@dataclass(frozen=True)
class Point:
    """A click in the voxels of one window."""

    index: Triple
    positive: bool


class Stopwatch:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Counts the time inside the `with` block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def taken(self) -> dict[str, float]:
        """What was counted since this was last asked."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class Network:
    """A promptable network with a memory of encoded windows.

    Args:
        model: The network; it is set to evaluation.
        cache_bytes: Of encoded windows kept in memory; the longest unused go first.
        cache_folder: Where encoded windows are kept for other sessions; None for nowhere.
        progress: Show a bar of encoded windows on standard error.
    """

    def __init__(
        self,
        model: Promptable,
        *,
        cache_bytes: int,
        cache_folder: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        model.eval()
        self.model = model
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.cache_bytes = cache_bytes
        self.watch = Stopwatch()
        self._store = None if cache_folder is None else Store(cache_folder, self.weights_sha256)
        self._cache: OrderedDict[Triple, Tensor] = OrderedDict()
        # Shown with the first window, and on a terminal only.
        self._bar = tqdm(
            desc="encoding", unit=" window", disable=None if progress else True, delay=1e-9
        )

    @property
    def side_vox(self) -> int:
        """Side S of a window."""
        return int(self.model.image_encoder.img_size[0])

    @cached_property
    def weights_sha256(self) -> str:
        """A hash of all values of the network."""
        return content_sha256(self.model.state_dict())

    def forget(self) -> None:
        """Drops all encoded windows: their starts belong to one volume."""
        self._cache.clear()

    def decode(
        self, windows: Windows, start: Triple, points: Sequence[Point], prior: Tensor | None
    ) -> tuple[Tensor, float]:
        """One pass of prompt encoder and decoder: logits, and the network's opinion of them.

        Args:
            windows: Of the volume.
            start: Of the window.
            points: None at all is a pass by the prior alone.
            prior: Logits of the earlier pass; None is the first.

        Shapes:
            prior: (s, s, s).
            returns: (s, s, s), on the CPU.
        """
        embedding = self.embedding(windows, start)
        prompts = None
        if points:
            index = torch.tensor([[point.index for point in points]], dtype=torch.float32)
            labels = torch.tensor([[int(point.positive) for point in points]])
            prompts = (index.to(self.device), labels.to(self.device))
        mask_logits = None if prior is None else prior[None, None].to(embedding)
        with self.watch.of("decode"), torch.inference_mode():
            logits, rating = self.model.decode_and_rate(embedding, prompts, mask_logits)
        return logits[0, 0].float().cpu(), float(rating)

    def embedding(self, windows: Windows, start: Triple) -> Tensor:
        """The encoder's map of a window, (1, F, g, g, g), from memory where possible."""
        if start not in self._cache:
            with self.watch.of("image"):
                image = windows.image(start)
            self._cache[start] = self._encode(image)
        self._cache.move_to_end(start)
        kept = self._cache[start]
        while len(self._cache) > 1 and self._bytes() > self.cache_bytes:
            self._cache.popitem(last=False)
        return kept

    def _encode(self, image: Tensor) -> Tensor:
        if self._store is not None:
            stored = self._store.load(image)
            if stored is not None:
                return stored.to(self.device)
        with self.watch.of("encode"), torch.inference_mode():
            embedding: Tensor = self.model.image_encoder(image.to(self.device))
        self._bar.update()
        if self._store is not None:
            self._store.save(image, embedding)
        return embedding

    def _bytes(self) -> int:
        return sum(embedding.nbytes for embedding in self._cache.values())
