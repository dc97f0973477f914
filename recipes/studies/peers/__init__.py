"""nnU-Net and other peers beside the planned recipe, at equal CPU time."""
