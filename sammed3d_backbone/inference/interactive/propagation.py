"""Clicks on one object -> the network's answer in every window that the object reaches.

Each window is a crop as in training: it is opened with a zero mask and a click on the object, and
every further click in it is one more pass on the logits of the last. Where the object runs into a
window's border, the neighbouring window on the lattice is opened, with half of it shared; its
opening click is the deepest voxel of what is known of the object there. A neighbour whose answer
contradicts the shared half is left out, so that one wrong answer does not spread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.inference.interactive.embedding_cache import CELLS_PER_TOKEN, Network, Point
from sammed3d_backbone.inference.interactive.logit_field import Field
from sammed3d_backbone.inference.interactive.prompts import Click, MaskPrompt, Prompt
from sammed3d_backbone.inference.interactive.windows import Place, Windows

ClickMode = Literal["newest", "all"]
MASK_LOGIT = 10.0  # what a voxel of a binary mask prompt counts as, up or down
LEAST_AGREEMENT = 0.5  # Dice that a neighbour's answer must reach in the half that is known


@dataclass(frozen=True, eq=False)
class Answer:
    """What the network says in one window, and what it was told.

    Shapes:
        logits: (s, s, s), one per cell.
    """

    logits: Tensor
    rating: float  # the Dice that the network expects of it
    points: tuple[Point, ...]
    seed: Place | None = None  # the opening click, where no user's click opened the window


@dataclass(frozen=True, eq=False)
class State:
    """All answers about one object after some of its prompts."""

    answers: Mapping[Triple, Answer] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Tracer:
    """How the prompts of an object become answers.

    Args:
        windows: Of the volume.
        network: With its memory of encoded windows.
        clicks: What a pass is given: the newest click, as in training, or all clicks so far.
        follow: Whether neighbouring windows are opened.
        max_windows: Of one object; more are not opened.
    """

    windows: Windows
    network: Network
    clicks: ClickMode
    follow: bool
    max_windows: int

    def advance(self, state: State, prompts: Sequence[Prompt]) -> State:
        """The state after the last of an object's prompts, from the state before it.

        Args:
            state: After all prompts but the last.
            prompts: Of this object, in order.
        """
        new = prompts[-1]
        # A mask prompt stands for everything that was said before it.
        masks = [n for n, prompt in enumerate(prompts) if isinstance(prompt, MaskPrompt)]
        prior = prompts[masks[-1]] if masks else None
        assert prior is None or isinstance(prior, MaskPrompt)
        clicks = [p for p in prompts[masks[-1] + 1 if masks else 0 :] if isinstance(p, Click)]
        if isinstance(new, MaskPrompt):
            answers = {new.window: self._open(new.window, [], prior)}
        else:
            answers = self._clicked(state.answers, clicks, prior)
        asked = dict.fromkeys(p.window for p in (prior, *clicks) if p and p.window is not None)
        roots = {start: answers[start] for start in asked if start in answers}
        if not self.follow:
            return State(roots)
        return self._followed(roots, answers, clicks, prior)

    def rating(self, state: State, newest: Prompt) -> float | None:
        """The network's opinion of its answer in the window around an object's newest prompt.

        A correction asks for no window: of those that it lies in, it is the one whose middle is
        nearest. None where it lies in none.
        """
        if isinstance(newest, MaskPrompt):
            return state.answers[newest.window].rating
        place = self.windows.place(newest.point_vox)
        middle = (self.windows.side_vox - 1) / 2
        away = {
            start: max(abs(s + middle - p) for s, p in zip(start, place, strict=True))
            for start in state.answers
            if self.windows.inside(start, place) is not None
        }
        around = newest.window or min(away, key=lambda start: away[start], default=None)
        return None if around is None else state.answers[around].rating

    def _clicked(
        self, before: Mapping[Triple, Answer], clicks: Sequence[Click], prior: MaskPrompt | None
    ) -> dict[Triple, Answer]:
        """The answers with the newest click told to every window that it lies in."""
        answers = dict(before)
        new = clicks[-1]
        if new.window is not None and new.window not in answers:
            answers[new.window] = self._open(new.window, clicks, prior)
        place = self.windows.place(new.point_vox)
        for start, answer in before.items():
            index = self.windows.inside(start, place)
            if index is not None:
                point = Point(index, new.positive)
                told = self._told(start, answer.logits, answer.points, [point])
                answers[start] = Answer(*told, answer.seed)
        return answers

    def _told(
        self, start: Triple, logits: Tensor | None, told: tuple[Point, ...], new: Sequence[Point]
    ) -> tuple[Tensor, float, tuple[Point, ...]]:
        """Logits and rating after one pass for each new click, and all that the window was told."""
        rating: float | None = None
        if not new:
            logits, rating = self.network.decode(self.windows, start, (), logits)
        for point in new:
            told = (*told, point)
            given = told if self.clicks == "all" else (point,)
            logits, rating = self.network.decode(self.windows, start, given, logits)
        assert logits is not None  # there was a pass
        assert rating is not None
        return logits, rating, told

    def _open(
        self,
        start: Triple,
        clicks: Sequence[Click],
        prior: MaskPrompt | None,
        seed: Place | None = None,
    ) -> Answer:
        """The answer in a window that was not open: all that was said so far, in order."""
        points = self._points(start, clicks)
        if seed is not None:
            index = self.windows.inside(start, seed)
            assert index is not None  # a seed lies in the window it opens
            points.insert(0, Point(index, positive=True))
        logits = None if prior is None else self._cells_of(start, prior.values)
        return Answer(*self._told(start, logits, (), points), seed)

    def _points(self, start: Triple, clicks: Sequence[Click]) -> list[Point]:
        """The clicks that lie in a window."""
        places = ((click, self.windows.place(click.point_vox)) for click in clicks)
        found = ((click, self.windows.inside(start, place)) for click, place in places)
        return [Point(index, click.positive) for click, index in found if index is not None]

    def _cells_of(self, start: Triple, values: NDArray[Any]) -> Tensor:
        """A mask prompt as the logits that a window's pass is given, (s, s, s)."""
        oriented = self.windows.geometry.oriented(values)
        inside = self.windows.resampled(oriented, start)
        cells = self._cells(start)
        pooled = torch.nn.functional.adaptive_avg_pool3d(inside[None], cells)[0]
        return pooled if values.dtype != np.bool_ else (2 * pooled - 1) * MASK_LOGIT

    def _cells(self, start: Triple) -> int:
        """Cells along a side of a window."""
        return CELLS_PER_TOKEN * int(self.network.embedding(self.windows, start).shape[-1])

    # --- following -----------------------------------------------------------------------------

    def _followed(
        self,
        roots: Mapping[Triple, Answer],
        known: Mapping[Triple, Answer],
        clicks: Sequence[Click],
        prior: MaskPrompt | None,
    ) -> State:
        """The answers in the windows that were asked for and in all that the object runs into.

        It walks anew after every click, so what a correction has cut off is dropped again; answers
        that still hold are taken from `known`.
        """
        answers, notes = dict(roots), []
        queue, refused = deque(roots), set()
        while queue:
            start = queue.popleft()
            for neighbour in self._run_into(start, answers[start].logits):
                if neighbour in answers or neighbour in refused:
                    continue
                if len(answers) >= self.max_windows:
                    notes.append(
                        f"the object goes on beyond {self.max_windows} windows and is cut there; "
                        "raise max_windows, or correct it where it should end"
                    )
                    return State(answers, tuple(notes))
                answer = self._neighbour(neighbour, answers, known.get(neighbour), clicks, prior)
                if answer is None:
                    refused.add(neighbour)
                    continue
                answers[neighbour] = answer
                queue.append(neighbour)
        if refused:
            notes.append(
                f"{len(refused)} windows at the object's border say something else about it and "
                "were left out; click there if it goes on"
            )
        return State(answers, tuple(notes))

    def _run_into(self, start: Triple, logits: Tensor) -> list[Triple]:
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
        answers: Mapping[Triple, Answer],
        earlier: Answer | None,
        clicks: Sequence[Click],
        prior: MaskPrompt | None,
    ) -> Answer | None:
        """The answer in a neighbouring window; None if it contradicts what is known there."""
        logits, known = self._sampled(start, answers)
        known &= self.windows.cells_inside(start, len(known))
        inside = (logits > 0) & known
        if earlier is not None and self._holds(start, earlier, inside | ~known):
            return earlier
        seed = None
        if prior is None:
            if not inside.any():
                return None
            seed = self._deepest(start, inside)
        answer = self._open(start, clicks, prior, seed)
        here = (answer.logits > 0).numpy() & known
        both = int((here & inside).sum())
        agrees = 2 * both >= LEAST_AGREEMENT * int(here.sum() + inside.sum())
        return answer if agrees else None

    def _sampled(
        self, start: Triple, answers: Mapping[Triple, Answer]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The logits known at the cells of a window, and where they are known; (s, s, s)."""
        cells = next(iter(answers.values())).logits.shape[0]
        cell = self.windows.side_vox / cells
        offsets = np.arange(cells, dtype=np.float64) * cell + (cell - 1) / 2
        field = Field(self.windows, {s: a.logits for s, a in answers.items()})
        logits, known = field.at([s + offsets for s in start])
        return logits.numpy(), known.numpy()

    def _holds(self, start: Triple, earlier: Answer, possible: NDArray[np.bool_]) -> bool:
        """Whether the click that opened a window still lies where the object may be."""
        if earlier.seed is None:  # a user's click or mask opened it
            return True
        cell = self.windows.side_vox / possible.shape[0]
        index = [int((p - s + 0.5) / cell) for p, s in zip(earlier.seed, start, strict=True)]
        return bool(possible[tuple(index)])

    def _deepest(self, start: Triple, inside: NDArray[np.bool_]) -> Place:
        """The place deepest inside a mask of a window's cells, the window's border counting."""
        depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1, 1:-1]
        index = np.unravel_index(int(depth.argmax()), inside.shape)
        cell = self.windows.side_vox / inside.shape[0]
        x, y, z = (s + (int(i) + 0.5) * cell - 0.5 for s, i in zip(start, index, strict=True))
        return x, y, z
