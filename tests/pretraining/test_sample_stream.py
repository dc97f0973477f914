"""What all kinds of training samples draw: the plan of an interaction, random contrast."""

import numpy as np
import pytest
import torch

from sammed3d_backbone.pretraining.click_loss import GRADED, WITHOUT_POINT
from sammed3d_backbone.pretraining.sample_stream import InteractionPlan, random_contrast


def test_plans_depend_on_the_optimiser_step_and_teach_every_number_of_clicks():
    plan = InteractionPlan(graded=3, without_point=0.2)
    drawn = [plan.draw(10, (0, step)) for step in range(300)]
    assert drawn == [plan.draw(10, (0, step)) for step in range(300)]
    graded = [[n for n, step in enumerate(steps) if step & GRADED] for steps in drawn]
    assert {len(steps) for steps in graded} == {3}
    assert all(steps[0] == 0 and steps[1] <= 3 for steps in graded)
    assert {n for steps in graded for n in steps} == set(range(10))
    share = np.mean([[bool(step & WITHOUT_POINT) for step in steps] for steps in drawn], axis=0)
    assert share[0] == 0
    assert share[1:].mean() == pytest.approx(0.2, abs=0.03)
    assert InteractionPlan().draw(3, (0,)) == [GRADED] * 3
    assert InteractionPlan(graded=2).draw(2, (0,)) == [GRADED] * 2


def test_random_contrast_changes_intensities_and_keeps_their_scale():
    labels = torch.zeros(1, 24, 24, 24, dtype=torch.uint8)
    labels[0, 4:16, 6:18, 4:12] = 1
    labels[0, 18:22, 18:22, 14:17] = 2
    image = labels + 0.1 * torch.randn(labels.shape)
    changed = random_contrast(np.random.default_rng(0), image, labels)
    assert changed.shape == image.shape
    assert not torch.allclose(changed, image, atol=0.1)
    assert float(changed.mean()) == pytest.approx(float(image.mean()), abs=1e-3)
    assert float(changed.std()) == pytest.approx(float(image.std()), rel=1e-2)
