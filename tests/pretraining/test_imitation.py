"""The loss of a student's embedding."""

import torch

from sammed3d_backbone.pretraining.imitation import Imitation

EVERYWHERE = torch.ones(2, 2, 2, dtype=torch.bool)


def test_a_student_that_equals_its_teacher_has_no_loss():
    embedding = torch.randn(2, 6, 2, 2, 2)
    assert Imitation(6, 6, EVERYWHERE, 1.0)(embedding, embedding) == 0


def test_the_mean_has_a_loss_of_one():
    target = torch.randn(2, 5, 2, 2, 2)
    variance = target.transpose(0, 1).flatten(1).var(1, correction=0).mean()
    loss = Imitation(6, 5, EVERYWHERE, float(variance))
    torch.nn.init.zeros_(loss.project.weight)
    loss.project.bias.data = target.mean((0, 2, 3, 4))
    torch.testing.assert_close(loss(torch.randn(2, 6, 2, 2, 2), target), torch.tensor(1.0))


def test_tokens_outside_the_teachers_view_do_not_count():
    covered = EVERYWHERE.clone()
    covered[0] = False
    embedding = torch.randn(1, 6, 2, 2, 2)
    target = embedding.clone()
    target[:, :, 0] += 5
    assert Imitation(6, 6, covered, 1.0)(embedding, target) == 0


def test_gradients_reach_student_and_projection():
    embedding = torch.randn(1, 6, 2, 2, 2, requires_grad=True)
    loss = Imitation(6, 4, EVERYWHERE, 1.0)
    loss(embedding, torch.randn(1, 4, 2, 2, 2)).backward()
    assert embedding.grad.abs().sum() > 0
    assert loss.project.weight.grad.abs().sum() > 0
