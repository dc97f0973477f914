"""Classes of all voxels: what is known teaches, what is unknown does not."""

import pytest
import torch

from sammed3d_backbone.models.sam import Encoding
from sammed3d_backbone.pretraining.dense_labels import DenseLabels


@pytest.fixture
def dense():
    """Two classes read off the first channels of the map."""
    layer = DenseLabels(4, 2)
    with torch.no_grad():
        layer.to_classes.weight.copy_(torch.eye(4)[:3])
        layer.to_classes.bias.zero_()
    return layer


def telling(classes):
    """An encoding whose map says each cell's class, (B, 2, 2, 2) integers."""
    fine = 20.0 * torch.nn.functional.one_hot(classes.long(), 4).movedim(-1, 1).float()
    return Encoding(
        torch.zeros(len(classes), 8, 1, 1, 1), (torch.zeros(len(classes), 8, 1, 1, 1), fine)
    )


@pytest.fixture
def classes():
    cells = torch.zeros(1, 2, 2, 2, dtype=torch.uint8)
    cells[0, 0, 0], cells[0, 1, 1] = 1, 2
    return cells


def enlarged(cells):
    return cells.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


def known(*classes):
    return torch.tensor([classes])


def test_a_right_answer_costs_nothing(dense, classes):
    loss, dice = dense(telling(classes), enlarged(classes), known(True, True))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-4)
    assert float(dice) == pytest.approx(1, abs=1e-4)


def test_an_unknown_class_may_be_anywhere_that_no_other_class_is(dense, classes):
    labels = torch.where(enlarged(classes) == 2, 0, enlarged(classes))  # 2 was not looked for
    unknown, _ = dense(telling(classes), labels, known(True, False))
    assert float(unknown.detach()) == pytest.approx(0, abs=1e-4)
    looked_for, _ = dense(telling(classes), labels, known(True, True))
    assert float(looked_for.detach()) > 1


def test_a_volume_of_unknown_classes_counts_as_nothing_and_keeps_its_gradient(dense, classes):
    loss, dice = dense(telling(classes), enlarged(classes) * 0, known(False, False))
    loss.backward()
    assert (float(loss.detach()), float(dice)) == (0, 0)
    assert not dense.to_classes.weight.grad.any()
