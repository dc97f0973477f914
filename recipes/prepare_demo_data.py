"""Write the demo's data set: a brain that installs with nilearn, cut into slabs, no download.

    python recipes/prepare_demo_data.py FOLDER

The volume is the MNI152 T1 template, an average of 152 people that is left-right symmetric by
construction; its grey- and white-matter maps give the labels. One volume cannot show how well
anything generalises, and its two halves are mirror images, so it is cut along the back-front axis
only: a slab to train on, a gap as long as a crop that is thrown away, a slab to validate on.

Source: Fonov et al., Unbiased average age-appropriate atlases for pediatric studies, NeuroImage
54:313-327, 2011 (ICBM 152 nonlinear symmetric 2009a), as packaged by nilearn.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from nilearn.datasets import (
    load_mni152_gm_template,
    load_mni152_template,
    load_mni152_wm_template,
)

from sammed3d_backbone import console
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.files import write_json

NOTE = (
    "one average, left-right symmetric brain cut into slabs: shows that the chain works, "
    "not how well it generalises"
)
GAP_MM = 48  # the demo's crop: 32 voxels of 1.5 mm
TRAIN_SHARE = 0.6  # share of the volume without the gap


def write_demo_data(folder: Path) -> None:
    """Writes the data set in the Decathlon's layout, with its one fold.

    dataset.json comes last, so a folder that has it is complete.
    """
    template = load_mni152_template(resolution=1)
    image = np.asarray(template.dataobj)
    grey, white = (
        np.asarray(load(resolution=1).dataobj)
        for load in (load_mni152_gm_template, load_mni152_wm_template)
    )
    labels = np.stack([1 - grey - white, grey, white]).argmax(0).astype(np.uint8)
    brain = np.flatnonzero(labels.any(axis=(0, 2)))  # 1 mm voxels along Y
    first, last = int(brain[0]), int(brain[-1]) + 1
    train_end = first + round((last - first - GAP_MM) * TRAIN_SHARE)
    slabs = {"back": slice(first, train_end), "front": slice(train_end + GAP_MM, last)}
    for name, slab in slabs.items():
        affine = template.affine.copy()
        affine[1, 3] += slab.start
        scaled = np.round(image[:, slab] * 1000).astype(np.int16)
        Volume(scaled, affine).save(folder / "imagesTr" / f"{name}.nii.gz")
        Volume(labels[:, slab], affine).save(folder / "labelsTr" / f"{name}.nii.gz")
    splits = {
        "rule": f"slabs along Y of one brain, {GAP_MM} mm apart",
        "folds": [{"train": ["back"], "val": ["front"]}],
    }
    description = {
        "name": "MNI152 slabs",
        "description": "Grey and white matter of the MNI152 T1 template",
        "reference": "Fonov et al., NeuroImage 54:313-327, 2011",
        "note": NOTE,
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Grey matter", "2": "White matter"},
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in slabs
        ],
    }
    for name, content in {"splits.json": splits, "dataset.json": description}.items():
        write_json(folder / name, content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    sys.exit(console.run_program(lambda: write_demo_data(folder), "prepare_demo_data"))
