"""The predictor: a volume and prompts in, masks on the volume's own grid out.

Nothing runs before `predict`; a prompt only notes what was said, after checking it. The answer is a
function of the volume, the weights and the prompts in their order: asking in between, undoing and
doing again, or a cache change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sammed3d_backbone.data.geometry import Triple, TripleMm
from sammed3d_backbone.data.intensity import CT_WINDOW_HU
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.predictor.field import Field
from sammed3d_backbone.predictor.network import Network, Promptable
from sammed3d_backbone.predictor.prediction import Prediction, agreeing, honour
from sammed3d_backbone.predictor.prompts import (
    Click,
    MaskPrompt,
    Prompt,
    require_consistent,
    voxel_of,
)
from sammed3d_backbone.predictor.tracing import ClickMode, State, Tracer
from sammed3d_backbone.predictor.windows import Windows

Modality = Literal["ct", "mr", "us"]
Points = Sequence[Sequence[float]]

SPACING_MM = (1.5, 1.5, 1.5)  # of all published weights
OBJECT = "object"  # the name of what is clicked where nobody named it
# Training clamped CT and nothing else; statistics are those of a crop's voxels above 0.
INTENSITY: dict[str | None, str] = {
    "ct": "ct",
    "mr": "zscore_positive",
    "us": "zscore_positive",
    None: "zscore_positive",
}


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
        progress: Show a bar of encoded windows on standard error.

    Example:
        >>> predictor = Predictor(sam("vit_b"))
        >>> predictor.set_volume("scan.nii.gz", modality="ct")
        >>> predictor.click(point_mm=(-31.0, 12.5, 40.0))
        >>> predictor.predict().volume.save("mask.nii.gz")
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
        progress: bool = False,
    ) -> None:
        if clicks not in ("newest", "all"):
            raise ValueError(f"clicks={clicks!r}; give 'newest', as in training, or 'all'")
        if max_windows < 1:
            raise ValueError(f"max_windows={max_windows}; give the number of windows, 1 or more")
        record = getattr(model, "pretrained_cfg", None)
        known_mm = getattr(record, "spacing_mm", None)
        self._setup_notes: tuple[str, ...] = ()
        if spacing_mm is None and known_mm is None:
            self._setup_notes = (
                f"the weights do not say their spacing; {SPACING_MM[0]} mm is assumed",
            )
        self.spacing_mm = spacing_mm or known_mm or SPACING_MM
        self.clicks = clicks
        self.follow = follow
        self.max_windows = max_windows
        self.honour_clicks = honour_clicks
        self._network = Network(model, cache_bytes=cache_bytes, progress=progress)
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
        if modality not in INTENSITY:
            raise ValueError(f"modality={modality!r}; give 'ct', 'mr', 'us' or None")
        opened = _opened(volume, affine)
        low, high = _checked_range(opened)
        windows = Windows(opened, self.spacing_mm, self._network.side_vox, INTENSITY[modality])
        self._volume = opened
        self._tracer = Tracer(windows, self._network, self.clicks, self.follow, self.max_windows)
        self._lowest = max(low, CT_WINDOW_HU[0]) if modality == "ct" else low
        self._volume_notes = _volume_notes(windows, low, high, modality)
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
        values = _checked_mask(volume, logits, mask)
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
        clicks = [prompt for prompt in self._of(name) if isinstance(prompt, Click)]
        with self._network.watch.of("mask"):
            field = Field(self._tracer.windows, {s: a.logits for s, a in state.answers.items()})
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
            notes=(
                *self._setup_notes,
                *self._volume_notes,
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

    # --- inside --------------------------------------------------------------------------------

    @property
    def _anchor(self) -> Triple | None:
        """Start of the first window that a prompt asked for, which places all others."""
        return next((p.window for p in self._prompts if p.window is not None), None)

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
        anchor = self._anchor
        if not any(prompt.window is not None for prompt in prompts) or anchor is None:
            raise ValueError(
                f"{name!r} has no positive click"
                f"{' but negative ones' if prompts else ''}; click inside it first"
            )
        states = self._states.setdefault(name, [])
        for count in range(len(states), len(prompts)):
            before = states[-1] if states else State()
            states.append(self._tracer.advance(before, prompts[: count + 1], anchor))
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


def _opened(volume: str | Path | Volume | NDArray[Any], affine: ArrayLike | None) -> Volume:
    """The volume with one channel of real numbers and a usable spacing."""
    if isinstance(volume, str | Path):
        volume = Volume.load(volume)
    elif not isinstance(volume, Volume):
        if affine is None:
            raise TypeError("an array has no place in the body; give its affine, voxel -> RAS+ mm")
        volume = Volume(np.asarray(volume), np.array(affine, dtype=np.float64))
    if volume.channels > 1:
        raise ValueError(
            f"the volume has {volume.channels} channels, the network takes one; "
            "give Volume(volume.array[n], volume.affine, volume.header)"
        )
    if volume.array.ndim == 4:
        volume = Volume(volume.array[0], volume.affine, volume.header)
    if volume.array.dtype.kind not in "iuf":
        raise TypeError(
            f"voxels of type {volume.array.dtype} are no intensities; give real numbers"
        )
    spacing = volume.spacing_mm
    if min(spacing) < 0.01 or max(spacing) > 100:
        raise ValueError(
            f"a spacing of {tuple(round(s, 6) for s in spacing)} mm is no scan's; the header may "
            "count in metres or micrometres: mend its affine"
        )
    return volume


def _checked_range(volume: Volume) -> tuple[float, float]:
    """The lowest and highest value; refuses what has none or no contrast."""
    low, high = float(volume.array.min()), float(volume.array.max())
    if not np.isfinite([low, high]).all():
        endless = volume.array.size - int(np.isfinite(volume.array).sum())
        raise ValueError(
            f"the volume holds NaN or infinity in {endless} voxels; replace those voxels"
        )
    if low == high:
        raise ValueError(f"all voxels are {low:g}: there is nothing to segment; check the file")
    return low, high


def _volume_notes(
    windows: Windows, low: float, high: float, modality: Modality | None
) -> tuple[str, ...]:
    """What is odd about a volume, without being wrong."""
    notes = []
    if modality is None and low <= -500 and high >= 500:
        notes.append("the values look like CT in HU; pass modality='ct' to clamp them as trained")
    if modality == "ct" and low >= 0:
        notes.append("no value is below 0, so these are hardly HU; check the intercept or modality")
    if high <= 0:
        notes.append("no value is above 0, so the network sees an empty image; shift the values")
    thin = min(windows.geometry.resampled_shape)
    if thin < windows.side_vox / 8:
        notes.append(
            f"the volume is only {thin} voxels thin at the network's spacing, so it sees mostly "
            "padding; expect less"
        )
    return tuple(notes)


def _checked_mask(
    volume: Volume, logits: NDArray[Any] | None, mask: NDArray[Any] | Volume | None
) -> NDArray[Any]:
    """A mask prompt as float logits or as bool, on the volume's grid."""
    if isinstance(mask, Volume):
        if not np.allclose(mask.affine, volume.affine, atol=1e-3):
            raise ValueError("the mask's affine is not the volume's; resample it to the volume")
        mask = mask.array
    values = np.asarray(mask if logits is None else logits)
    if values.shape != volume.shape:
        raise ValueError(
            f"a mask prompt of {values.shape} voxels is not on the volume's grid {volume.shape}; "
            "resample it"
        )
    if logits is None:
        inside: NDArray[np.bool_] = values != 0
        return inside
    if values.dtype.kind != "f":
        raise TypeError(f"logits of type {values.dtype}; give floating logits, or pass it as mask=")
    if not np.isfinite(values).all():
        raise ValueError("the logits hold NaN or infinity; replace those voxels")
    return values
