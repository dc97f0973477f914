"""Runs any promptable model by the rules of a click protocol, with one `ClickStep` per click.

A model has ``set_volume``, ``click``, ``predict`` and ``reset``. An exception of the model is
counted as a failure, with an empty mask.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.clickbench.cases import ClickTarget
from sammed3d_backbone.data.geometry import Triple, TripleMm
from sammed3d_backbone.data.preprocessing import Modality
from sammed3d_backbone.data.regions import Mask
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.strategies import Click, Draws, Errors, Strategy

log = logging.getLogger(__name__)

FAILED = "the model failed, which counts as an empty mask"


class MaskAnswer(Protocol):
    """The prediction of a model; it may also have ``predicted_dice``, a float or None."""

    @property
    def mask(self) -> NDArray[Any]:
        """(X, Y, Z) of the volume that was set, bool or 0 and 1."""


class PromptableModel(Protocol):
    """The interface that the benchmark needs of a model."""

    def set_volume(self, volume: Volume, *, modality: Modality | None = None) -> object:
        """Sets the volume; the modality is "ct", "mr", "us" or None for unknown."""

    def click(self, point_vox: Triple, positive: bool = True) -> object:
        """Adds a click, in voxels of the volume."""

    def predict(self) -> MaskAnswer:
        """The mask after all clicks since the last reset."""

    def reset(self) -> object:
        """Removes the clicks, keeps the volume."""


@dataclass(frozen=True, eq=False)
class ClickStep:
    """One prediction of a model, with the clicks that led to it.

    Shapes:
        mask: (X, Y, Z) bool, on the grid that is scored.
        truth: (X, Y, Z) bool, on the same grid.
        affine: (4, 4), affine of that grid.
        clicked_affine: (4, 4), affine of the grid that the clicks are counted on.
    """

    mask: Mask
    truth: Mask
    affine: NDArray[np.float64]
    clicks: tuple[Click, ...]  # new in this step; empty where nothing was left to correct
    clicked_affine: NDArray[np.float64]
    agreement: tuple[bool, ...]  # for each of `clicks`, whether the mask agrees with it
    agreement_all: tuple[bool, ...]  # the same for all clicks so far
    failure: str = ""  # class of the exception that the model raised
    seconds: Mapping[str, float] = field(default_factory=dict)
    predicted_dice: float | None = None

    @property
    def spacing_mm(self) -> TripleMm:
        """Spacing of the grid that is scored."""
        x, y, z = (float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z


Show = Callable[["Player", ClickTarget, Sequence[Strategy], Draws, int], Iterator[ClickStep]]


@dataclass(frozen=True)
class ClickRules:
    """A protocol: where clicks go, how many, what the model gets and what is scored."""

    name: str
    steps: int
    tracks: Mapping[str, tuple[Strategy, ...]]  # name -> strategy of step 1, 2, ...; the last stays
    show: Show
    source: str  # where the protocol is published
    oracle: str = ""  # uses of the truth beyond the clicks; "" for none
    min_voxels: int = 1  # smaller targets are dropped, and listed
    published: str = ""  # name of the figures that are published with it, see `summary`
    differs: str = ""  # from what was published
    spacing_is_xyz: bool = False  # how spacings of npz files are read


class Player:
    """A model under test, its current volume, and the time that its answers take."""

    def __init__(self, model: PromptableModel) -> None:
        self.model = model
        self._shown: Volume | None = None  # None after a failure
        self._refused = ""  # class of the exception of set_volume
        self._seconds: dict[str, float] = {}  # before the next answer

    def show(self, volume: Volume, modality: Modality | None) -> None:
        """Gives the model a volume, unless it has it already, and removes all clicks."""
        self._refused, self._seconds = "", {}
        try:
            if volume is not self._shown:
                start = time.perf_counter()
                self.model.set_volume(volume, modality=modality)
                self._seconds["set_volume"] = time.perf_counter() - start
            self.model.reset()
        except Exception as error:
            log.exception(FAILED)
            self._shown, self._refused = None, type(error).__name__
        else:
            self._shown = volume

    def answer(self, click: Click, shape: Triple) -> dict[str, Any]:
        """The fields of a `ClickStep` that come from the model, after one more click.

        Raises:
            ValueError: If the mask is not of the volume's shape.
        """
        seconds, self._seconds = self._seconds, {}
        failed = {"mask": np.zeros(shape, dtype=bool), "seconds": seconds}
        if self._refused:
            return {**failed, "failure": self._refused}
        start = time.perf_counter()
        try:
            self.model.click(click.point_vox, click.positive)
            prediction = self.model.predict()
        except Exception as error:
            log.exception(FAILED)
            self._shown = None  # set again before the next target
            return {**failed, "failure": type(error).__name__}
        seconds["click"] = time.perf_counter() - start
        mask = np.asarray(prediction.mask)
        if mask.shape != shape:
            raise ValueError(
                f"the model returned a mask of {mask.shape} voxels for a volume of {shape}; return "
                "it on the grid of the volume"
            )
        predicted_dice = getattr(prediction, "predicted_dice", None)
        return {"mask": mask > 0, "seconds": seconds, "predicted_dice": predicted_dice}


def interact(
    player: Player,
    volume: Volume,
    truth: Mask,
    modality: Modality | None,
    strategies: Sequence[Strategy],
    draws: Draws,
    steps: int,
) -> Iterator[ClickStep]:
    """One click per step, scored on the volume's own grid.

    Where nothing is left to correct, the last mask is carried forward.

    Args:
        player: The model under test.
        volume: The volume that the model gets.
        truth: Mask on the volume's grid; not given to the model.
        modality: Modality of the volume.
        strategies: Strategies of step 1, 2, ...; the last one is used for all further steps.
        draws: Random draws of the strategies.
        steps: Number of steps.
    """
    player.show(volume, modality)
    clicked: list[Click] = []
    mask = np.zeros(volume.shape, dtype=bool)
    step: ClickStep | None = None
    for number in range(steps):
        strategy = strategies[min(number, len(strategies) - 1)]
        click = strategy(Errors(truth, mask, volume.affine, draws, clicked))
        if click is None:
            if step is not None:
                carried = replace(step, clicks=(), agreement=(), seconds={})
                yield from [carried] * (steps - number)
            return
        clicked.append(click)
        answer = player.answer(click, volume.shape)
        mask = answer["mask"]
        agreement = tuple(bool(mask[c.point_vox]) == c.positive for c in clicked)
        step = ClickStep(
            **answer,
            truth=truth,
            affine=volume.affine,
            clicks=(click,),
            clicked_affine=volume.affine,
            agreement=agreement[-1:],
            agreement_all=agreement,
        )
        yield step
