"""AdamW with learning rates by layer or by part.

The schedule gives one learning rate per step, and `set_lr` applies it with timm's ``lr_scale`` of
each group (which only timm's own schedulers would do). Without a scheduler object there is
no state to save, and accelerate cannot step it once too often.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal

import timm.optim
from torch import nn
from torch.optim import AdamW, Optimizer


def layer_decayed(
    model: nn.Module, *, layer_decay: float = 1.0, weight_decay: float = 0.05
) -> AdamW:
    """AdamW over the model's trainable parameters, in timm's groups; `set_lr` gives the rate.

    Args:
        model: With ``group_matcher`` and ``no_weight_decay`` as timm's models have them; without
            them, all layers have the same rate.
        layer_decay: Factor per block from the last to the first; 1 turns it off.
        weight_decay: Not applied to biases, norms and what the model's ``no_weight_decay`` names.

    Raises:
        ValueError: If layer decay is requested for a model without ``group_matcher``.
    """
    named: Any = model  # nn.Module lets any attribute be a tensor
    exempt = named.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups: list[dict[str, Any]]
    if layer_decay == 1.0:
        groups = timm.optim.param_groups_weight_decay(
            model, weight_decay, no_weight_decay_list=exempt
        )
    elif hasattr(model, "group_matcher"):
        groups = timm.optim.param_groups_layer_decay(
            model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay
        )
    else:
        raise ValueError(
            f"{type(model).__name__} has no group_matcher, which defines its layers; "
            "pass layer_decay=1"
        )
    return AdamW(groups, lr=0.0)


def part_scaled(
    network: nn.Module,
    scales: Mapping[str, float],
    *,
    weight_decay: float = 0.05,
    name: Literal["adamw", "muon"] = "adamw",
) -> Optimizer:
    """An optimiser over trainable parameters, each part of a network with its own learning rate.

    Args:
        network: A module whose children are the parts.
        scales: Name of a part -> factor on the learning rate; all parts have one.
        weight_decay: Not applied to biases, norms, embeddings and what a part's own
            ``no_weight_decay`` names.
        name: With "muon", matrices of hidden layers take Muon's steps, scaled to the size of
            AdamW's; everything else takes AdamW's.
    """
    groups: list[dict[str, Any]] = []
    for part_name, part in network.named_children():
        named: Any = part
        exempt = set(named.no_weight_decay()) if hasattr(part, "no_weight_decay") else set()
        exempt |= {
            f"{place}.weight" for place, m in part.named_modules() if isinstance(m, nn.Embedding)
        }
        groups += [
            {**group, "lr_scale": scales[part_name]}
            for group in timm.optim.param_groups_weight_decay(
                part, weight_decay, no_weight_decay_list=exempt
            )
        ]
    if name == "muon":
        # Biases, norms, embeddings and tables, which no decay is for, are not matrices of layers.
        marked = [group | {"use_fallback": group["weight_decay"] == 0} for group in groups]
        return timm.optim.Muon(marked, lr=0.0, nesterov=True, adjust_lr_fn="match_rms_adamw")
    return AdamW(groups, lr=0.0)


def describe(model: nn.Module, optimizer: Optimizer, lr: float) -> str:
    """The optimiser's groups as a table: highest learning rate, weight decay, size, layers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows = [f"{'lr':>9} {'decay':>6} {'tensors':>8} {'parameters':>12}  layers"]
    for group in optimizer.param_groups:
        numbers = sum(parameter.numel() for parameter in group["params"])
        rate = lr * group.get("lr_scale", 1.0)
        layers = _pattern([names[id(parameter)] for parameter in group["params"]])
        rows.append(
            f"{rate:9.2e} {group['weight_decay']:6g} {len(group['params']):8} "
            f"{numbers:12,}  {layers}"
        )
    return "\n".join(rows)


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate in step number `step`, counted from 0: up linearly, down to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets every group's learning rate to `lr` times the group's ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _pattern(names: Sequence[str]) -> str:
    """Few names as they are; many as what each part of the network has in common."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.partition(".")[0], []).append(name)
    shown = []
    for inside in parts.values():
        levels = zip(*(name.split(".") for name in inside), strict=False)
        common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
        listed = len(names) < 4 or len(inside) == 1
        shown += inside if listed else [".".join([*common, "*"])]
    return ", ".join(shown)
