"""A data set of boxes in the layout of the Medical Segmentation Decathlon."""

import json
from pathlib import Path

import numpy as np

from sammed3d_backbone.data.volume import Volume


def write_boxes(folder: Path, *, cases: int = 6, partly: bool = False) -> None:
    """Turned volumes with a bright front and a dim back, in the Decathlon's layout.

    Args:
        folder: Gets the data set.
        cases: Their number.
        partly: Whether the back is not annotated in every other case.
    """
    rng = np.random.default_rng(0)
    affine = np.array([[0, 0, -1.0, 0], [-1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])  # PSL
    entries = []
    for number in range(cases):
        name = f"case_{number}.nii.gz"
        labels = np.zeros((22, 18, 17), np.uint8)
        start = rng.integers(3, 6)
        labels[start : start + 7, 5:12, 5:12] = 1
        labels[start + 7 : start + 13, 5:12, 5:12] = 2
        image = rng.normal(100, 5, labels.shape) + 60 * (labels == 1) + 30 * (labels == 2)
        if partly and number % 2:
            labels[labels == 2] = 0
        Volume(image.astype(np.float32), affine).save(folder / "imagesTr" / name)
        Volume(labels, affine).save(folder / "labelsTr" / name)
        entry: dict[str, object] = {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"}
        if partly:
            entry["annotated"] = ["front"] if number % 2 else ["front", "back"]
        entries.append(entry)
    info = {
        "name": "Toy",
        "note": "made of boxes",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "front", "2": "back"},
        "training": entries,
    }
    (folder / "dataset.json").write_text(json.dumps(info))
