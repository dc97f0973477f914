"""One user's work on one image, with the method names that nnInteractive's clients already call.

A script written for nnInteractive's session, local or remote, runs on this one after changing the
line that creates it. The session is also what both wire protocols of the server drive, so it never
refuses what a viewer may send in good faith: a negative click first, a click that contradicts an
earlier one, or a click that rounding has put just outside the image.

Array order is the caller's: a box or a point is in the axes of the array given to `set_image`.
"""

from __future__ import annotations

import logging
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.regions import bounding_box
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor

if TYPE_CHECKING:
    from torch import Tensor

    from sammed3d_backbone.data.preprocessing import Modality

logger = logging.getLogger(__name__)

Box = list[list[int]]  # [[low, high], ...] per array axis, high excluded

DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Point:
    """A click on a voxel of the array."""

    voxel: tuple[int, int, int]
    positive: bool


@dataclass(frozen=True, eq=False)
class Seed:
    """A mask to start from.

    Shapes:
        mask: (d0, d1, d2) bool, nonempty.
    """

    mask: NDArray[np.bool_]


Prompt = Point | Seed
AnyPrompt = TypeVar("AnyPrompt")


@dataclass(frozen=True, eq=False)
class Write:
    """Voxels of the target buffer before they were changed."""

    box: Box
    before: bytes  # packed bits of the box, compressed


@dataclass(frozen=True, eq=False)
class Step:
    """What `undo` goes back to: the prompts before the newest one, and what was written since."""

    prompts: tuple[Prompt, ...]
    writes: list[Write]


