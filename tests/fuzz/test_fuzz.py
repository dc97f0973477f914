"""A sample of what `make fuzz` does: 200 inputs, the same every time."""

import pytest

from .doors import DOORS
from .harness import fuzz

INPUTS = -(-200 // len(DOORS))


@pytest.mark.parametrize("name", sorted({*DOORS} - {"pickles that run code"}))
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_spoiled_passes_its_door(name, tmp_path):
    door = DOORS[name]
    for file, content in {**door.extra(), door.name: door.spoil(None)}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    door.open(tmp_path / door.name)


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.filterwarnings("ignore")
def test_no_input_gets_further_than_its_door(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tally = fuzz(name, INPUTS, seed=0, place=tmp_path)
    assert tally.faults == []
    assert tally.accepted + tally.refused == INPUTS
