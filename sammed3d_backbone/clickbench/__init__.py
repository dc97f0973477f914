"""A benchmark of models that segment by clicks.

`cases` lists the objects of a data set, `protocol` plays them with any model that has
``set_volume``, ``click``, ``predict`` and ``reset``, `presets` has the rules (``clickbench/1`` and
published ones), `scoring` scores every prediction, `bench` runs a whole set, `journal` writes and
resumes it, `summary` and `report` make tables, comparisons and a page.

``clickbench/1``, reproducible from this text:

1. A target is a class of a case, or with ``--instances`` a 26-connected part of one. Targets of
   fewer than 27 voxels are left out and listed.
2. The model gets the whole volume as it is stored, with its affine. Nothing is cropped by the
   truth.
3. First click, in two tracks that are never mixed. *centre*: the deepest voxel of the target's
   largest part; depth is the distance in mm to the nearest voxel outside, beyond the volume is
   outside. *random*: a voxel of the target, each as likely: Philox keyed with the first 16 bytes,
   big-endian, of sha256("dataset|case|class|first"); of n voxels in the order of R, A, S, the one
   numbered ``first 64-bit number * n >> 64``.
4. Next click: the deepest voxel of the largest 26-connected error, missed and extra voxels apart.
   Ties, depths within 1e-6 included: missed before extra, then the first in the order of R, A, S. A
   voxel that was clicked before with the same label gives way to the next deepest, then to the next
   error, and the line says ``repeat``. Without errors the last answer is carried forward.
5. Ten steps, all of them stored. The mask is the model's own, on the volume's grid: probabilities
   resampled linearly and thresholded at 0.5, unless stated otherwise.
6. Figures as in `scoring` and `summary`. An exception of the model counts as an empty mask; a model
   with a time limit raises ``TimeoutError``.
7. Two runs write identical ``clicks.jsonl``; times lie in a file of their own.
"""
