"""The loss of a decoder: boundaries by hand, and classes only where they are annotated."""

import pytest
import torch

from sammed3d_backbone.pretraining.decoder_loss import boundary_loss, decoder_loss


@pytest.fixture
def batch():
    """Two volumes of one box each; the second has no class."""
    labels = torch.zeros(2, 4, 4, 4, dtype=torch.int16)
    labels[:, 1:3, 1:3, 1:3] = 1
    known = torch.tensor([[True, False], [False, False]])
    return {"labels": labels, "classes": (labels * known[:, :1, None, None]).byte(), "known": known}


def test_boundaries_are_where_labels_change(batch):
    labels = batch["labels"]
    right = torch.full((2, 3, 4, 4, 4), -20.0)
    for axis in range(3):
        changes = labels.narrow(1 + axis, 0, 3) != labels.narrow(1 + axis, 1, 3)
        right[:, axis].narrow(1 + axis, 0, 3)[changes] = 20.0
    assert boundary_loss(right, labels) < 1e-6
    assert boundary_loss(-right, labels) > 19


def test_what_lies_between_unlabelled_voxels_does_not_count(batch):
    labels = batch["labels"]
    edges = torch.zeros(2, 3, 4, 4, 4)
    changed = edges.clone()
    changed[:, :, 0, 0, 0] = 30.0
    assert boundary_loss(edges, labels) == boundary_loss(changed, labels)


def test_classes_count_only_where_they_are_annotated(batch):
    logits = torch.zeros(2, 1 + 2 + 3, 4, 4, 4, requires_grad=True)
    loss, figures = decoder_loss(logits, batch, foreground_weight=1.0, boundary_weight=0.0)
    loss.backward()
    assert figures["class_loss"] > 0
    assert logits.grad[0, 1].abs().sum() > 0
    # A class that is not annotated is pushed as the background is.
    torch.testing.assert_close(logits.grad[0, 0], logits.grad[0, 2])
    assert not logits.grad[1].any()


def test_a_batch_without_classes_learns_boundaries(batch):
    batch = {**batch, "known": torch.zeros(2, 2, dtype=torch.bool)}
    logits = torch.zeros(2, 1 + 2 + 3, 4, 4, 4)
    loss, figures = decoder_loss(logits, batch, foreground_weight=1.0, boundary_weight=2.0)
    assert figures["class_loss"] == 0
    assert loss == 2 * figures["boundary_loss"] > 0
