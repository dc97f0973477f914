"""Freezing of parts of a network, permanently or for the first steps.

A part that is frozen permanently is frozen before the optimiser is made, which then leaves it out.
A part that is frozen for the first steps belongs to the optimiser from the start, which skips
parameters without a gradient. So nothing is prepared again when the part joins, AdamW accumulates
no moments from the gradients of an untrained decoder, and a resumed run needs only the number of
its step. With several processes, DDP has to look for parameters without a gradient
(``find_unused_parameters``), which costs little compared to the backward pass that is saved.
"""

from __future__ import annotations

from types import MethodType

from torch import nn


def set_frozen(part: nn.Module, frozen: bool) -> None:
    """Freezes a part of a network, or makes it trainable again.

    A frozen part stays in evaluation mode when `.train()` is called on it or on a network around
    it, so that drop path stays off. Copies of it are frozen too.
    """
    if frozen:
        part.eval()
        vars(part)["train"] = MethodType(_stays, part)
    elif vars(part).pop("train", None):
        part.train()
    part.requires_grad_(not frozen)


def _stays(part: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001 (that of nn.Module)
    """Replaces `train` of a frozen part."""
    return part
