"""The picture of a pretraining."""

import matplotlib.image
import pytest

from sammed3d_backbone.pretraining.curve import draw_training_curve


@pytest.mark.parametrize("lines", [0, 1, 200])
def test_any_length_of_a_log_is_drawn(tmp_path, lines):
    log = [
        {"step": step, "loss": 1.0, "dice_first": 0.2, "dice_last": 0.3} for step in range(lines)
    ]
    log += [{"step": step, "mean_dice": 0.1, "dice_1": 0.1, "dice_1_Toy": 0.2} for step in (5, 9)]
    draw_training_curve(tmp_path / "curve.png", log)
    assert matplotlib.image.imread(tmp_path / "curve.png").ndim == 3
