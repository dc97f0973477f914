"""Raw folders with one case per decision of the rules."""

import json

import numpy as np
import pytest
from blocks import SHAPE


@pytest.fixture
def raw(tmp_path, write_volume):
    """Writes a labels.json below raw/ with one volume per given label."""

    def write(names, place="set", affine=None, **labels):
        affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
        entries = []
        for seed, (case, array) in enumerate(labels.items()):
            image, label = f"{case}.nii.gz", f"{case}_seg.nii.gz"
            write_volume(f"raw/{place}/{image}", shape=SHAPE, affine=affine, seed=seed)
            write_volume(f"raw/{place}/{label}", array, affine=affine)
            entries.append(
                {
                    "image": image,
                    "label": label,
                    "modality": "CT",
                    "mask": "manual",
                    "labels": {str(value): name for value, name in names.items()},
                }
            )
        (tmp_path / "raw" / place / "labels.json").write_text(json.dumps(entries))
        return tmp_path / "raw"

    return write
