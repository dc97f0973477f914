"""Interactive segmentation for viewers: one session class, and a server that speaks to programs.

`sammed3d serve` answers 3D Slicer, MITK, napari and ITK-SNAP; examples/viewers.md says how.
"""

from sammed3d_backbone.serving.session import InteractiveSession

__all__ = ["InteractiveSession"]
