"""Prompts on one object -> the network's prediction in every window that the object reaches.

Each window is a crop as in training: its first pass gets a zero mask and a click on the object, and
every further click in it is one more pass on the previous logits. Where the object touches a
window's border, the neighbouring window on the lattice is opened; it shares half of its voxels, and
its first click is the deepest voxel of the object that is known there. A neighbour whose prediction
contradicts the shared half is left out, so that one wrong prediction does not spread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.data.regions import depth_mm
from sammed3d_backbone.inference.interactive.embedding_cache import (
    CELLS_PER_TOKEN,
    EmbeddingCache,
    WindowClick,
)
from sammed3d_backbone.inference.interactive.logit_field import LogitField
from sammed3d_backbone.inference.interactive.prompts import ClickPrompt, MaskPrompt, Prompt
from sammed3d_backbone.inference.interactive.windows import GridPoint, Windows

ClickMode = Literal["newest", "all"]
MASK_LOGIT = 10.0  # logit of a voxel of a binary mask prompt, positive or negative
LEAST_AGREEMENT = 0.5  # Dice that a neighbour's prediction must reach in the known half


@dataclass(frozen=True, eq=False)
class WindowPrediction:
    """The network's prediction in one window, and the clicks that led to it.

    Args:
        logits: (s, s, s), one per cell.
        clicks: Clicks of all passes so far.
        seed: First click where the window was opened by propagation; None for a user's prompt.
    """

    logits: Tensor
    clicks: tuple[WindowClick, ...]
    seed: GridPoint | None = None


@dataclass(frozen=True, eq=False)
class ObjectState:
    """The predictions about one object, by window, after some of its prompts."""

    windows: Mapping[Triple, WindowPrediction] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def confidence(self) -> float:
        """Soft Dice of the mask with its own probabilities, over the cells of all windows.

        1 where every probability is 0 or 1; 0 without any mask.
        """
        inside, total = 0.0, 0.0
        for window in self.windows.values():
            probs = window.logits.sigmoid()
            mask = probs > 0.5
            inside += float(probs[mask].sum())
            total += float(probs.sum()) + int(mask.sum())
        return 2 * inside / total if total else 0.0


@dataclass(frozen=True, eq=False)
class WindowPropagator:
    """Turns the prompts of an object into predictions in windows; arguments as in `Predictor`."""

    windows: Windows
    network: EmbeddingCache
    clicks: ClickMode
    follow: bool
    max_windows: int

    def advance(self, state: ObjectState, prompts: Sequence[Prompt]) -> ObjectState:
        """The state after all of an object's prompts, from that after all but the last."""
        new = prompts[-1]
        # A mask prompt replaces everything before it.
        masks = [n for n, prompt in enumerate(prompts) if isinstance(prompt, MaskPrompt)]
        prior = prompts[masks[-1]] if masks else None
        assert prior is None or isinstance(prior, MaskPrompt)
        clicks = [p for p in prompts[masks[-1] + 1 if masks else 0 :] if isinstance(p, ClickPrompt)]
        if isinstance(new, MaskPrompt):
            found = {new.window: self._open(new.window, [], prior)}
        else:
            found = self._after_click(state.windows, clicks, prior)
        prompted = dict.fromkeys(p.window for p in (prior, *clicks) if p and p.window is not None)
        roots = {start: found[start] for start in prompted if start in found}
        if not self.follow:
            return ObjectState(roots)
        return self._followed(roots, found, clicks, prior)

    def _after_click(
        self,
        before: Mapping[Triple, WindowPrediction],
        clicks: Sequence[ClickPrompt],
        prior: MaskPrompt | None,
    ) -> dict[Triple, WindowPrediction]:
        """The predictions after one more pass, with the newest click, in every window around it."""
        found = dict(before)
        new = clicks[-1]
        if new.window is not None and new.window not in found:
            found[new.window] = self._open(new.window, clicks, prior)
        point = self.windows.grid_point(new.point_vox)
        for start, earlier in before.items():
            index = self.windows.inside(start, point)
            if index is not None:
                found[start] = self._passes(
                    start, earlier.logits, earlier.clicks, [(index, new.positive)], earlier.seed
                )
        return found

    def _passes(
        self,
        start: Triple,
        logits: Tensor | None,
        clicks: tuple[WindowClick, ...],
        new: Sequence[WindowClick],
        seed: GridPoint | None,
    ) -> WindowPrediction:
        """The prediction after one pass for each new click, or one without clicks."""
        if not new:
            logits = self.network.decode(self.windows, start, (), logits)
        for click in new:
            clicks = (*clicks, click)
            given = clicks if self.clicks == "all" else (click,)
            logits = self.network.decode(self.windows, start, given, logits)
        assert logits is not None  # there was a pass
        return WindowPrediction(logits, clicks, seed)

    def _open(
        self,
        start: Triple,
        clicks: Sequence[ClickPrompt],
        prior: MaskPrompt | None,
        seed: GridPoint | None = None,
    ) -> WindowPrediction:
        """The prediction in a new window, from all prompts so far, in order."""
        found: list[WindowClick] = []
        if seed is not None:
            index = self.windows.inside(start, seed)
            assert index is not None  # a seed lies in the window it opens
            found.append((index, True))
        for click in clicks:
            index = self.windows.inside(start, self.windows.grid_point(click.point_vox))
            if index is not None:
                found.append((index, click.positive))
        logits = None if prior is None else self._prior_logits(start, prior.inside)
        return self._passes(start, logits, (), found, seed)

    def _prior_logits(self, start: Triple, mask: NDArray[np.bool_]) -> Tensor:
        """A mask prompt as the logits that a window's first pass gets, (s, s, s)."""
        side = self.windows.side_vox
        inside = self.windows.geometry.resample_box(mask, start, (side, side, side))
        encoding = self.network.encoding(self.windows, start)
        cells = CELLS_PER_TOKEN * int(encoding.embedding.shape[-1])
        pooled = torch.nn.functional.adaptive_avg_pool3d(inside[None], cells)[0]
        return (2 * pooled - 1) * MASK_LOGIT

    def _followed(
        self,
        roots: Mapping[Triple, WindowPrediction],
        known: Mapping[Triple, WindowPrediction],
        clicks: Sequence[ClickPrompt],
        prior: MaskPrompt | None,
    ) -> ObjectState:
        """The predictions in the prompted windows and in all that the object reaches from them.

        The walk is repeated after every click, so parts that a correction cuts off are dropped;
        predictions that still hold are taken from `known`.
        """
        found, notes = dict(roots), []
        queue, refused = deque(roots), set()
        while queue:
            start = queue.popleft()
            for neighbour in self._touched(start, found[start].logits):
                if neighbour in found or neighbour in refused:
                    continue
                if len(found) >= self.max_windows:
                    notes.append(
                        f"the object extends beyond max_windows={self.max_windows} and is cut off "
                        "there; click where it continues, or where it should end"
                    )
                    return ObjectState(found, tuple(notes))
                opened = self._neighbour(neighbour, found, known.get(neighbour), clicks, prior)
                if opened is None:
                    refused.add(neighbour)
                    continue
                found[neighbour] = opened
                queue.append(neighbour)
        if refused:
            notes.append(
                f"{len(refused)} windows at the object's border contradict it and were left out; "
                "click there if the object continues"
            )
        return ObjectState(found, tuple(notes))

    def _touched(self, start: Triple, logits: Tensor) -> list[Triple]:
        """The neighbours across those faces of a window that the object touches."""
        touching = (logits > 0).numpy() & self.windows.cells_inside(start, logits.shape[0])
        found = []
        for axis in range(3):
            for step in (-1, 1):
                face = touching.take(0 if step < 0 else -1, axis=axis)
                neighbour = self.windows.beside(start, axis, step)
                if neighbour is not None and face.any():
                    found.append(neighbour)
        return found

    def _neighbour(
        self,
        start: Triple,
        found: Mapping[Triple, WindowPrediction],
        earlier: WindowPrediction | None,
        clicks: Sequence[ClickPrompt],
        prior: MaskPrompt | None,
    ) -> WindowPrediction | None:
        """The prediction in a neighbouring window; None if it contradicts what is known there."""
        cells = next(iter(found.values())).logits.shape[0]
        field = LogitField(self.windows, {s: w.logits for s, w in found.items()})
        points = self.windows.cell_points(start, cells)
        known_logits, is_known = field.at(points)
        known = is_known.numpy() & self.windows.cells_inside(start, cells)
        inside = (known_logits.numpy() > 0) & known
        if earlier is not None:
            if earlier.seed is None:  # opened by a user's prompt
                return earlier
            side = self.windows.side_vox / cells
            where = [int((p - s + 0.5) / side) for p, s in zip(earlier.seed, start, strict=True)]
            if (inside | ~known)[tuple(where)]:  # the object may still be at its first click
                return earlier
        seed = None
        if prior is None:
            if not inside.any():
                return None
            # The cell deepest inside the known part, the window's border counting as outside.
            index = np.unravel_index(int(depth_mm(inside, (1, 1, 1)).argmax()), inside.shape)
            x, y, z = (float(axis[i]) for axis, i in zip(points, index, strict=True))
            seed = (x, y, z)
        opened = self._open(start, clicks, prior, seed)
        here = (opened.logits > 0).numpy() & known
        both = int((here & inside).sum())
        agrees = 2 * both >= LEAST_AGREEMENT * int(here.sum() + inside.sum())
        return opened if agrees else None
