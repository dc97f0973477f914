"""A run resumes from a packed file as from its checkpoint, up to rounding."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from sammed3d_backbone.recipes.pack_checkpoint import pack, unpack
from sammed3d_backbone.recipes.pretrain_promptable import Config, main

from sammed3d_backbone.training.runs import MODEL, Run


def loss_of(folder):
    return [line["loss"] for line in Run(folder).records() if "loss" in line]


@pytest.mark.slow
def test_a_run_resumes_from_a_packed_checkpoint(small_pretraining, runs, tmp_path):
    cfg = replace(Config(**small_pretraining), optimizer="muon", steps=4, decay_steps=0)
    main(replace(cfg, steps=2))
    packed = tmp_path / "run.safetensors"
    pack(runs / "toy", packed)
    full = sum(path.stat().st_size for path in Run(runs / "toy").checkpoints[-1].iterdir())
    assert packed.stat().st_size < 0.6 * full
    unpack(packed, runs / "again", other_config=True)
    main(replace(cfg, name="again"))
    main(replace(cfg, name="whole"))
    assert loss_of(runs / "again")[:2] == loss_of(runs / "whole")[:2]
    assert loss_of(runs / "again") == pytest.approx(loss_of(runs / "whole"), rel=0.02)
    ours, theirs = (
        load_file(Run(runs / name).checkpoints[-1] / MODEL) for name in ("again", "whole")
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-3, atol=2e-3)
    with pytest.raises(FileExistsError, match="again"):
        unpack(packed, runs / "again")


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        pack(tmp_path, tmp_path / "x.safetensors")
