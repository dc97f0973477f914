"""Small inputs, and the programs run in this process."""

import contextlib
import io
import json
import logging
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
from sammed3d_backbone.recipes import evaluate, finetune_unetr

from sammed3d_backbone import config, console
from sammed3d_backbone.cli import main

SHAPE = (12, 10, 9)


def run(call):
    """The exit code, and all that was printed or logged."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = call()
            except SystemExit as end:
                code = end.code
    finally:
        logging.getLogger().removeHandler(handler)
    return code, said.getvalue()


def cli(*arguments):
    """The command `sammed3d`."""
    return run(lambda: main([str(argument) for argument in arguments]))


def segment(*arguments):
    """`sammed3d segment` with the weights in the package."""
    return cli("segment", *arguments, "--variant", "tiny")


def tune(data, *arguments, **changes):
    """The fine-tuning recipe, four steps of a small network."""
    knobs = {
        "name": "toy",
        "data": str(Path(data).absolute()),
        "folds": 3,
        "scratch": True,
        "feature_size": 4,
        "crop_vox": 16,
        "spacing_mm": [0, 0, 0],
        "steps": 4,
        "validate_every": 2,
        "warmup_steps": 1,
        "threads": 1,
        "cpu": True,
        **changes,
    }
    Path("toy.yaml").write_text(json.dumps(knobs))

    def recipe():
        cfg, flags = config.parse(
            finetune_unetr.Config, ["toy.yaml", *arguments], flags={"dry_run": ""}
        )
        return console.run_program(lambda: finetune_unetr.main(cfg, **flags), "finetune_unetr")

    return run(recipe)


def score(monkeypatch, *arguments):
    """recipes/evaluate.py."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    return run(evaluate.main)


def nifti(path, array, affine=None):
    """Writes a NIfTI file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def patched(path, offset, form, *values):
    """Overwrites bytes of a file."""
    content = bytearray(Path(path).read_bytes())
    struct.pack_into(form, content, offset, *values)
    Path(path).write_bytes(content)
    return path


def label(shape=SHAPE):
    """Two blocks."""
    array = np.zeros(shape, np.uint8)
    z = slice(2, 6) if shape[2] > 6 else slice(None)
    array[2:5, 2:6, z], array[6:9, 2:6, z] = 1, 2
    return array


def image(seed, shape=SHAPE):
    """Noise in which the blocks are bright."""
    noise = np.random.default_rng(seed).normal(100, 20, shape)
    return (noise + 60 * label(shape)).astype(np.float32)


def nnunet(folder, n=6, channels=1, ending=".nii.gz", affine=None, shape=SHAPE, **info):
    """A small nnU-Net raw folder; keyword arguments win over its dataset.json."""
    folder = Path(folder)
    for i in range(n):
        for channel in range(channels):
            path = folder / f"imagesTr/case_{i}_{channel:04d}{ending}"
            nifti(path, image(i + 10 * channel, shape), affine)
        nifti(folder / f"labelsTr/case_{i}{ending}", label(shape), affine)
    written = {
        "channel_names": {str(c): f"MR{c}" for c in range(channels)},
        "labels": {"background": 0, "head": 1, "tail": 2},
        "numTraining": n,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(written | info))
    return folder


def ball(path="scan.nii.gz", n=40, affine=None):
    """A bright ball in the middle of a cube."""
    i, j, k = (axis - n // 2 for axis in np.ogrid[:n, :n, :n])
    array = np.where(i**2 + j**2 + k**2 < 100, 200, 50).astype(np.int16)
    return nifti(path, array, np.diag([1.5, 1.5, 1.5, 1]) if affine is None else affine)
