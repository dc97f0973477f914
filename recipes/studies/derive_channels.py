"""A data set of two channels from one of one: each image, and how steep its grey values are.

    python recipes/studies/derive_channels.py FOLDER OUT

The second channel is the length of the gradient at a scale of one voxel. It holds nothing that the
first does not, so what is gained by it is what an encoder makes of channels, not new information.
OUT has the Decathlon's layout, with labels and folds of FOLDER.
"""

import argparse
import json
import sys
from pathlib import Path
from shutil import copyfile

import numpy as np
from scipy.ndimage import gaussian_gradient_magnitude

from sammed3d_backbone import console
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import write_text

SCALE_VOX = 1.0


def derive_channels(folder: Path, out: Path) -> None:
    """Writes the data set; dataset.json comes last, so a folder that has it is complete.

    Raises:
        ValueError: If the data set has several channels already.
    """
    info = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    for entry in info["training"]:
        image = Volume.load(folder / entry["image"])
        if image.channels != 1:
            raise ValueError(f"{entry['image']} has {image.channels} channels; give a set of one")
        steepness = gaussian_gradient_magnitude(image.array, SCALE_VOX)
        Volume(np.stack([image.array, steepness]), image.affine).save(out / entry["image"])
        (out / entry["label"]).parent.mkdir(parents=True, exist_ok=True)
        copyfile(folder / entry["label"], out / entry["label"])
    if (folder / "splits.json").is_file():
        copyfile(folder / "splits.json", out / "splits.json")
    info["name"] = f"{info['name']}, two channels"
    info["note"] = f"the second channel is the gradient's length at {SCALE_VOX} voxel of the first"
    info["modality"]["1"] = f"gradient of {info['modality']['0']}"
    write_text(out / "dataset.json", json.dumps(info, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    sys.exit(
        console.run_program(lambda: derive_channels(given.folder, given.out), "derive_channels")
    )
