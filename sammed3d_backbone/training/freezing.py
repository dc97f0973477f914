"""Parts of a network that do not learn, for good or for a while.

For good: frozen before the optimiser is made, which then leaves the part out. For a while: the
optimiser holds the part from the start, and skips what has no gradient. That is why nothing is
prepared again when the part joins, why AdamW gathers no moments from gradients of a decoder that
knows nothing yet, and why a run that goes on needs to know the number of its step only. Between
several processes, DDP then has to look for parameters without gradient
(``find_unused_parameters``), which costs little beside the backward pass that is saved.
"""

from __future__ import annotations

from types import MethodType

from torch import nn


def set_frozen(part: nn.Module, frozen: bool) -> None:
    """Stops a part of a network from learning, or lets it learn.

    A frozen part is in evaluation mode whatever `.train()` says, of it or of a network around it:
    drop path would go on otherwise. Copies of it are frozen too.
    """
    if frozen:
        part.eval()
        vars(part)["train"] = MethodType(_stays, part)
    elif vars(part).pop("train", None):
        part.train()
    part.requires_grad_(not frozen)


def _stays(part: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001 (that of nn.Module)
    """In place of a frozen part's `train`."""
    return part
