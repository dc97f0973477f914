"""The SAM-Med3D image encoder as a backbone for 3-D medical image networks.

`encoder()` builds it with trained values, `list_weights()` names those that are known; the
adapters that put it into MONAI networks are in `sammed3d_backbone.adapters`.
"""

from sammed3d_backbone.factory import encoder, list_weights

__version__ = "0.1.0.dev0"

__all__ = ["__version__", "encoder", "list_weights"]
