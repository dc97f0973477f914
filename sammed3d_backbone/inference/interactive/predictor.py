"""The predictor: a volume and prompts in, masks on the volume's own grid out.

Nothing runs before `predict`; a prompt only notes what was said, after checking it. The answer is a
function of the volume, the weights and the prompts in their order: asking in between, undoing and
doing again, or a cache change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sammed3d_backbone.data.geometry import Triple, TripleMm
from sammed3d_backbone.data.intensity import CT_WINDOW_HU
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import write_text
from sammed3d_backbone.inference.interactive import click_io as clicklist
from sammed3d_backbone.inference.interactive.click_io import to_json, volume_sha256
from sammed3d_backbone.inference.interactive.embedding_cache import Network, Promptable
from sammed3d_backbone.inference.interactive.logit_field import Field
from sammed3d_backbone.inference.interactive.prediction import Prediction, agreeing, honour
from sammed3d_backbone.inference.interactive.prompts import (
    Click,
    MaskPrompt,
    Prompt,
    require_consistent,
    voxel_of,
)
from sammed3d_backbone.inference.interactive.propagation import ClickMode, State, Tracer
from sammed3d_backbone.inference.interactive.stability import Quality, compare, voxel_near
from sammed3d_backbone.inference.interactive.validation import (
    Modality,
    checked_mask,
    checked_range,
    intensity_of,
    opened_volume,
    spacing_of,
    volume_notes,
)
from sammed3d_backbone.inference.interactive.windows import Windows

Points = Sequence[Sequence[float]]

OBJECT = "object"  # the name of what is clicked where nobody named it


class Predictor:
    """Segments objects of a volume from clicks on them.

    Args:
        model: A promptable network such as `sam(...)` builds; it is set to evaluation, and its
            values must not change while it is in use here.
        clicks: What each pass is given: "newest", as in training, or "all" clicks so far.
        follow: Whether an object that runs into a window's border is followed into the next.
        max_windows: In which one object is followed.
        honour_clicks: Whether positive clicks always end inside the mask and negative ones outside.
        spacing_mm: Along R, A, S, instead of that of the weights.
        cache_bytes: Of encoded windows that are kept in memory.
        cache_folder: Where encoded windows are also kept for later sessions; None for nowhere.
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
        model: Promptable,
        *,
        clicks: ClickMode = "newest",
        follow: bool = True,
        max_windows: int = 27,
        honour_clicks: bool = False,
        spacing_mm: TripleMm | None = None,
        cache_bytes: int = 2**28,
        cache_folder: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        if clicks not in ("newest", "all"):
            raise ValueError(f"clicks={clicks!r}; give 'newest', as in training, or 'all'")
        if max_windows < 1:
            raise ValueError(f"max_windows={max_windows}; give the number of windows, 1 or more")
        known_mm, self._setup_notes = spacing_of(model)
        if spacing_mm is not None:
            self._setup_notes = ()
        self.spacing_mm = spacing_mm or known_mm
        self.clicks = clicks
        self.follow = follow
        self.max_windows = max_windows
        self.honour_clicks = honour_clicks
        self._network = Network(
            model, cache_bytes=cache_bytes, cache_folder=cache_folder, progress=progress
        )
        self._volume: Volume | None = None

    # --- the volume ----------------------------------------------------------------------------

    def set_volume(
        self,
        volume: str | Path | Volume | NDArray[Any],
        affine: ArrayLike | None = None,
        *,
        modality: Modality | None = None,
    ) -> None:
        """Begins with a volume; earlier prompts are forgotten.

        Args:
            volume: A NIfTI file, a `Volume`, or an array (X, Y, Z), which is used as it is and must
                not be changed meanwhile.
            affine: Of an array: voxel -> RAS+ mm, (4, 4).
            modality: "ct" for intensities in HU, which are clamped to [-1000, 1000] as in training;
                "mr" and "us" are taken as they are, and so is None.

        Raises:
            FileNotFoundError: If there is no such file.
            TypeError: If an array comes without its affine, or holds no real numbers.
            ValueError: If the volume cannot be used; the message says what to do.
        """
        intensity = intensity_of(modality)
        opened = opened_volume(volume, affine)
        low, high = checked_range(opened)
        windows = Windows(opened, self.spacing_mm, self._network.side_vox, intensity)
        self._volume = opened
        self._tracer = Tracer(windows, self._network, self.clicks, self.follow, self.max_windows)
        self._modality = modality
        self._lowest = max(low, CT_WINDOW_HU[0]) if modality == "ct" else low
        self._notes = volume_notes(opened, windows, low, high, modality)
        self._network.forget()
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
        """Notes a click.

        Args:
            point_vox: Voxel i, j, k of the volume's own grid, counted from 0.
            positive: Inside the object; False corrects what is not the object.
            point_mm: x, y, z in RAS+ mm, instead of `point_vox`.
            object: Name of what was clicked.

        Raises:
            TypeError: If the point is no sequence of numbers.
            ValueError: If there is no volume, the point lies outside it, or an earlier click says
                the opposite of the same voxel.
        """
        voxel = voxel_of(self._required_volume(), point_vox, point_mm)
        windows = self._tracer.windows
        window = windows.around(windows.place(voxel), self._anchor) if positive else None
        click = Click(object, voxel, bool(positive), window)
        clicks = [prompt for prompt in self._prompts if isinstance(prompt, Click)]
        require_consistent(clicks, click, len(clicks) + 1)
        self._prompts.append(click)

    def mask_prompt(
        self,
        *,
        logits: NDArray[Any] | None = None,
        mask: NDArray[Any] | Volume | None = None,
        object: str = OBJECT,
    ) -> None:
        """Notes an earlier answer to go on from; it replaces what was said about the object.

        Args:
            logits: Of an earlier answer. The network was trained with logits.
            mask: Instead: nonzero inside. It counts as logits of 10 and -10.
            object: Name of what it shows.

        Shapes:
            logits: (X, Y, Z) on the volume's own grid.
            mask: the same.

        Raises:
            TypeError: If the logits are not of a floating type.
            ValueError: If there is no volume, not exactly one of both is given, it is not on the
                volume's grid, or it shows no voxel of the object.
        """
        volume = self._required_volume()
        if (logits is None) == (mask is None):
            raise ValueError("a mask prompt is logits= or mask=; give one of them")
        values = checked_mask(volume, logits, mask)
        inside = values > 0
        if not inside.any():
            raise ValueError("the mask prompt shows no voxel of the object; click on it instead")
        spans = [np.flatnonzero(inside.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
        middle = [int(span[0] + span[-1]) // 2 for span in spans]
        windows = self._tracer.windows
        window = windows.around(windows.place((middle[0], middle[1], middle[2])), self._anchor)
        self._prompts.append(MaskPrompt(object, values, window))

    def undo(self) -> None:
        """Takes the last prompt back, whatever its object; as often as there are prompts.

        Raises:
            ValueError: If there is none left.
        """
        if not self._prompts:
            raise ValueError("nothing to undo: there is no click left; click first")
        name = self._prompts.pop().object
        states = self._states.get(name, [])
        del states[len(self._of(name)) :]

    def reset(self) -> None:
        """Takes all prompts back; the volume and its encoded windows stay."""
        self._prompts: list[Prompt] = []
        self._states: dict[str, list[State]] = {}

    @property
    def objects(self) -> list[str]:
        """Names of the objects that were prompted, in order."""
        return list(dict.fromkeys(prompt.object for prompt in self._prompts))

    def clicks_on(self, object: str) -> list[Click]:
        """The clicks on an object, in order."""
        return [prompt for prompt in self._of(object) if isinstance(prompt, Click)]

    # --- answers -------------------------------------------------------------------------------

    def predict(self, object: str | None = None) -> Prediction:
        """The mask of an object.

        Args:
            object: Its name; None where there is only one.

        Raises:
            ValueError: If there is no such object, or nothing positive was said about it.
        """
        volume = self._required_volume()
        name = self._only_object() if object is None else object
        state = self._state(name)
        clicks = self.clicks_on(name)
        with self._network.watch.of("mask"):
            field = self._field(state)
            mask = field.mask()
            agreed = agreeing(mask, clicks)
            if self.honour_clicks:
                honour(mask, clicks, volume)
        return Prediction(
            mask=mask,
            source=volume,
            clicks=len(clicks),
            clicks_agreed=agreed,
            windows=len(state.answers),
            predicted_dice=self._tracer.rating(state, self._of(name)[-1]),
            notes=(
                *self._setup_notes,
                *self._notes,
                *self._click_notes(clicks, mask),
                *state.notes,
            ),
            seconds=self._network.watch.taken(),
            logits=field,
        )

    def segment(
        self,
        volume: str | Path | Volume | NDArray[Any],
        points: Points | Mapping[str, Points],
        *,
        negative: Points | Mapping[str, Points] = (),
        in_mm: bool = False,
        affine: ArrayLike | None = None,
        modality: Modality | None = None,
    ) -> dict[str, Prediction]:
        """The masks of all objects of a volume in one call.

        Args:
            volume: As for `set_volume`.
            points: Positive clicks, or those of each object by its name.
            negative: Negative clicks, in the same form; they come after all positive ones.
            in_mm: Whether points are RAS+ mm instead of voxels of the volume's own grid.
            affine: As for `set_volume`.
            modality: As for `set_volume`.

        Returns:
            A prediction by name; "object" is the name where none was given. Masks do not know of
            each other and may overlap.
        """
        self.set_volume(volume, affine, modality=modality)
        for group, positive in ((points, True), (negative, False)):
            named = group if isinstance(group, Mapping) else {OBJECT: group}
            for name, places in named.items():
                for place in places:
                    unit = {"point_mm": place} if in_mm else {"point_vox": place}
                    self.click(**unit, positive=positive, object=name)
        if not self._prompts:
            raise ValueError("no points were given; give at least one positive point")
        return {name: self.predict(name) for name in self.objects}

    def quality(
        self, object: str | None = None, *, answers: int = 8, radius_mm: float = 3.0, seed: int = 0
    ) -> Quality:
        """Whether an object's mask stands when its clicks fall a little elsewhere.

        Args:
            object: Its name; None where there is only one.
            answers: To moved clicks; each costs the decoder's passes of all clicks again.
            radius_mm: How far a click moves at most.
            seed: Of the random moves.

        Raises:
            ValueError: As for `predict`, or if there are no answers to compare with.
        """
        self._required_volume()
        name = self._only_object() if object is None else object
        if not 1 <= answers < 255:
            raise ValueError(f"answers={answers}; give a number of answers from 1 to 254")
        mask = self._field(self._state(name)).mask()
        others = []
        for number in range(answers):
            rng = np.random.default_rng((seed, number))
            prompts = [self._moved(prompt, radius_mm, rng) for prompt in self._of(name)]
            state = State()
            for count in range(len(prompts)):
                state = self._tracer.advance(state, prompts[: count + 1])
            others.append(self._field(state).mask())
        return compare(mask, others)

    # --- click lists ---------------------------------------------------------------------------

    def save_clicks(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes all clicks as JSON, with hashes of the volume and the weights.

        Raises:
            FileExistsError: If the file exists and is not to be replaced.
            ValueError: If there is no volume, or a mask prompt, which such a list cannot hold.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another name, or pass overwrite=True")
        volume = self._required_volume()
        clicks = [prompt for prompt in self._prompts if isinstance(prompt, Click)]
        if len(clicks) < len(self._prompts):
            raise ValueError(
                "a click list cannot hold mask prompts; save the mask as NIfTI beside it and give "
                "both again"
            )
        text = to_json(clicks, volume_sha256(volume), self._network.weights_sha256, self._settings)
        write_text(path, text)

    def load_clicks(self, path: str | Path) -> None:
        """Replaces all prompts by the clicks of a file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no click list, or was made with another volume, other weights or
                other settings; the prompts then stay as they are.
        """
        volume = self._required_volume()
        listed = clicklist.read(path)
        if listed.volume_sha256 not in (None, volume_sha256(volume)):
            raise ValueError(f"{path} was made on another volume; open that one")
        if listed.weights_sha256 not in (None, self._network.weights_sha256):
            raise ValueError(f"{path} was made with other weights; load those")
        mine = self._settings
        for key, value in listed.settings.items():
            if mine.get(key) != value:
                raise ValueError(
                    f"{path} was made with {key}={value!r}, here it is {mine.get(key)!r}; "
                    "use the same"
                )
        before = self._prompts, self._states
        self.reset()
        try:
            for entry in listed.clicks:
                self.click(**entry)
        except (TypeError, ValueError) as error:
            self._prompts, self._states = before
            raise ValueError(f"{path}: {error}") from None

    # --- inside --------------------------------------------------------------------------------

    def _moved(self, prompt: Prompt, radius_mm: float, rng: np.random.Generator) -> Prompt:
        """The prompt; if it is a click, at a random voxel near it."""
        if not isinstance(prompt, Click):
            return prompt
        voxel = voxel_near(prompt.point_vox, self._required_volume(), radius_mm, rng)
        windows = self._tracer.windows
        window, place = prompt.window, windows.place(voxel)
        if window is not None and windows.inside(window, place) is None:
            window = windows.around(place, self._anchor)
        return replace(prompt, point_vox=voxel, window=window)

    @property
    def _anchor(self) -> Triple | None:
        """Start of the first window that a prompt asked for, which places all others."""
        return next((p.window for p in self._prompts if p.window is not None), None)

    @property
    def _settings(self) -> dict[str, Any]:
        """What an answer depends on beside volume, weights and clicks."""
        return {
            "clicks": self.clicks,
            "follow": self.follow,
            "max_windows": self.max_windows,
            "honour_clicks": self.honour_clicks,
            "spacing_mm": list(self.spacing_mm),
            "modality": self._modality,
        }

    def _field(self, state: State) -> Field:
        return Field(self._tracer.windows, {s: a.logits for s, a in state.answers.items()})

    def _of(self, name: str) -> list[Prompt]:
        return [prompt for prompt in self._prompts if prompt.object == name]

    def _required_volume(self) -> Volume:
        if self._volume is None:
            raise ValueError("there is no volume yet; call set_volume first")
        return self._volume

    def _only_object(self) -> str:
        names = self.objects
        if not names:
            raise ValueError("nothing was clicked yet; call click first")
        if len(names) > 1:
            raise ValueError(f"several objects were clicked; name one of {', '.join(names)}")
        return names[0]

    def _state(self, name: str) -> State:
        """The answers to all prompts of an object, of which those known are not asked again."""
        prompts = self._of(name)
        if all(prompt.window is None for prompt in prompts):
            raise ValueError(
                f"{name!r} has no positive click"
                f"{' but negative ones' if prompts else ''}; click inside it first"
            )
        states = self._states.setdefault(name, [])
        for count in range(len(states), len(prompts)):
            before = states[-1] if states else State()
            states.append(self._tracer.advance(before, prompts[: count + 1]))
        return states[-1]

    def _click_notes(self, clicks: Sequence[Click], mask: NDArray[np.bool_]) -> list[str]:
        """What is odd about clicks, without being wrong."""
        array = self._required_volume().array
        notes = [
            f"click {click.point_vox} lies on the volume's lowest value, as padding and air have it"
            for click in clicks
            if click.positive and array[click.point_vox] <= self._lowest
        ]
        if not mask.any():
            notes.append("the network finds nothing at these clicks")
        return notes
