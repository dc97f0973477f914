"""Raw data sets -> clean binary masks, with a record of every decision.

The cleaning of SA-Med3D-140K: one grid per pair, left and right apart and on their sides, islands
removed, small masks and (optionally) mostly empty volumes removed. `sources` finds the cases,
`rules` holds the limits, `sides` checks left and right, `cases` cleans a case, `runs` all cases.

Each mask is judged as it would be delivered: sides and islands come before size and background,
although the paper numbers them after. The other order would keep a mask that is large enough by its
debris only, or a pair whose halves are too small.

Source: Wang et al., SAM-Med3D, section 3.2.
"""