class InteractiveSession:
    """Clicks on one image at a time, answered in the caller's own array.

    Args:
        predictor: Runs the network; the session owns its volume and prompts from now on.
        modality: "ct", "mr" or "us", as for `Predictor.set_volume`; clients do not send it.
        axes: Directions of the array's axes in *reverse* order, as viewers number them (i, j, k):
            "LPS" for an axial series from DICOM, "RAS" for NIfTI in napari. Image properties with
            an `affine` or a `direction` win over it.
        license: Shown by clients; the terms of the weights.

    Raises:
        ValueError: If `axes` does not name three different axes.

    Example:
        >>> session = InteractiveSession(Predictor(sam("tiny")), modality="ct")  # doctest: +SKIP
        >>> session.set_image(image[None], {"spacing": (2.5, 0.8, 0.8)})  # doctest: +SKIP
        >>> session.set_target_buffer(np.zeros(image.shape, np.uint8))  # doctest: +SKIP
        >>> session.add_point_interaction((40, 200, 180), True)  # doctest: +SKIP
        [[31, 52], [180, 223], [160, 199]]
    """

    INFERENCE_SESSION_VERSION = "sammed3d-backbone"
    supported_interactions: Mapping[str, bool] = {
        "points": True,
        "bbox2d": False,
        "bbox3d": False,
        "scribble": False,
        "lasso": False,
    }
    channel_mapping: Mapping[str, tuple[int, int]] = {"points": (0, 1)}
    num_interaction_channels = 2
    supports_initial_label = True
    supports_zero_shot_label_refinement = False
    preferred_scribble_thickness = (2, 2, 2)  # napari aborts where it is missing
    interaction_decay = None
    supports_undo = True

    def __init__(
        self,
        predictor: Predictor,
        *,
        modality: Modality | None = None,
        axes: str = "LPS",
        license: str = "!!MISSING!!",
    ) -> None:
        self.axes = checked_axes(axes)
        self.modality = modality
        self.license = license
        self.original_image_shape: tuple[int, ...] | None = None
        self.target_buffer: NDArray[Any] | Tensor | None = None
        self._predictor = predictor
        self._prompts: tuple[Prompt, ...] = ()
        self._history: list[Step] = []
        self._told: list[Prompt] = []  # prompts that the predictor holds
        self._last_paste_bbox: Box | None = None
        self._forget_prompts()

    def initialize_from_trained_model_folder(self, *_: object, **__: object) -> None:
        """Does nothing but warn: the weights were chosen when the predictor was built."""
        warnings.warn(
            "initialize_from_trained_model_folder() is ignored: this session runs the network of "
            "its predictor",
            RuntimeWarning,
            stacklevel=2,
        )

    # --- image and target ----------------------------------------------------------------------

    def set_image(
        self, image: NDArray[Any], image_properties: Mapping[str, Any] | None = None
    ) -> None:
        """Starts work on an image; prompts and the target buffer of an earlier one are dropped.

        Args:
            image: Used in place; it must not be changed meanwhile.
            image_properties: `spacing` in mm along the array's axes (1 mm each if it is missing).
                `affine`, (4, 4), maps array indices to RAS+ mm and replaces `spacing` and the
                session's `axes`; `direction`, 9 numbers row by row as ITK has them (columns are the
                directions of i, j, k in LPS), replaces `axes`.

        Shapes:
            image: (1, d0, d1, d2).

        Raises:
            TypeError: If the voxels are not real numbers.
            ValueError: If the image or its properties cannot be used.
        """
        image = np.asarray(image)
        if image.ndim != 4 or image.shape[0] != 1:
            raise ValueError(
                f"an image of shape {image.shape} cannot be segmented; give one channel, "
                "(1, d0, d1, d2)"
            )
        affine = array_affine(image_properties or {}, self.axes)
        self.original_image_shape = None
        self.target_buffer = None
        self._forget_prompts()
        self._predictor.set_volume(Volume(image[0], affine), modality=self.modality)
        self.original_image_shape = image.shape

    def set_target_buffer(self, target_buffer: NDArray[Any] | Tensor) -> None:
        """Sets the array that masks are written to, in place: 1 inside, 0 outside.

        Shapes:
            target_buffer: (d0, d1, d2), a NumPy array or a torch tensor.

        Raises:
            ValueError: If there is no image, or the shape is not that of the image.
        """
        shape = self._grid()
        if tuple(target_buffer.shape) != shape:
            raise ValueError(
                f"a target buffer of shape {tuple(target_buffer.shape)} does not fit the image's "
                f"{shape}; give that shape"
            )
        self.target_buffer = target_buffer
        self._history.clear()

    def set_do_autozoom(self, do_autozoom: bool) -> None:
        """Switches following on or off: whether objects larger than one window are followed.

        Prompts stay; the next prediction obeys.
        """
        self._predictor.follow = bool(do_autozoom)

    @property
    def do_autozoom(self) -> bool:
        """Whether objects larger than one window are followed."""
        return self._predictor.follow

    # --- prompts -------------------------------------------------------------------------------

    def add_point_interaction(
        self,
        coordinates: Sequence[float],
        include_interaction: bool,
        run_prediction: bool = True,
        override_capability_checks: bool = False,  # noqa: ARG002
    ) -> Box | None:
        """Adds a click.

        Args:
            coordinates: Voxel in the array's axes; fractions are rounded. Up to one voxel outside
                the image counts as its border; further outside the click changes nothing.
            include_interaction: True inside the object, False outside it. A click on a voxel that
                was clicked with the other sign replaces that click.
            run_prediction: Whether to update the target buffer now.
            override_capability_checks: Accepted for compatibility.

        Returns:
            The box of changed voxels; None if none has changed.

        Raises:
            ValueError: If there is no image, or the coordinates are not three finite numbers.
        """
        voxel = voxel_inside(coordinates, self._grid())
        # Also for a click that changes nothing: the viewer counts it when it undoes.
        with self._step():
            if voxel is None:
                return None
            point = Point(voxel, bool(include_interaction))
            opposite = Point(voxel, not point.positive)
            self._prompts = (*(p for p in self._prompts if p != opposite), point)
            return self._predict() if run_prediction else None

    def add_initial_seg_interaction(
        self,
        initial_seg: NDArray[Any],
        run_prediction: bool = False,
        override_capability_checks: bool = False,  # noqa: ARG002
    ) -> Box | None:
        """Starts from a mask: earlier prompts are dropped and the target buffer shows the mask.

        Args:
            initial_seg: Nonzero inside. An empty mask only drops the prompts.
            run_prediction: Whether the network refines the mask at once.
            override_capability_checks: Accepted for compatibility.

        Returns:
            The box of voxels that the prediction changed; None without one.

        Shapes:
            initial_seg: (d0, d1, d2).

        Raises:
            ValueError: If there is no image, or the shape is not that of the image.
        """
        inside = np.asarray(initial_seg) != 0
        if inside.shape != self._grid():
            raise ValueError(
                f"an initial segmentation of shape {inside.shape} does not fit the image's "
                f"{self._grid()}; give that shape"
            )
        with self._step():
            self._prompts = (Seed(inside),) if inside.any() else ()
            self._write(inside)
            return self._predict() if run_prediction else None

    def reset_interactions(self) -> None:
        """Drops all prompts and clears the target buffer; what was encoded of the image stays."""
        self._forget_prompts()
        if self.target_buffer is not None:
            self.target_buffer[:] = 0

    def undo(self) -> bool:
        """Takes the newest prompt back, as often as there are prompts.

        Returns:
            Whether there was one. The target buffer shows again what it showed before it.
        """
        self._last_paste_bbox = None
        if not self._history:
            return False
        step = self._history.pop()
        self._prompts = step.prompts
        for write in reversed(step.writes):
            shape = [high - low for low, high in write.box]
            bits = np.frombuffer(zlib.decompress(write.before), dtype=np.uint8)
            self._assign(write.box, np.unpackbits(bits, count=math.prod(shape)).reshape(shape))
        if step.writes:
            lows, highs = zip(*(np.transpose(write.box) for write in step.writes), strict=True)
            self._last_paste_bbox = np.transpose([np.min(lows, 0), np.max(highs, 0)]).tolist()
        return True

    def _predict(self, force_full_refine: bool = False) -> Box | None:  # noqa: ARG002
        """Updates the target buffer from the prompts so far.

        Args:
            force_full_refine: Accepted for compatibility; every prediction here is a full one.

        Returns:
            The box of changed voxels; None if none has changed.
        """
        grid = self._grid()
        self._tell()
        if any(isinstance(prompt, Seed) or prompt.positive for prompt in self._prompts):
            mask = self._predictor.predict().mask
        else:  # nothing says yet where the object is
            mask = np.zeros(grid, dtype=np.bool_)
        self._last_paste_bbox = self._write(mask)
        return self._last_paste_bbox

    # --- inside --------------------------------------------------------------------------------

    def _forget_prompts(self) -> None:
        self._prompts = ()
        self._history.clear()
        self._told.clear()
        self._predictor.reset()
        self._last_paste_bbox = None

    @contextmanager
    def _step(self) -> Iterator[None]:
        """One prompt, which `undo` takes back; one that fails is taken back at once."""
        self._history.append(Step(self._prompts, []))
        self._last_paste_bbox = None
        try:
            yield
        except BaseException:
            self.undo()
            raise

    def _grid(self) -> tuple[int, ...]:
        """Shape (d0, d1, d2) of the image."""
        if self.original_image_shape is None:
            raise ValueError("there is no image yet; call set_image first")
        return self.original_image_shape[1:]

    def _tell(self) -> None:
        """Brings the predictor's prompts up to date; answers to those in common are kept."""
        for prompt in news(self._predictor, self._told, self._prompts):
            if isinstance(prompt, Seed):
                self._predictor.mask_prompt(mask=prompt.mask)
            else:
                self._predictor.click(prompt.voxel, prompt.positive)
            self._told.append(prompt)

    def _write(self, mask: NDArray[np.bool_]) -> Box | None:
        """Puts a mask into the target buffer, and what it replaces into the newest step."""
        if self.target_buffer is None:
            return None
        shown = shown_in(self.target_buffer)
        box = hull(shown != mask)
        if box is None:
            return None
        region = tuple(slice(low, high) for low, high in box)
        if self._history:
            before = zlib.compress(np.packbits(shown[region]).tobytes(), level=1)
            self._history[-1].writes.append(Write(box, before))
        self._assign(box, mask[region])
        return box

    def _assign(self, box: Box, values: NDArray[Any]) -> None:
        region = tuple(slice(low, high) for low, high in box)
        target = self.target_buffer
        if isinstance(target, np.ndarray):
            target[region] = values
        elif target is not None:
            import torch

            target[region] = torch.from_numpy(values.astype(np.uint8)).to(target)


