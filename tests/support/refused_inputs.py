"""Bad inputs of the predictor and of `sammed3d segment`, and a token of each message.

A refused input raises in Python; `sammed3d segment` prints the message, writes nothing and ends
with exit code 2. An input that is odd without being wrong is segmented with a note.
"""

import contextlib
import gzip
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from standin import StandIn
from standin import segment as segment_known

from sammed3d_backbone.cli import main
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor

AFFINE = np.diag([1.5, 1.5, 1.5, 1.0])
GRID = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)


def balls():
    """A volume with two bright balls, around (22, 40, 36) and (36, 54, 36)."""
    i, j, k = np.ogrid[:90, :80, :70]
    first = (i - 22) ** 2 + (j - 40) ** 2 + (k - 36) ** 2 < 9**2
    second = (i - 36) ** 2 + (j - 54) ** 2 + (k - 36) ** 2 < 7**2
    return np.where(first | second, 200, 50).astype(np.int16)


@dataclass(frozen=True)
class Row:
    """An input, and a token of the message.

    Args:
        what: The input in words.
        given: How to make it; its type depends on the table.
        said: What the message has to name: the argument, the file or the value.
        kind: Class of the exception in Python; unused for files and commands.
    """

    what: str
    given: Any
    said: str
    kind: type[Exception] = ValueError


def with_one(value):
    array = GRID.copy()
    array[1, 2, 3] = value
    return array


# Arguments of `set_volume`.
VOLUMES = [
    Row("array without affine", (GRID,), "affine", TypeError),
    Row("several channels", (np.stack([GRID, GRID]), AFFINE), "channels"),
    Row("two dimensions", (GRID[0], AFFINE), "(6, 7)"),
    Row("no voxels", (GRID[:0], AFFINE), "(0, 6, 7)"),
    Row("complex numbers", (GRID.astype(complex), AFFINE), "complex128", TypeError),
    Row("yes and no", (GRID > 3, AFFINE), "bool", TypeError),
    Row("text", (GRID.astype(str), AFFINE), "<U32", TypeError),
    Row("one NaN", (with_one(np.nan), AFFINE), "NaN"),
    Row("one infinity", (with_one(-np.inf), AFFINE), "NaN"),
    Row("constant", (np.full_like(GRID, 7), AFFINE), "7"),
    Row("all zero", (np.zeros_like(GRID), AFFINE), "0"),
    Row("singular affine", (GRID, np.diag([1, 1, 0, 1.0])), "affine"),
    Row("NaN in the affine", (GRID, np.diag([1, 1, np.nan, 1])), "affine"),
    Row("affine of 3 x 3", (GRID, np.eye(3)), "affine"),
    Row("spacing in metres", (GRID, np.diag([0.0015, 0.0015, 0.0015, 1])), "0.0015"),
    Row("spacing in micrometres", (GRID, np.diag([1500, 1500, 1500, 1])), "1500"),
    Row("tensor without values", (torch.empty(5, 6, 7, device="meta"), AFFINE), "meta", TypeError),
    Row("sparse tensor", (torch.from_numpy(GRID).to_sparse(), AFFINE), "sparse", TypeError),
    Row("image of SimpleITK", (sitk.GetImageFromArray(GRID), AFFINE), "path", TypeError),
    Row("no such file", ("no/such.nii.gz",), "no/such.nii.gz", FileNotFoundError),
]

# Arguments of `click` on the balls, after a positive click on (22, 40, 36).
CLICKS = [
    Row("no point", {}, "point_vox"),
    Row("a point in both units", {"point_vox": (1, 2, 3), "point_mm": (1, 2, 3)}, "point_vox"),
    Row("two numbers", {"point_vox": (1, 2)}, "point_vox"),
    Row("NaN", {"point_vox": (1, 2, np.nan)}, "point_vox"),
    Row("infinity", {"point_mm": (1, np.inf, 0)}, "point_mm"),
    Row("text", {"point_vox": "1,2"}, "point_vox", TypeError),
    Row("a word for the sign", {"point_vox": (1, 2, 3), "positive": "no"}, "positive", TypeError),
    Row("a number for the sign", {"point_vox": (1, 2, 3), "positive": 1}, "positive", TypeError),
    Row("an object without a name", {"point_vox": (1, 2, 3), "object": None}, "object", TypeError),
    Row("an object with an empty name", {"point_vox": (1, 2, 3), "object": " "}, "object"),
    Row("a name of 5,000 letters", {"point_vox": (1, 2, 3), "object": "x" * 5000}, "object"),
    Row("words", {"point_vox": ("a", "b", "c")}, "point_vox", TypeError),
    Row("before the first voxel", {"point_vox": (-1, 2, 3)}, "point_vox"),
    Row("behind the last voxel", {"point_vox": (90, 2, 3)}, "point_vox"),
    Row("a huge number", {"point_vox": (1e300, 2, 3)}, "point_vox"),
    Row("outside in mm", {"point_mm": (-1, 0, 0)}, "point_mm"),
    Row(
        "the same voxel inside and outside",
        {"point_vox": (22, 40, 36), "positive": False},
        "(22, 40, 36)",
    ),
]

