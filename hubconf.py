"""Entry points for `torch.hub.load`, from GitHub or from a checkout with source="local"."""

dependencies = ["huggingface_hub", "numpy", "safetensors", "torch"]

from sammed3d_backbone.loading.factory import encoder as sammed3d_encoder  # noqa: E402, F401
from sammed3d_backbone.loading.factory import sam as sammed3d_sam  # noqa: E402, F401
