"""What the encoder says about a place in the body: a volume in, a feature vector per token out.

python examples/features_of_a_volume.py [SCAN.nii.gz]
"""

import sys

import numpy as np

from sammed3d_backbone import encoder
from sammed3d_backbone.data.preprocessing import preprocessing_of
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.features import token_maps

if len(sys.argv) > 1:
    scan = Volume.load(sys.argv[1])
else:  # a bright ball in a volume with thick slices, axes towards L, P, S
    i, j, k = np.ogrid[:80, :80, :24]
    ball = (i - 40) ** 2 + (j - 40) ** 2 + (4 * (k - 12)) ** 2 < 20**2
    scan = Volume(np.where(ball, 200.0, 50.0).astype(np.float32), np.diag([-1.2, -1.2, 5, 1]))

# Spacing, orientation and intensities are those that the weights were trained with.
network = encoder("tiny").eval()
preprocessing, _ = preprocessing_of(network)
found = token_maps(network, scan, preprocessing, blocks=[2, 5, 8, 11])
for name, tokens in found.maps.items():
    print(f"{name}: {tuple(tokens.shape)}")

# The token that holds a place given in mm.
place_mm = scan.affine @ [*(n / 2 for n in scan.shape), 1]
x, y, z = np.round(np.linalg.inv(found.affine) @ place_mm)[:3].astype(int)
vector = found.maps["block_11"][:, x, y, z]
print(f"at {np.round(place_mm[:3], 1)} mm: token ({x}, {y}, {z}), {len(vector)} numbers")
