"""Memory of long sessions and of large scans.

    python -m tests.checks.memory flat            # 2,000 predictions, 10 minutes
    python -m tests.checks.memory large           # a CT of 512 x 512 x 1000 voxels, 30 minutes
    python -m tests.checks.memory large predict   # one command of it

`flat` prints the resident memory after every 200 predictions of the predictor and of a fine-tuned
network, each on volumes of its own. `large` runs commands on a synthetic CT of the trunk, 0.8 x 0.8
x 1 mm, with 13 classes, and prints the largest resident memory of each; 4 GiB are allowed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from sammed3d_backbone import Predictor, Segmenter, sam
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import build_network
from sammed3d_backbone.provenance import resident_bytes

ALLOWED_GIB = 4.0
CLASSES = 13
PREDICTIONS, EVERY = 2000, 200
SHAPE, SPACING_MM = (512, 512, 1000), (0.8, 0.8, 1.0)
CLI = """
import sys
from sammed3d_backbone.cli import main
from sammed3d_backbone.provenance import resident_bytes
code = main()
print(resident_bytes("VmHWM"))
sys.exit(code)
"""
COMMANDS = {
    "segment": "segment ct/imagesTr/ct_0000.nii out.nii.gz --variant tiny --point 256,200,500",
    "features": "features ct/imagesTr/ct_0000.nii out.safetensors --variant tiny",
    "predict": "predict model.safetensors ct/imagesTr/ct_0000.nii labels.nii.gz",
    "curate": "curate ct out",
}


def fine_tuned(classes: int, crop_vox: int, overlap: float) -> Segmenter:
    """A UNETR on the smallest encoder, with random initialisation."""
    torch.manual_seed(0)
    card = Card(
        network="unetr",
        encoder={"variant": "tiny", "in_chans": 1, "img_size": crop_vox},
        adapter={"feature_size": 8},
        labels={k: f"class {k}" if k else "background" for k in range(classes + 1)},
        channels=("CT",),
        preprocessing=Preprocessing((1.5, 1.5, 1.5), {"default": "ct"}, "volume", (crop_vox,) * 3),
        overlap=overlap,
    )
    return Segmenter(build_network(card).eval(), card)


def flat() -> bool:
    """Whether the memory after all predictions is that after the first tenth of them."""
    rng, held = np.random.default_rng(0), []
    predictor, segmenter = Predictor(sam("tiny")), fine_tuned(2, 32, 0.0)
    for number in range(1, PREDICTIONS + 1):
        array = rng.normal(100, 30, (40, 40, 40)).astype(np.float32)
        if number % 2:
            predictor.set_volume(array, np.diag([1.5, 1.5, 1.5, 1]))
            predictor.click((20, 20, 20))
            predictor.predict()
        else:
            segmenter.predict(Volume(array, np.eye(4)))
        if number % EVERY == 0:
            held.append(resident_bytes("VmRSS") / 2**20)
            print(f"{number} predictions: {held[-1]:.0f} MiB", flush=True)
    return held[-1] < 1.05 * held[0]


def write_large(folder: Path) -> None:
    """A CT of the trunk with noise, and boxes as organs."""
    rng = np.random.default_rng(0)
    x, y, z = SHAPE
    body = ((np.arange(x) / x - 0.5) ** 2 / 0.2)[:, None] + (np.arange(y) / y - 0.5) ** 2 / 0.1 < 1
    noise = rng.normal(0, 20, (x, y)).astype(np.int16)
    image = np.empty(SHAPE, np.int16, order="F")
    for k in range(z):
        image[:, :, k] = np.where(body, np.roll(noise, k, axis=k % 2) + 40, -1000)
    label = np.zeros(SHAPE, np.uint8, order="F")
    for value in range(1, CLASSES + 1):
        i, j = 120 + 60 * (value % 4), 160 + 50 * (value // 4)
        label[i : i + 50, j : j + 45, 30 : 100 + 60 * value] = value
    image += label.astype(np.int16) * 8
    affine = np.diag([*SPACING_MM, 1.0])
    for path, array in (("imagesTr/ct_0000.nii", image), ("labelsTr/ct.nii", label)):
        (folder / path).parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(array, affine), folder / path)
    names = {"background": 0, **{f"organ {v}": v for v in range(1, CLASSES + 1)}}
    info = {"channel_names": {"0": "CT"}, "labels": names, "file_ending": ".nii"}
    (folder / "dataset.json").write_text(json.dumps(info))


def large(names: list[str]) -> bool:
    """Whether every command stays within what is allowed."""
    is_within = True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_large(folder / "ct")
        fine_tuned(CLASSES, 64, 0.25).save(folder / "model.safetensors")
        for name in names:
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-c", CLI, *COMMANDS[name].split()],
                cwd=folder,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                text=True,
                check=False,
            )
            *said, peak = done.stdout.splitlines()
            gib, took = int(peak) / 2**30, time.monotonic() - began
            is_within &= gib < ALLOWED_GIB and done.returncode == 0
            shown = f"{name}: {gib:.2f} GiB, {took:.0f} s, exit code {done.returncode}"
            print(shown, said[-1:], flush=True)
    return is_within


if __name__ == "__main__":
    kind, *chosen = sys.argv[1:]
    sys.exit(not (flat() if kind == "flat" else large(chosen or [*COMMANDS])))
