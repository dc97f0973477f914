"""Models with known answers for the click benchmark, and a small data set."""

import json
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np

from sammed3d_backbone.clickbench.bench import run_benchmark
from sammed3d_backbone.clickbench.cases import read_click_set
from sammed3d_backbone.clickbench.journal import Journal
from sammed3d_backbone.clickbench.presets import RULES

SHORT = replace(RULES["clickbench/1"], steps=3)  # scoring takes a tenth of a second


def box(shape, start, side):
    mask = np.zeros(shape, bool)
    sides = (side,) * 3 if isinstance(side, int) else side
    mask[tuple(slice(s, s + n) for s, n in zip(start, sides, strict=True))] = True
    return mask


class Standin:
    """Base class: stores its volume and clicks."""

    def __init__(self):
        self.volumes = 0

    def set_volume(self, volume, *, modality=None):
        self.volume, self.modality = volume, modality
        self.volumes += 1

    def reset(self):
        self.clicks = []

    def click(self, point_vox, positive=True):
        self.clicks.append((point_vox, positive))

    def predict(self):
        return SimpleNamespace(mask=self.mask())


class Sphere(Standin):
    """A ball around every positive click, without those around negative ones."""

    def __init__(self, radius_mm=3.0):
        super().__init__()
        self.radius_mm = radius_mm

    def mask(self):
        mask = np.zeros(self.volume.shape, bool)
        reach = np.ceil(self.radius_mm / np.array(self.volume.spacing_mm)).astype(int)
        for point_vox, positive in self.clicks:
            near = np.indices(2 * reach + 1).reshape(3, -1) - reach[:, None]
            near = near[
                :, np.linalg.norm(self.volume.affine[:3, :3] @ near, axis=0) <= self.radius_mm
            ]
            voxels = near + np.array(point_vox)[:, None]
            inside = ((voxels >= 0) & (voxels < np.array(mask.shape)[:, None])).all(0)
            mask[tuple(voxels[:, inside])] = positive
        return mask


class Fixed(Standin):
    """Returns given masks, one per click, the last one from then on."""

    def __init__(self, *masks):
        super().__init__()
        self.masks = masks

    def mask(self):
        return self.masks[min(len(self.clicks), len(self.masks)) - 1]


class Broken(Sphere):
    """Raises at its second prediction after every reset."""

    def mask(self):
        if len(self.clicks) == 2:
            raise RuntimeError("out of memory")
        return super().mask()


class Flickering(Sphere):
    """Finds the object in every second axial slice only."""

    def mask(self):
        mask = super().mask()
        mask[:, :, ::2] = False
        return mask


def made_set(folder):
    """Two volumes of two classes, one of them too small, in a new folder with a labels.json."""
    folder.mkdir()
    entries = []
    for number in (1, 2):
        labels = np.zeros((16, 14, 12), np.uint8)
        labels[3 : 8 + number, 3:9, 3:9] = 7
        labels[14, 12, 10] = 9
        image = np.random.default_rng(number).normal(100 * (labels == 7), 10)
        affine = np.diag([-1.0, 1.0, 2.0, 1.0])
        for name, array in ((f"v{number}", image.astype(np.float32)), (f"v{number}_seg", labels)):
            nib.save(nib.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
        entries.append(
            {
                "image": f"v{number}.nii.gz",
                "label": f"v{number}_seg.nii.gz",
                "modality": "CT",
                "mask": "model",
                "labels": {"7": "block", "9": "dot"},
            }
        )
    (folder / "labels.json").write_text(json.dumps(entries))
    return folder


def played_into(out, model, data, rules=SHORT, /, **header):
    """Runs a protocol on a folder of volumes; resumes where `out` has results."""
    journal = Journal(out, {"protocol": rules.name, **header}, rules.steps)
    run_benchmark(model, rules, read_click_set(data), journal, rules.tracks)
    return out
