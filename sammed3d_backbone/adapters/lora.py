"""LoRA: trainable low-rank updates of an encoder's frozen linear layers.

The layers are peft's, an extra: ``pip install sammed3d-backbone[peft]``. Trained updates can be
merged into the weights, so a trained network needs no peft.

Source: Hu et al., LoRA: low-rank adaptation of large language models, ICLR 2022.
"""

import copy
import re

from torch import nn

BLOCKS = r"(.*\.)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])"


def add_lora(encoder: nn.Module, *, rank: int, targets: str = BLOCKS) -> None:
    """Adds low-rank updates, initialised to zero, to the chosen layers and freezes the encoder.

    With rank r, a layer of A inputs and B outputs trains r * (A + B) parameters instead of A * B.

    Args:
        encoder: Changed in place.
        rank: Rank of the updates.
        targets: Regular expression that the whole name of a linear layer matches; by default
            attention's two and the MLP's two of every block.

    Raises:
        ValueError: If the rank is not positive, or no linear layer is called so.
        ModuleNotFoundError: If peft is not installed.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: expected 1 or more")
    linear = [name for name, part in encoder.named_modules() if isinstance(part, nn.Linear)]
    if not any(re.fullmatch(targets, name) for name in linear):
        names = ", ".join(linear[:4]) or "none"
        raise ValueError(
            f"targets={targets!r} matches no linear layer of {type(encoder).__name__}, whose "
            f"{len(linear)} are called {names} and so on; give a regular expression of whole names"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model  # loads all of transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "LoRA needs peft, which is not installed; pip install 'sammed3d_backbone[peft]'"
        ) from None
    # Equal numbers make the factor on the changes 1, whatever the rank.
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), encoder)


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy with LoRA updates merged into plain layers; the model itself if there are none."""
    # Identified by an attribute, so that peft is not imported.
    found = [name for name, part in model.named_modules() if hasattr(part, "lora_A")]
    if not found:
        return model
    plain = copy.deepcopy(model)
    for name in found:
        layer = plain.get_submodule(name)
        layer.merge()  # type: ignore[operator]  # peft's
        plain.set_submodule(name, layer.get_base_layer())  # type: ignore[operator]
    return plain