# Arguments of `mask_prompt` on GRID.
MASKS = [
    Row("mask of another shape", {"mask": np.ones((4, 6, 7))}, "(4, 6, 7)"),
    Row("a volume", {"mask": Volume(GRID, AFFINE)}, "mask", TypeError),
    Row("empty mask", {"mask": np.zeros((5, 6, 7))}, "mask"),
    Row("NaN", {"mask": with_one(np.nan)}, "mask"),
]


def nifti(change: Callable[[bytearray], bytes], name: str = "in.nii") -> Callable[[Path], Path]:
    """A damaged copy of a good file."""

    def make(folder: Path) -> Path:
        nib.save(nib.Nifti1Image(balls(), AFFINE), folder / "good.nii")
        (folder / name).write_bytes(change(bytearray((folder / "good.nii").read_bytes())))
        (folder / "good.nii").unlink()
        return folder / name

    return make


def patched(offset: int, values: list[float], kind: str) -> Callable[[bytearray], bytes]:
    """Overwrites numbers of the header."""

    def change(content: bytearray) -> bytes:
        data = np.array(values, dtype=kind).tobytes()
        content[offset : offset + len(data)] = data
        return bytes(content)

    return change


def array_file(array: np.ndarray, affine: np.ndarray = AFFINE) -> Callable[[Path], Path]:
    """A file of an array, as it is."""

    def make(folder: Path) -> Path:
        nib.save(nib.Nifti1Image(array, affine), folder / "in.nii.gz")
        return folder / "in.nii.gz"

    return make


DIM, VOX_OFFSET = 42, 108  # bytes into a NIfTI header

# Files, given to `sammed3d segment` with a click on voxel (1, 2, 3). What else makes a file bad is
# tested in tests/data.
FILES = [
    Row("four dimensions, two of them", array_file(np.stack([GRID, GRID], -1)), "channel"),
    Row("NaN", array_file(with_one(np.nan)), "in.nii.gz"),
    Row(
        "a header of 30000 x 30000 x 30000 voxels",
        nifti(patched(DIM, [30000] * 3, "<i2")),
        "30000",
    ),
    Row("data beyond the end", nifti(patched(VOX_OFFSET, [1e9], "<f4")), "in.nii"),
    Row(
        "a gzip file that was cut",
        nifti(lambda c: gzip.compress(bytes(c))[:-99], "in.nii.gz"),
        "in.nii.gz",
    ),
    Row("no file", lambda folder: folder / "in.nii.gz", "in.nii.gz"),
]


def existing(folder: Path) -> None:
    (folder / "out.nii.gz").write_text("precious")


def linked(folder: Path) -> None:
    (folder / "out.nii.gz").symlink_to(folder / "in.nii.gz")


def unrelated(folder: Path) -> None:
    (folder / "fig.png").write_text("precious")
    (folder / "web.pth").write_text("<html>")
    (folder / "list.json").write_text('{"clicks": [{"point_vox": [1, 2, 300]}]}')
    (folder / "folder.nii.gz").mkdir()


