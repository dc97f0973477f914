"""The networks around an encoder, by name: a new decoder is a module of this folder and one entry.

Each entry is a function `name(encoder, out_channels, **options)` in the module that it names. The
recipes, the card of a fine-tuned model and the checks read everything else from its signature.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

ADAPTERS = {
    "unetr": "unetr",
    "class_prompts": "class_prompts",
    "flexible_unet": "flexible_unet",
    "segresnet": "segresnet",
    "linear_head": "heads",
    "expanding_head": "heads",
}


def adapter(name: str) -> Callable[..., nn.Module]:
    """The function that builds a network from an encoder and the number of classes.

    Raises:
        ValueError: If there is no such network.
    """
    if name not in ADAPTERS:
        near = difflib.get_close_matches(name, ADAPTERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown network {name!r}: expected one of {', '.join(ADAPTERS)}{hint}")
    module = importlib.import_module(f"sammed3d_backbone.adapters.{ADAPTERS[name]}")
    build: Callable[..., nn.Module] = getattr(module, name)
    return build


def accepted_options(name: str, **options: object) -> dict[str, Any]:
    """The subset of options that a network's function accepts."""
    known = inspect.signature(adapter(name)).parameters
    return {key: value for key, value in options.items() if key in known}
