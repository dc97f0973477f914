"""What the encoder says about a place in the body: a volume in, a feature vector per token out.

python examples/features_of_a_volume.py [SCAN.nii.gz]
"""

import sys

import numpy as np
import torch

from sammed3d_backbone import encoder
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.data.volume import Volume

if len(sys.argv) > 1:
    scan = Volume.load(sys.argv[1])
else:  # a bright ball in a volume with thick slices, axes towards L, P, S
    i, j, k = np.ogrid[:80, :80, :24]
    ball = (i - 40) ** 2 + (j - 40) ** 2 + (4 * (k - 12)) ** 2 < 20**2
    scan = Volume(np.where(ball, 200.0, 50.0).astype(np.float32), np.diag([-1.2, -1.2, 5, 1]))

# 1.5 mm, axes towards R, A, S, z-scored, padded: what the released weights were trained on.
network = encoder("tiny").eval()
mode = {"default": "zscore_positive"}
preprocessing = Preprocessing((1.5, 1.5, 1.5), mode, "volume", network.img_size)
image, geometry = preprocessing.image(scan)

# One window around the middle; a larger volume needs several.
side = network.img_size[0]
start = [(n - side) // 2 for n in image.shape[1:]]
window = (slice(None), *(slice(s, s + side) for s in start))
with torch.inference_mode():
    final, blocks = network.forward_intermediates(image[window][None], indices=[2, 5, 8, 11])
print(f"after the neck {tuple(final.shape)}, after four blocks {tuple(blocks[0].shape)}")

# The token that holds a place given in mm.
place_mm = scan.affine @ [*(n / 2 for n in scan.shape), 1]
voxel = (np.linalg.inv(geometry.affine) @ place_mm)[:3] - start
x, y, z = np.round(voxel).astype(int) // network.patch_size
vector = blocks[-1][0, :, x, y, z]
print(f"at {np.round(place_mm[:3], 1)} mm: token ({x}, {y}, {z}), {len(vector)} numbers")
