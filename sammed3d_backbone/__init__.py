"""SAM-Med3D as a backbone for 3-D medical image networks, and as a promptable model.

`encoder()` builds its image encoder with trained values, `sam()` the whole network,
`list_weights()` names the values that are known; the adapters that put the encoder into MONAI
networks are in `sammed3d_backbone.adapters`.
"""

from sammed3d_backbone.loading.factory import encoder, list_weights, sam

__version__ = "0.1.0.dev0"

__all__ = ["__version__", "encoder", "list_weights", "sam"]
