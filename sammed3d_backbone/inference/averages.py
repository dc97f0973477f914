"""The mean of several networks, and of a network's outputs for mirror images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable

from torch import Tensor, nn


class Ensemble(nn.Module):
    """The mean of several networks' outputs."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """The mean, of the shape of each output."""
        total: Tensor = self.members[0](x)
        for member in self.members[1:]:
            total = total + member(x)
        return total / len(self.members)


def mirrored(network: nn.Module, axes: Collection[int]) -> Callable[[Tensor], Tensor]:
    """The network, averaged with its outputs for mirror images, mirrored back.

    Args:
        network: Maps (B, C, X, Y, Z) to (B, K, X, Y, Z).
        axes: Axes 0, 1, 2 to mirror along, and all combinations of them; none is the network.
    """
    ways = [
        [axis + 2 for axis in chosen]
        for count in range(1, len(axes) + 1)
        for chosen in itertools.combinations(axes, count)
    ]

    def call(x: Tensor) -> Tensor:
        total: Tensor = network(x)
        for way in ways:
            total = total + network(x.flip(way)).flip(way)
        return total / (1 + len(ways)) if ways else total

    return call
