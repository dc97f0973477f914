"""The predictor: a volume and prompts in, masks on the volume's own grid out.

A prompt is only validated and stored; the network runs in `predict`, and in `encode` ahead of it.
The result is a function of the volume, the weights, the settings and the prompts in their order:
predicting in between, undo and redo, or a cache do not change it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.data.intensity import CT_WINDOW_HU
from sammed3d_backbone.data.preprocessing import Modality, Preprocessing, preprocessing_of
from sammed3d_backbone.data.regions import bounding_box
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import atomic_path
from sammed3d_backbone.inference.interactive.click_io import ClickList, volume_sha256
from sammed3d_backbone.inference.interactive.embedding_cache import (
    EmbeddingCache,
    PromptableNetwork,
)
from sammed3d_backbone.inference.interactive.logit_field import LogitField
from sammed3d_backbone.inference.interactive.prediction import Prediction, enforce_clicks
from sammed3d_backbone.inference.interactive.prompts import (
    OBJECT,
    ClickPrompt,
    MaskPrompt,
    Prompt,
    mask_values,
    object_name,
)
from sammed3d_backbone.inference.interactive.propagation import (
    ClickMode,
    ObjectState,
    WindowPropagator,
)
from sammed3d_backbone.inference.interactive.windows import Windows
from sammed3d_backbone.inference.validation import ValidatedVolume, validate_volume


class Predictor:
    """Segments objects of a volume from clicks.

    The settings `clicks`, `follow`, `max_windows` and `enforce_clicks` are attributes and may be
    changed at any time; prompts and encoded windows stay.

    Args:
        model: A promptable network such as `sam(...)` builds; it is set to evaluation mode, and its
            values must not change while it is in use here.
        clicks: Whether each pass gets the "newest" click or "all" clicks so far; None is as the
            weights were trained, "newest" if they do not say.
        follow: Whether an object that touches a window's border is followed into the next window.
        max_windows: Bound on the windows of one object.
        enforce_clicks: Whether positive clicks always end inside the mask and negative outside.
        preprocessing: Used instead of the record of the weights, for example
            `replace(model.pretrained_cfg.preprocessing, statistics="volume")`.
        cache_bytes: Bound on the encoded windows in memory.
        cache_folder: Folder that also keeps encoded windows for later sessions.
        progress: Show a bar of encoded windows on standard error.

    Example:
        >>> predictor = Predictor(sam("tiny", pretrained=False))
        >>> predictor.set_volume(np.arange(24.0).reshape(2, 3, 4), np.eye(4))
        >>> predictor.click((1, 1, 2))
        >>> predictor.predict().mask.shape
        (2, 3, 4)
    """

    def __init__(
        self,
        model: PromptableNetwork,
        *,
        clicks: ClickMode | None = None,
        follow: bool = True,
        max_windows: int = 27,
        enforce_clicks: bool = False,
        preprocessing: Preprocessing | None = None,
        cache_bytes: int = 2**28,
        cache_folder: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
            raise TypeError(f"preprocessing={preprocessing!r}: expected a Preprocessing, or None")
        self._network = EmbeddingCache(
            model, max_bytes=cache_bytes, folder=cache_folder, progress=progress
        )
        used, self._setup_notes = preprocessing_of(model, preprocessing)
        # The window is the network's input, whatever size the weights were stored with.
        self.preprocessing = replace(used, crop_vox=tuple(model.image_encoder.img_size))
        record = getattr(model, "pretrained_cfg", None)
        self.clicks: ClickMode = clicks or getattr(record, "clicks", None) or "newest"
        self._record = record
        self.follow = follow
        self.max_windows = max_windows
        self.enforce_clicks = enforce_clicks
        self._scan: ValidatedVolume | None = None
        self.reset()
        self._require_settings()

    # --- the volume ----------------------------------------------------------------------------

    def set_volume(
        self,
        volume: Any,  # noqa: ANN401 (see `validate_volume`)
        affine: ArrayLike | None = None,
        *,
        modality: Modality | None = None,
    ) -> None:
        """Starts with a volume and forgets earlier prompts.

        Args:
            volume: The result of `validate_volume`, or what `validate_volume` takes.
            affine: See `validate_volume`.
            modality: "ct", "mr" or "us" choose the intensity mode that the weights were trained
                with; None is their default.

        Raises:
            ValueError: If the weights do not know the modality; also those of `validate_volume`.
        """
        scan = volume if isinstance(volume, ValidatedVolume) else validate_volume(volume, affine)
        self._windows = Windows(scan.volume, self.preprocessing, modality)
        self._scan = scan
        self._modality = modality
        self._notes = scan.notes(modality)
        thin = min(self._windows.geometry.resampled_shape)
        if thin < self._windows.side_vox / 8:
            self._notes.append(
                f"the volume is only {thin} voxels thick at the network's spacing, so the network "
                "sees mostly padding; expect lower accuracy"
            )
        self._network.clear()
        self.reset()

    # --- prompts -------------------------------------------------------------------------------

    def click(
        self,
        point_vox: Sequence[float] | None = None,
        positive: bool = True,
        *,
        point_mm: Sequence[float] | None = None,
        object: str = OBJECT,
    ) -> None:
        """Adds a click.

        Args:
            point_vox: Voxel i, j, k of the volume's own grid, counted from 0.
            positive: Whether the point lies inside the object.
            point_mm: x, y, z in RAS+ mm, instead of `point_vox`.
            object: Name of the object; a whole number is taken as its text.

        Raises:
            TypeError: If the point is not a sequence of numbers, `positive` is not a boolean,
                or the name of the object is neither text nor a whole number.
            ValueError: If there is no volume, the point lies outside it, or an earlier click on
                the same voxel has the other sign.
        """
        if not isinstance(positive, bool | np.bool_):
            raise TypeError(f"positive={positive!r}: expected True or False")
        voxel = self._require_scan().voxel(point_vox, point_mm)
        window = self._window_around(voxel) if positive else None
        click = ClickPrompt(object_name(object), voxel, bool(positive), window)
        earlier = [prompt for prompt in self._prompts if isinstance(prompt, ClickPrompt)]
        opposite = replace(click, positive=not click.positive)
        for number, other in enumerate(earlier, start=1):
            if replace(other, window=window) == opposite:
                raise ValueError(
                    f"click {number} says that voxel {voxel} is "
                    f"{'inside' if other.positive else 'outside'} {click.object!r}; undo it first"
                )
        self._prompts.append(click)

    def mask_prompt(self, mask: NDArray[Any], *, object: str = OBJECT) -> None:
        """Adds an earlier mask to refine; it replaces earlier prompts on the object.

        Args:
            mask: Nonzero inside the object; it counts as logits of 10 and -10.
            object: Name of the object.

        Shapes:
            mask: (X, Y, Z) on the volume's own grid.

        Raises:
            TypeError: If the mask does not hold numbers.
            ValueError: If it is empty, has another shape than the volume, or is not finite.
        """
        inside = mask_values(mask, self._require_scan().volume.shape)
        x, y, z = ((side.start + side.stop - 1) // 2 for side in bounding_box(inside) or ())
        self._prompts.append(
            MaskPrompt(object_name(object), inside, self._window_around((x, y, z)))
        )

    def undo(self) -> None:
        """Removes the newest prompt, of whichever object.

        Raises:
            ValueError: If there is none.
        """
        if not self._prompts:
            raise ValueError("nothing to undo: there is no prompt")
        name = self._prompts.pop().object
        left = len(self._prompts_on(name))
        for (about, *_), states in self._states.items():
            if about == name:
                del states[left:]

    def reset(self) -> None:
        """Removes all prompts; the volume and its encoded windows stay.

        Windows lie on a lattice that the first prompt starts. A next object under another name
        shares it and often needs no encoder pass; a reset starts another lattice.
        """
        self._prompts: list[Prompt] = []
        self._states: dict[tuple[str, ClickMode, bool, int], list[ObjectState]] = {}

    @property
    def objects(self) -> list[str]:
        """Names of the prompted objects, in order."""
        return list(dict.fromkeys(prompt.object for prompt in self._prompts))

    def clicks_on(self, object: str) -> list[ClickPrompt]:
        """The clicks on an object, in order."""
        return [
            prompt
            for prompt in self._prompts_on(object_name(object))
            if isinstance(prompt, ClickPrompt)
        ]

    def encode(
        self, point_vox: Sequence[float] | None = None, *, point_mm: Sequence[float] | None = None
    ) -> None:
        """Encodes the window in which a click on a point would begin, to answer it sooner.

        No mask depends on it.

        Args:
            point_vox: As for `click`.
            point_mm: As for `click`.

        Raises:
            ValueError: If there is no volume, or the point lies outside it.
        """
        voxel = self._require_scan().voxel(point_vox, point_mm)
        self._network.encoding(self._windows, self._window_around(voxel))

    @property
    def windows_encoded(self) -> int:
        """Passes of the encoder so far; may be read while another thread predicts."""
        return self._network.passes

    # --- predictions ---------------------------------------------------------------------------

    def predict(self, object: str | None = None) -> Prediction:
        """The mask of an object.

        Raises:
            ValueError: If there is no such object, or it has no positive prompt.
        """
        volume = self._require_scan().volume
        name = self._only_object() if object is None else object_name(object)
        state = self._state(name)
        clicks = self.clicks_on(name)
        field = self._field(state)
        mask = field.mask()
        agreed = sum(bool(mask[click.point_vox]) == click.positive for click in clicks)
        if self.enforce_clicks:
            enforce_clicks(mask, clicks, volume)
        notes = (*self._setup_notes, *self._notes, *self._click_notes(clicks, mask), *state.notes)
        return Prediction(
            mask=mask,
            source=volume,
            clicks=len(clicks),
            clicks_agreed=agreed,
            windows=len(state.windows),
            predicted_dice=self._expected_dice(state, len(clicks)),
            notes=notes,
            logits=field,
        )

    def stability(
        self, object: str | None = None, *, trials: int = 8, radius_mm: float = 3.0, seed: int = 0
    ) -> float:
        """Mean Dice of an object's mask with the masks of slightly moved clicks.

        1 is a mask that does not depend on the exact position of the clicks. Only the decoder runs.

        Args:
            object: Name of the object; None if there is only one.
            trials: Number of masks to compare with.
            radius_mm: Largest distance by which a click moves.
            seed: Seed of the moves.

        Raises:
            ValueError: If `predict` raises it, or there are no trials.
        """
        _require_count("trials", trials)
        if not 0 <= radius_mm < math.inf:
            raise ValueError(f"radius_mm={radius_mm}: expected a length in mm, 0 or more")
        self._require_scan()
        name = self._only_object() if object is None else object_name(object)
        mask = self._field(self._state(name)).mask()
        propagator = self._propagator()
        scores = []
        for trial in range(trials):
            rng = np.random.default_rng((seed, trial))
            prompts = [self._moved(prompt, radius_mm, rng) for prompt in self._prompts_on(name)]
            state = ObjectState()
            for count in range(len(prompts)):
                state = propagator.advance(state, prompts[: count + 1])
            other = self._field(state).mask()
            total = int(mask.sum()) + int(other.sum())
            scores.append(2 * int((mask & other).sum()) / total if total else 1.0)
        return float(np.mean(scores))

    # --- click lists ---------------------------------------------------------------------------

    def click_list(self) -> ClickList:
        """All clicks, with hashes of the volume and the weights.

        Raises:
            ValueError: If there is a mask prompt, which a click list cannot hold.
        """
        volume = self._require_scan().volume
        clicks = [prompt for prompt in self._prompts if isinstance(prompt, ClickPrompt)]
        if len(clicks) < len(self._prompts):
            raise ValueError("a click list cannot hold mask prompts; save the mask as NIfTI")
        return ClickList(
            tuple(click.to_dict() for click in clicks),
            volume_sha256(volume),
            self._network.weights_sha256,
            self._settings,
        )

    def save_clicks(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes all clicks as JSON, with hashes of the volume and the weights; makes the folder.

        Raises:
            FileExistsError: If the file exists and is not to be overwritten.
            ValueError: If there is a mask prompt.
        """
        content = self.click_list().to_json()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, overwrite=overwrite) as draft:
            draft.write_text(content, encoding="utf-8")

    def load_clicks(self, clicks: str | Path | ClickList) -> None:
        """Replaces all prompts by those of a click list.

        Args:
            clicks: A file, or its content.

        Raises:
            ValueError: If it was made with another volume, weights or settings, or a click is not
                valid; the prompts then stay as they are.
        """
        volume = self._require_scan().volume
        listed = clicks if isinstance(clicks, ClickList) else ClickList.load(clicks)
        name = "the click list" if isinstance(clicks, ClickList) else str(clicks)
        if listed.volume_sha256 not in (None, volume_sha256(volume)):
            raise ValueError(f"{name} was made on another volume; open that volume")
        if listed.weights_sha256 not in (None, self._network.weights_sha256):
            raise ValueError(f"{name} was made with other weights; load those weights")
        mine = self._settings
        if other := {k: v for k, v in listed.settings.items() if mine.get(k) != v}:
            raise ValueError(f"{name} was made with {other}; use the same settings")
        before = self._prompts, self._states
        self.reset()
        for number, entry in enumerate(listed.clicks, start=1):
            try:
                self.click(**entry)
            except (TypeError, ValueError) as error:
                self._prompts, self._states = before
                raise ValueError(f"{name}, click {number}: {error}") from None

    # --- inside --------------------------------------------------------------------------------

    def _propagator(self) -> WindowPropagator:
        """The propagator with the settings of this moment."""
        self._require_settings()
        return WindowPropagator(
            self._windows, self._network, self.clicks, self.follow, self.max_windows
        )

    def _require_settings(self) -> None:
        if self.clicks not in ("newest", "all"):
            raise ValueError(f"clicks={self.clicks!r}: expected 'newest' or 'all'")
        _require_count("max_windows", self.max_windows)

    def _moved(self, prompt: Prompt, radius_mm: float, rng: np.random.Generator) -> Prompt:
        """A click moved to a random voxel near it; other prompts unchanged."""
        if not isinstance(prompt, ClickPrompt):
            return prompt
        voxel = voxel_near(prompt.point_vox, self._require_scan().volume, radius_mm, rng)
        window = prompt.window
        if window is not None:
            moved = self._windows.inside(window, self._windows.grid_point(voxel))
            window = self._window_around(voxel) if moved is None else window
        return replace(prompt, point_vox=voxel, window=window)

    def _window_around(self, voxel: Triple) -> Triple:
        """Start of the window around a voxel, on the lattice of the first prompt."""
        anchor = next((p.window for p in self._prompts if p.window is not None), None)
        return self._windows.around(self._windows.grid_point(voxel), anchor)

    @property
    def _settings(self) -> dict[str, Any]:
        """All settings that a mask depends on, beside volume, weights and clicks."""
        return {
            "clicks": self.clicks,
            "follow": self.follow,
            "max_windows": self.max_windows,
            "enforce_clicks": self.enforce_clicks,
            "modality": self._modality,
            "preprocessing": json.loads(json.dumps(self.preprocessing.to_dict())),
        }

    def _expected_dice(self, state: ObjectState, clicks: int) -> float | None:
        """The calibrated Dice; the calibration holds for clicks given as it was fitted with."""
        fitted_with = getattr(self._record, "clicks", None) or "newest"
        calibration = getattr(self._record, "dice_calibration", None)
        if calibration is None or self.clicks != fitted_with:
            return None
        expected: float = calibration.expected(state.confidence, clicks)
        return expected

    def _field(self, state: ObjectState) -> LogitField:
        return LogitField(self._windows, {s: w.logits for s, w in state.windows.items()})

    def _prompts_on(self, name: str) -> list[Prompt]:
        return [prompt for prompt in self._prompts if prompt.object == name]

    def _require_scan(self) -> ValidatedVolume:
        if self._scan is None:
            raise ValueError("there is no volume; call set_volume first")
        return self._scan

    def _only_object(self) -> str:
        names = self.objects
        if not names:
            raise ValueError("there is no click; call click first")
        if len(names) > 1:
            raise ValueError(f"there are several objects; choose one of {', '.join(names)}")
        return names[0]

    def _state(self, name: str) -> ObjectState:
        """The state after all prompts on an object; known states are reused."""
        prompts = self._prompts_on(name)
        if all(prompt.window is None for prompt in prompts):
            raise ValueError(f"object {name!r} has no positive click; click inside it first")
        propagator = self._propagator()
        key = (name, self.clicks, self.follow, self.max_windows)
        states = self._states.setdefault(key, [])
        for count in range(len(states), len(prompts)):
            before = states[-1] if states else ObjectState()
            states.append(propagator.advance(before, prompts[: count + 1]))
        return states[-1]

    def _click_notes(self, clicks: Sequence[ClickPrompt], mask: NDArray[np.bool_]) -> list[str]:
        """Notes on unusual clicks."""
        scan = self._require_scan()
        lowest = max(scan.low, CT_WINDOW_HU[0]) if self._modality == "ct" else scan.low
        notes = [
            f"click {click.point_vox} lies on the lowest value of the volume, probably padding or "
            "air"
            for click in clicks
            if click.positive and scan.volume.array[click.point_vox] <= lowest
        ]
        if not mask.any():
            notes.append("the network finds nothing at these clicks")
        return notes


def voxel_near(
    point_vox: Triple, volume: Volume, radius_mm: float, rng: np.random.Generator
) -> Triple:
    """A voxel of the volume, drawn uniformly from the ball around a voxel."""
    direction = rng.normal(size=3)
    offset_mm = direction / np.linalg.norm(direction) * radius_mm * rng.random() ** (1 / 3)
    offset = np.linalg.solve(volume.affine[:3, :3], offset_mm)
    i, j, k = np.clip(np.rint(point_vox + offset), 0, np.array(volume.shape) - 1).astype(int)
    return int(i), int(j), int(k)


def _require_count(name: str, given: int) -> None:
    if not isinstance(given, int | np.integer) or given < 1:
        raise ValueError(f"{name}={given!r}: expected a whole number, 1 or more")
