"""The loss of a student's embedding against its teacher's, through a learned linear projection.

Letters: B volumes, F and T channels of student and teacher, (x, y, z) tokens of the student.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Imitation(nn.Module):
    """Mean squared error relative to the variance of the teacher's channels.

    1 is the error of their mean over many crops.

    Args:
        width: Channels F of the student.
        teacher_width: Channels T of the teacher; where both are equal, the projection starts as the
            identity.
        covered: Tokens that lie in the teacher's field of view; others do not count.
        variance: Mean variance of the teacher's channels. One for all batches, since that of a few
            crops changes fivefold.

    Shapes:
        covered: (x, y, z) bool.
        embedding: (B, F, x, y, z).
        target: (B, T, x, y, z), the teacher's on the student's tokens.
        returns: scalar.
    """

    covered: Tensor

    def __init__(self, width: int, teacher_width: int, covered: Tensor, variance: float) -> None:
        super().__init__()
        self.project = nn.Linear(width, teacher_width)
        if width == teacher_width:
            nn.init.eye_(self.project.weight)
            nn.init.zeros_(self.project.bias)
        self.variance = max(variance, 1e-6)
        self.register_buffer("covered", covered, persistent=False)

    def forward(self, embedding: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        ours = self.project(embedding.movedim(1, -1)[:, self.covered]).float()  # (B, N, T)
        theirs = target.movedim(1, -1)[:, self.covered].float()
        error: Tensor = torch.mean((ours - theirs) ** 2) / self.variance
        return error
