"""The base class of networks around an encoder: the maps that they read, and timm's hooks.

The base class holds an encoder of the contract as `encoder`, so that its tensors have the same
names in every file.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sammed3d_backbone.adapters.contract import Encoder

MAX_CLASSES = 2**16  # a network of more would not fit into memory


class EncoderNetwork(nn.Module):
    """An encoder without its unread parts; derived networks add a decoder.

    The encoder loses the blocks behind the last index and, unless the network reads its map, the
    neck, so that every trainable parameter gets a gradient, which multi-process training needs.
    """

    def __init__(
        self, encoder: Encoder, out_indices: Sequence[int], *, keep_neck: bool = False
    ) -> None:
        super().__init__()
        encoder.prune_intermediate_layers(out_indices, prune_norm=not keep_neck)
        self.encoder = encoder
        self.out_indices = tuple(out_indices)
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: blocks of both parts are recomputed in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The encoder's depth groups under this network's names; the decoder follows them."""
        return groups_under_encoder(self.encoder, coarse)

    def _run(self, block: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """Runs a block of the decoder, with gradient checkpointing if that is enabled."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        else:
            out = block(*inputs)
        return out


def groups_under_encoder(encoder: Encoder, coarse: bool) -> dict[str, Any]:
    """An encoder's depth groups by the names that a module has for it that calls it `encoder`."""
    return {
        group: [(_under_encoder(pattern), rank) for pattern, rank in rules]
        if isinstance(rules, list)
        else _under_encoder(rules)
        for group, rules in encoder.group_matcher(coarse).items()
    }


def spread_indices(encoder: Encoder, count: int) -> list[int]:
    """Block numbers that split the encoder evenly and end at its last block."""
    return [(i + 1) * encoder.depth // count - 1 for i in range(count)]


def require_out_indices(encoder: Encoder, out_indices: Sequence[int], count: int) -> None:
    """Refuses block numbers that do not ascend, do not exist, or are not `count` in number."""
    try:
        chosen = [operator.index(index) for index in out_indices]
    except TypeError:  # not whole numbers, or not a list
        chosen = []
    fits = chosen and 0 <= min(chosen) <= max(chosen) < encoder.depth
    if not fits or len(chosen) != count or chosen != sorted(set(chosen)):
        raise ValueError(
            f"out_indices={out_indices!r}: expected {count} ascending block numbers between "
            f"0 and {encoder.depth - 1}, one for each resolution, "
            f"e.g. {tuple(spread_indices(encoder, count))}"
        )


def require_classes(out_channels: int, least: int = 1) -> None:
    """Refuses a number of classes that no label map has."""
    if not is_whole(out_channels) or not least <= out_channels <= MAX_CLASSES:
        raise ValueError(
            f"out_channels={out_channels!r}: expected the number of classes including background, "
            f"a whole number from {least} to {MAX_CLASSES:,}"
        )


def require_feature_size(feature_size: int) -> None:
    """Refuses a number of channels that no decoder can have."""
    if not is_whole(feature_size) or feature_size < 1:
        raise ValueError(
            f"feature_size={feature_size!r}: expected the channels at full resolution, a whole "
            "number from 1"
        )


def is_whole(value: object) -> bool:
    """Whether an argument is a whole number, of Python or of NumPy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _under_encoder(pattern: str) -> str:
    """An encoder's parameter pattern, seen from the network around it."""
    return pattern.replace("^", r"^encoder\.")
