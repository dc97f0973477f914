"""A click on a scan, a correction, and the mask on the scan's own grid.

python examples/click_and_get_a_mask.py [SCAN.nii.gz I J K]

The small network's weights install with the package and have seen little (weights/tiny.md); with
`sam("vit_b")` the released weights are downloaded once.
"""

import sys
import time

import numpy as np

from sammed3d_backbone import sam
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor

if len(sys.argv) > 1:
    scan, point = Volume.load(sys.argv[1]), [int(n) for n in sys.argv[2:5]]
else:  # a bright ball in a volume with thick slices, axes towards L, P, S
    i, j, k = np.ogrid[:80, :80, :24]
    ball = (i - 40) ** 2 + (j - 40) ** 2 + (4 * (k - 12)) ** 2 < 20**2
    scan = Volume(np.where(ball, 200.0, 50.0).astype(np.float32), np.diag([-1.2, -1.2, 5, 1]))
    point = [40, 40, 12]

predictor = Predictor(sam("tiny"), enforce_clicks=True, max_windows=4)
predictor.set_volume(scan)  # an array with its affine, or a path, would do too
predictor.click(point)
first = predictor.predict()
print(f"one click: {int(first.mask.sum())} voxels in {first.windows} windows")

# A correction is given in voxels or in mm, and costs the decoder only.
wrong_mm = (scan.affine @ [point[0], point[1] + 2, point[2], 1])[:3]
predictor.click(point_mm=wrong_mm, positive=False)
start = time.perf_counter()
second = predictor.predict()
seconds = time.perf_counter() - start
print(f"two clicks: {int(second.mask.sum())} voxels, in {1000 * seconds:.0f} ms")
print(f"without enforcing, {second.clicks_agreed} of {second.clicks} clicks agree with the mask")

print(f"clicks moved by up to 3 mm: Dice {predictor.stability(trials=3):.2f} with this mask")
predictor.undo()  # as often as there are clicks

assert np.array_equal(second.volume.affine, scan.affine)
for note in second.notes:
    print("note:", note)
