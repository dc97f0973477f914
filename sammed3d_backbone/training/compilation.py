"""torch.compile of a network for training."""

import torch
from torch import nn


def compile_in_place(network: nn.Module) -> None:
    """Compiles a network at its next call; parameters keep their names and values.

    Convolutions get the memory format in which the compiled kernels are fast. The numbers differ
    by rounding.
    """
    for part in network.modules():
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d):
            part.to(memory_format=torch.channels_last_3d)
    network.compile()
