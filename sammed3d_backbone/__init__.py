"""SAM-Med3D as a backbone for 3-D medical image networks, and as a promptable model.

The public names are imported on first use, so that importing the package is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sammed3d_backbone.adapters.class_prompts import class_prompts
    from sammed3d_backbone.adapters.flexible_unet import flexible_unet
    from sammed3d_backbone.adapters.pyramid import pyramid
    from sammed3d_backbone.adapters.segresnet import segresnet
    from sammed3d_backbone.adapters.unetr import unetr
    from sammed3d_backbone.data.volume import Volume
    from sammed3d_backbone.inference.interactive.predictor import Predictor
    from sammed3d_backbone.inference.segmenter import Segmenter
    from sammed3d_backbone.loading.factory import encoder, sam
    from sammed3d_backbone.loading.registry import list_weights
    from sammed3d_backbone.loading.variants import list_variants

__version__ = "0.1.0.dev0"

__all__ = [
    "Predictor",
    "Segmenter",
    "Volume",
    "class_prompts",
    "encoder",
    "flexible_unet",
    "list_variants",
    "list_weights",
    "pyramid",
    "sam",
    "segresnet",
    "unetr",
]

_HOMES = {
    "Predictor": "inference.interactive.predictor",
    "Segmenter": "inference.segmenter",
    "Volume": "data.volume",
    "class_prompts": "adapters.class_prompts",
    "encoder": "loading.factory",
    "flexible_unet": "adapters.flexible_unet",
    "list_variants": "loading.variants",
    "list_weights": "loading.registry",
    "pyramid": "adapters.pyramid",
    "sam": "loading.factory",
    "segresnet": "adapters.segresnet",
    "unetr": "adapters.unetr",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith(__name__):
            raise
        raise ModuleNotFoundError(
            f"sammed3d_backbone.{name} needs {error.name!r}, which is not installed; run "
            "`pip install sammed3d-backbone`, or `pip install -e .` in a checkout",
            name=error.name,
        ) from error
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