def news(
    predictor: Predictor, told: list[AnyPrompt], prompts: Sequence[AnyPrompt]
) -> Sequence[AnyPrompt]:
    """The prompts that are new to a predictor; those that no longer hold are undone.

    Args:
        predictor: Holds the prompts of `told`.
        told: The predictor's prompts; shortened to those that hold.
        prompts: All prompts that it shall hold.
    """
    pairs = zip(told, prompts, strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    while len(told) > common:
        predictor.undo()
        told.pop()
    return prompts[common:]


def checked_axes(axes: str) -> str:
    """The directions of axes i, j, k in capital letters.

    Raises:
        ValueError: If they are not three letters, one of each of R/L, A/P and S/I.
    """
    codes = axes.upper()
    if sorted(DIRECTIONS.get(code, (-1, 0))[0] for code in codes) != [0, 1, 2]:
        raise ValueError(
            f"axes={axes!r}: give three letters, one of R or L, A or P, S or I, such as LPS"
        )
    return codes


def array_affine(properties: Mapping[str, Any], axes: str) -> NDArray[np.float64]:
    """The affine from array indices to RAS+ mm that image properties and `axes` describe.

    The origin is left at 0 unless an affine says otherwise: no mask depends on it.

    Raises:
        ValueError: If a property is malformed.
    """
    if properties.get("affine") is not None:
        return numbers(properties["affine"], "affine", (4, 4))
    spacing = properties.get("spacing")
    if spacing is None:
        logger.warning("the image came without its spacing; 1 mm is assumed along each axis")
    spacing_mm = numbers((1, 1, 1) if spacing is None else spacing, "spacing", (3,))
    if not (spacing_mm > 0).all():
        raise ValueError(f"spacing={spacing_mm.tolist()}: give three positive numbers of mm")
    if properties.get("direction") is not None:
        directions = LPS_TO_RAS @ numbers(properties["direction"], "direction", (9,)).reshape(3, 3)
    else:
        directions = np.zeros((3, 3))
        for column, code in enumerate(checked_axes(axes)):
            row, sign = DIRECTIONS[code]
            directions[row, column] = sign
    affine = np.eye(4)
    affine[:3, :3] = directions[:, ::-1] * spacing_mm  # columns i, j, k -> array axes k, j, i
    return affine


def numbers(value: object, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A property as an array of finite numbers of one shape.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        array = np.empty(0)
    if array.size == math.prod(shape) and array.ndim < 3:
        array = array.reshape(shape)  # nine numbers may come as three rows
    if array.shape != shape or not np.isfinite(array).all():
        size = " x ".join(map(str, shape))
        raise ValueError(f"{name} is not {size} finite numbers; correct the client's request")
    return array


def voxel_inside(
    coordinates: Sequence[float], shape: tuple[int, ...]
) -> tuple[int, int, int] | None:
    """The voxel nearest to a point; None if the point lies more than a voxel outside.

    Raises:
        ValueError: If the point is not three finite numbers.
    """
    point = numbers(coordinates, "coordinates", (3,))
    last = np.array(shape) - 1
    if ((point < -1) | (point > last + 1)).any():
        return None
    i, j, k = np.clip(np.floor(point + 0.5), 0, last).astype(int).tolist()
    return i, j, k


def shown_in(target: NDArray[Any] | Tensor) -> NDArray[np.bool_]:
    """What a target buffer shows, as bool."""
    array = target if isinstance(target, np.ndarray) else target.detach().cpu().numpy()
    shown: NDArray[np.bool_] = array if array.dtype == np.bool_ else array != 0
    return shown


def hull(inside: NDArray[np.bool_]) -> Box | None:
    """The smallest box around all true voxels; None if there is none."""
    box = bounding_box(inside)
    return None if box is None else [[side.start, side.stop] for side in box]
