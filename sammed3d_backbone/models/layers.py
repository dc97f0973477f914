"""Small layers that several parts of the network share, one definition each.

Each keeps the shape of its input. No attention, no positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm3d(nn.Module):
    """Normalises every voxel of a feature map over its channels.

    Shapes:
        x: (B, C, X, Y, Z).
        returns: the same.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        last = x.ndim - 1  # PyTorch's legacy ONNX exporter gets an axis of -1 wrong
        x = x.movedim(1, last)  # (B, X, Y, Z, C)
        x = F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)
        return x.movedim(last, 1)  # (B, C, X, Y, Z)


class MLPBlock(nn.Module):
    """Two linear layers with an activation between them, an exact GELU by default.

    Shapes:
        x: (..., E).
        returns: the same.
    """

    def __init__(self, embed_dim: int, mlp_dim: int, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embed_dim, mlp_dim)
        self.lin2 = nn.Linear(mlp_dim, embed_dim)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin2(self.act(self.lin1(x)))
        return out


class MLP(nn.Module):
    """Three linear layers with ReLU between them, which turn a token into another kind of vector.

    Shapes:
        x: (..., in_dim).
        returns: (..., out_dim).
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Linear(in_dim, hidden_dim),
                nn.Linear(hidden_dim, hidden_dim),
                nn.Linear(hidden_dim, out_dim),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out
