"""Scores during training: on the network's grid, every process taking its share of the cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from sammed3d_backbone.data.preparation import PreparedCase
from sammed3d_backbone.evaluation.metrics import dice_per_class
from sammed3d_backbone.evaluation.scores import Score


def validate(
    accelerator: Accelerator,
    logits_of: Callable[[Tensor], Tensor],
    cases: Sequence[PreparedCase],
    targets: Mapping[str, Sequence[int]],
) -> list[Score]:
    """Dice of every case and target, the same list in every process.

    Args:
        accelerator: Knows the processes.
        logits_of: The network.
        cases: The cases to score.
        targets: Values of each scored class or region by its name; `Dataset.targets`.

    Shapes:
        logits_of: (C, X, Y, Z) -> (K, X, Y, Z).
    """
    mine = []
    for case in cases[accelerator.process_index :: accelerator.num_processes]:
        logits = logits_of(case.image.to(accelerator.device))
        labels = logits.argmax(0).cpu()
        dice = dice_per_class(
            labels, case.label[0], len(logits), case.annotated, targets=targets.values()
        )
        mine += [
            Score(case.case.id, case.case.subject, name, {"dice": score})
            for name, score in zip(targets, dice, strict=True)
        ]
    return sorted(gather_object(mine), key=lambda score: score.case)
