"""The loss of a student's embedding against its teacher's, through a learned linear projection.

Letters: B volumes, F and T channels of student and teacher, (x, y, z) tokens of the student.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Imitation(nn.Module):
    """Mean squared error relative to the variance of the teacher's channels over the batch.

    1 is the error of the mean over all tokens.

    Args:
        width: Channels F of the student.
        teacher_width: Channels T of the teacher; where both are equal, the projection starts as the
            identity.
        covered: Tokens that lie in the teacher's field of view; others do not count.

    Shapes:
        covered: (x, y, z) bool.
        embedding: (B, F, x, y, z).
        target: (B, T, x, y, z), the teacher's on the student's tokens.
        returns: scalar.
    """

    covered: Tensor

    def __init__(self, width: int, teacher_width: int, covered: Tensor) -> None:
        super().__init__()
        self.project = nn.Linear(width, teacher_width)
        if width == teacher_width:
            nn.init.eye_(self.project.weight)
            nn.init.zeros_(self.project.bias)
        self.register_buffer("covered", covered, persistent=False)

    def forward(self, embedding: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        ours = self.project(embedding.movedim(1, -1)[:, self.covered]).float()  # (B, N, T)
        theirs = target.movedim(1, -1)[:, self.covered].float()
        spread = theirs.flatten(0, 1).var(0, correction=0).mean()
        error: Tensor = torch.mean((ours - theirs) ** 2) / spread.clamp(min=1e-6)
        return error