TINY = " --variant tiny --random"
POINT = "in.nii.gz out.nii.gz --point 22,40,36"
# Words after `sammed3d segment`, run where in.nii.gz holds the balls, beside files of `unrelated`.
COMMANDS = [
    Row("nothing clicked", "in.nii.gz out.nii.gz", "--point"),
    Row("a negative point only", "in.nii.gz out.nii.gz --negative 1,2,3", "'object'"),
    Row("an object without a name", "in.nii.gz out.nii.gz --object= --point 22,40,36", "object"),
    Row("a point outside", "in.nii.gz out.nii.gz --point 90,2,3", "point_vox"),
    Row("a point outside in mm", "in.nii.gz out.nii.gz --mm --point=-9,0,0", "point_mm"),
    Row("two numbers", "in.nii.gz out.nii.gz --point 1,2", "--point"),
    Row("text for a number", "in.nii.gz out.nii.gz --point a,b,c", "--point"),
    Row("NaN for a number", "in.nii.gz out.nii.gz --point 1,2,nan", "point_vox"),
    Row("a contradiction", POINT + " --negative 22,40,36", "(22, 40, 36)"),
    Row("a click list that is not there", POINT + " --points no.json", "no.json"),
    Row("a click list of no such kind", POINT + " --points fig.png", "fig.png"),
    Row("a click list outside", POINT + " --points list.json", "point_vox"),
    Row("a channel that is not there", POINT + " --channel 1", "channel"),
    Row("an unknown format for the output", "in.nii.gz out.tif --point 22,40,36", "out.tif"),
    Row("DICOM-SEG of a NIfTI", "in.nii.gz out.dcm --point 22,40,36", "out.dcm"),
    Row("a series of a NIfTI", POINT + " --series 1.2", "in.nii.gz"),
    Row("a folder for the output", "in.nii.gz folder.nii.gz --point 22,40,36", "folder.nii.gz"),
    Row("the input for the output", "in.nii.gz in.nii.gz --force --point 22,40,36", "in.nii.gz"),
    Row("a figure that exists", POINT + " --png fig.png", "fig.png"),
    Row("no .png name for the figure", POINT + " --png fig.jpg", "fig.jpg"),
    Row("one name for two outputs", POINT + " --save-clicks out.nii.gz", "out.nii.gz"),
    Row("a cache that is a file", POINT + " --cache fig.png", "fig.png"),
    Row("a modality of no such kind", POINT + " --modality pet", "--modality"),
    Row("weights that are not there", POINT + " --weights no.pth", "no.pth"),
    Row("weights that are a web page", POINT + " --weights web.pth", "web.pth"),
    Row("a variant of no such name", POINT + " --variant huge", "'huge'"),
    Row("a device that is not there", POINT + TINY + " --device cuda:99", "--device"),
]
# Files that are in the way, and how.
IN_THE_WAY = [
    Row("an output that exists", (existing, POINT), "out.nii.gz"),
    Row("an output that is a link to the input", (linked, POINT + " --force"), "out.nii.gz"),
]


def placed(qform: np.ndarray | None, sform: np.ndarray | None) -> Volume:
    """The balls with these two affines in their header."""
    image = nib.Nifti1Image(balls(), AFFINE)
    image.set_qform(qform, code=int(qform is not None))
    image.set_sform(sform, code=int(sform is not None))
    return Volume(balls(), AFFINE, image.header)


# Volumes and a click: segmented, with a note.
NOTES = [
    Row("no place in the header", (placed(None, None), {}), "left"),
    Row("qform against sform", (placed(AFFINE, 2 * AFFINE), {}), "qform"),
    Row("HU without modality", (np.where(balls() > 50, 800, -900), {}), "modality"),
    Row("no value below 0 in CT", (balls(), {"modality": "ct"}), "modality"),
    Row("no value above 0", (balls() - 500.0, {}), "0"),
    Row("three slices", (balls()[:, :, 34:37], {}), "3"),
    Row("one slice", (balls()[:, :, 36:37], {}), "1"),
    Row("a click into padding", (balls(), {"point": (5, 5, 5)}), "(5, 5, 5)"),
    Row("a click on nothing", (balls(), {"point": (5, 5, 5)}), "click"),
]


def noted(given: tuple[np.ndarray | Volume, dict[str, Any]]) -> str:
    """The notes on a volume of `NOTES`."""
    volume, how = given
    point = how.get("point", (22, 40, volume.shape[2] // 2))
    predictor = Predictor(StandIn(), preprocessing=SAM_MED3D, follow=False)
    found = segment_known(predictor, volume, [point], affine=AFFINE, modality=how.get("modality"))
    return " / ".join(found["object"].notes)


def segment(folder: Path, words: str, *, known: bool = True) -> tuple[int, str]:
    """Exit code and last message of `sammed3d segment`, run in a folder."""
    errors = io.StringIO()
    stand_in = mock.patch("sammed3d_backbone.sam", return_value=StandIn())
    before = Path.cwd()
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, before)
        os.chdir(folder)
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if known:
            stack.enter_context(stand_in)
        try:
            code = main(["segment", *words.split()])
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
    return code, (errors.getvalue().strip().splitlines() or [""])[-1]


def run_file(row: Row, folder: Path) -> tuple[int, str]:
    """The command on a bad file."""
    name = row.given(folder).name
    return segment(folder, f"{name} out.nii.gz --point 1,2,3")


def run_command(row: Row, folder: Path) -> tuple[int, str]:
    """A bad command on a good file."""
    nib.save(nib.Nifti1Image(balls(), AFFINE), folder / "in.nii.gz")
    if isinstance(row.given, str):
        unrelated(folder)
        words = row.given
    else:
        prepare, words = row.given
        prepare(folder)
    known = "--weights" not in words and "--variant" not in words
    return segment(folder, words, known=known)
