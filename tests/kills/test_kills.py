"""Five kills, the same every time; `make kill-test` lands a hundred."""

import pytest

from .harness import campaign, small_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["finetune", "curate", "clicks", "segment", "convert"])
def test_a_killed_command_loses_nothing(name, tmp_path):
    tally = campaign(name, 1, 0, tmp_path, small_model(tmp_path / "model.safetensors"))
    assert tally.faults == []
