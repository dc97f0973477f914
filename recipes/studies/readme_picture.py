"""Draw the picture of the README: a CT, one click, the mask, and the encoder's features.

    python recipes/studies/readme_picture.py headneck_ct openkbp_022 Mandible examples/picture.png

The click lies at the deepest voxel of the reference. Colours are the first three principal
components of the last block's tokens, in the 128 mm cube around the click.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sammed3d_backbone.recipes.studies.tables import new_figure
from scipy import ndimage
from sklearn.decomposition import PCA

from sammed3d_backbone import console, sam
from sammed3d_backbone.data.folders import open_dataset
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor

SIDE_VOX, SPACING_MM = 64, 2.0
PATCH_VOX = 8
SHIFTS_VOX = (-4, 0)  # two passes per axis of the plane halve the distance of the tokens


def cube(volume: Volume, centre_mm: NDArray[np.float64]) -> NDArray[np.float32]:
    """The 64 x 64 x 64 voxels of 2 mm around a point, axes towards R, A, S."""
    offsets = (np.indices((SIDE_VOX,) * 3) - (SIDE_VOX - 1) / 2) * SPACING_MM
    places = offsets.reshape(3, -1) + centre_mm[:, None]
    inverse = np.linalg.inv(volume.affine)
    voxels = inverse[:3, :3] @ places + inverse[:3, 3:]
    values = ndimage.map_coordinates(volume.array.astype(np.float32), voxels, order=1, cval=-1000)
    return values.reshape((SIDE_VOX,) * 3)


@torch.no_grad()
def colours(encoder: torch.nn.Module, image: Volume, centre_mm: NDArray[np.float64]) -> NDArray:
    """Principal components of the axial layer of tokens through the middle, (16, 16, 3)."""
    tokens = np.zeros((16, 16, encoder.embed_dim))
    for i, dx in enumerate(SHIFTS_VOX):
        for j, dy in enumerate(SHIFTS_VOX):
            shift = np.array([dx + 2, dy + 2, PATCH_VOX / 2]) * SPACING_MM
            crop = cube(image, centre_mm + shift).clip(-1000, 1000)
            crop = (crop - crop.mean()) / crop.std()
            (found,) = encoder.forward_intermediates(
                torch.from_numpy(crop)[None, None], indices=[11], intermediates_only=True
            )
            tokens[i::2, j::2] = found[0, :, :, :, 4].permute(1, 2, 0)
    flat = tokens.reshape(-1, tokens.shape[-1])
    parts = PCA(3).fit_transform((flat - flat.mean(0)) / flat.std(0))
    low, high = np.percentile(parts, [2, 98], axis=0)
    return ((parts - low) / (high - low)).clip(0, 1).reshape(16, 16, 3)


def main(data: str, case_id: str, name: str, out: Path) -> None:
    """Predicts and draws."""
    dataset = open_dataset(data)
    case = next(case for case in dataset.cases if case.id == case_id)
    image, label = (Volume.load(path) for path in (case.images[0], case.label))
    reference = label.array == next(k for k, v in dataset.labels.items() if v == name)
    depth = ndimage.distance_transform_edt(reference, label.spacing_mm)
    click = tuple(int(i) for i in np.unravel_index(depth.argmax(), depth.shape))
    network = sam("tiny")
    predictor = Predictor(network)
    predictor.set_volume(image, modality="ct")
    predictor.click(click)
    mask = predictor.predict().mask
    dice = 2 * (mask & reference).sum() / (mask.sum() + reference.sum())

    centre_mm = image.affine[:3, :3] @ click + image.affine[:3, 3]
    volumes = (image, *(Volume(m.astype(np.float32), image.affine) for m in (mask, reference)))
    slices = [cube(volume, centre_mm)[:, :, SIDE_VOX // 2].T for volume in volumes]
    tokens = colours(network.image_encoder.eval(), image, centre_mm)
    figure = new_figure(9.6, 3.5)
    titles = ("one click", f"mask, Dice {100 * dice:.0f} %", "encoder features")
    for axes, title in zip(figure.subplots(1, 3), titles, strict=True):
        axes.imshow(slices[0], cmap="gray", vmin=-200, vmax=300, origin="lower")
        axes.set_title(title)
        axes.set_axis_off()
        if title == "encoder features":
            shown = tokens.swapaxes(0, 1)
            extent = (-0.5, SIDE_VOX - 0.5) * 2
            smooth = {"interpolation": "bilinear", "alpha": 0.75}
            axes.imshow(shown, extent=extent, origin="lower", **smooth)
        elif title != "one click":
            shown = np.ma.masked_less(slices[1], 0.5)
            axes.imshow(shown, cmap="autumn", vmin=0, vmax=1.5, alpha=0.5, origin="lower")
            axes.contour(slices[2], [0.5], colors="white", linestyles="--", linewidths=1)
        if title != "encoder features":
            axes.plot(31.5, 31.5, "+", color="#00e5ff", markersize=12, markeredgewidth=2.5)
        axes.invert_xaxis()  # the patient's right on the left, as viewers show it
        for place_x, side in ((0.03, "R"), (0.93, "L")):
            axes.text(place_x, 0.92, side, color="white", weight="bold", transform=axes.transAxes)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="data set of CT, or its name below SAMMED3D_DATA")
    parser.add_argument("case")
    parser.add_argument("organ")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    sys.exit(
        console.run_program(
            lambda: main(args.data, args.case, args.organ, args.out), "readme_picture"
        )
    )
