"""The committed outputs of the reference."""

import json

import torch
from sammed3d_backbone.recipes.benchmarks import golden

from sammed3d_backbone import selftest


def test_the_committed_outputs_are_the_references():
    committed = json.loads(golden.FILE.read_text())["cases"]
    assert committed.keys() == selftest.CASES.keys()
    name = "small network"
    found = golden.golden(selftest.CASES[name])
    assert found.keys() == committed[name].keys()
    for tensor, values in found.items():
        now, then = torch.tensor(values), torch.tensor(committed[name][tensor])
        torch.testing.assert_close(now, then, rtol=1e-6, atol=1e-9)


def test_what_changed_is_printed_and_written(tmp_path, monkeypatch, capsys):
    name = "small network"
    monkeypatch.setattr(selftest, "CASES", {name: selftest.CASES[name]})
    path = tmp_path / "golden.json"
    before = json.loads(golden.FILE.read_text())
    before["cases"][name]["position code"][0] += 1
    del before["cases"][name]["image embedding"]
    path.write_text(json.dumps(before))
    monkeypatch.setattr(golden, "FILE", path)
    golden.main()
    printed = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert printed[f"{name}: image embedding"] == "new"
    assert float(printed[f"{name}: position code"]) > 1e-2
    assert float(printed[f"{name}: mask after the first click"]) < 1e-6
    assert len(json.loads(path.read_text())["cases"][name]) == len(printed)
