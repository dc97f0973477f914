"""NIfTI <-> tensor: volumes, their geometry and intensity, data sets, training crops."""
