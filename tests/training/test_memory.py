"""Memory of a step: calculated without running it, and read from the system."""

import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from sammed3d_backbone.adapters.unetr import unetr
from sammed3d_backbone.models.image_encoder import ImageEncoder3D
from sammed3d_backbone.training import memory
from sammed3d_backbone.training.freezing import set_frozen
from sammed3d_backbone.training.losses import partial_dice_ce

MIB = 2**20
PASSES = "activations and gradients"


def step(model, batch):
    return partial_dice_ce(model(batch["image"]), batch["label"], batch["annotated"])


def accelerator(**changes):
    """A fresh one; a process keeps the precision of its first."""
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, **changes)


@pytest.fixture(scope="module", autouse=True)
def plain_precision():
    """What other tests find afterwards."""
    yield
    AcceleratorState._reset_state()


def parts_of(*, frozen=False, recomputed=False, batch=1, **changes):
    """Bytes of the parts for a small UNETR."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 2}
    network = unetr(ImageEncoder3D(**sizes, global_attn_indexes=(2,)), 3, feature_size=8)
    network.set_grad_checkpointing(recomputed)
    set_frozen(network.encoder, frozen)
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    crops = {
        "image": torch.empty(batch, 1, 32, 32, 32),
        "label": torch.empty(batch, 1, 32, 32, 32, dtype=torch.long),
        "annotated": torch.tensor([[True, True, False]] * batch),
    }
    found = memory.estimate(network, learning, step, crops, accelerator(**changes))
    return network, found.parts


@pytest.fixture(scope="module")
def plain():
    return parts_of()


def test_weights_their_average_and_moments_are_counted(plain):
    network, parts = plain
    held = sum(p.numel() * 4 for p in network.parameters())
    wanted = {"weights": held, "average": held, "moments": 2 * held}
    assert {name: parts[name] for name in wanted} == wanted


def test_nothing_is_trained_or_changed(plain):
    network, _ = plain
    assert all(p.grad is None and type(p) is nn.Parameter for p in network.parameters())


def test_a_frozen_encoder_has_no_moments_and_keeps_little(plain):
    network, parts = parts_of(frozen=True)
    trained = sum(p.numel() * 4 for p in network.parameters() if p.requires_grad)
    assert parts["moments"] == 2 * trained < plain[1]["moments"] / 2
    assert parts["weights"] == plain[1]["weights"]
    assert parts[PASSES] < plain[1][PASSES]


def test_four_crops_need_about_four_times_the_activations(plain):
    _, parts = parts_of(batch=4)
    assert 3 < parts[PASSES] / plain[1][PASSES] < 4.1


@pytest.mark.parametrize(
    "less", [{"recomputed": True}, {"mixed_precision": "bf16"}], ids=["recomputed", "bf16"]
)
def test_recomputing_and_bf16_keep_fewer_activations(plain, less):
    _, parts = parts_of(**less)
    assert parts[PASSES] < plain[1][PASSES]


def test_accumulated_gradients_are_there_while_the_next_share_runs(plain):
    network, parts = parts_of(gradient_accumulation_steps=4)
    gradients = sum(p.numel() * 4 for p in network.parameters())
    assert 0 < parts[PASSES] - plain[1][PASSES] <= gradients


def test_the_peak_is_what_the_tensors_of_a_step_hold():
    """Moments of 2 x 8 MiB beside the weights; then crops of 64, an output and its gradient."""
    network = nn.Sequential(nn.Linear(2048, 1024, bias=False), nn.ReLU())
    parts = memory.estimate(
        network,
        {"0.weight"},
        lambda model, batch: model(batch["image"]).sum(),
        {"image": torch.empty(8192, 2048)},
        accelerator(),
    ).parts
    held = sum(parts.values()) - parts["average"] - memory.KERNELS
    assert held == pytest.approx((8 + 16 + 64 + 32 + 32) * MIB, abs=100)


def test_every_output_of_a_network_with_several_is_counted():
    class Several(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.linear = nn.Linear(64, 1024)
            self.count = count

        def forward(self, x):
            return [self.linear(x) for _ in range(self.count)]

    def sum_of_outputs(model, batch):
        return sum(out.sum() for out in model(batch["image"]))

    crops = {"image": torch.empty(8192, 64)}
    one, two = (
        memory.estimate(Several(count), {"linear.weight"}, sum_of_outputs, crops, accelerator())
        for count in (1, 2)
    )
    assert two.parts[PASSES] - one.parts[PASSES] >= 32 * MIB


def test_a_line_says_how_much_where_and_for_what():
    found = memory.Memory("cpu", {"weights": 2**30, "activations": 3 * 2**30})
    assert found.total == pytest.approx(4.4 * 2**30)
    assert str(found).startswith("4.40 GiB on cpu")
    assert "weights 1.00, activations 3.00" in str(found)


PEAK = """
import torch
from sammed3d_backbone.training import memory
cpu, mib = torch.device("cpu"), 2**20
before = memory.forget_peak(cpu)
torch.ones(64 * mib)  # 256 MiB, gone at once
print(memory.peak_bytes(cpu) > before + 240 * mib)
print(memory.forget_peak(cpu) < before + 120 * mib)
print(memory.peak_bytes(cpu) < before + 120 * mib)
"""


def test_the_peak_is_seen_and_can_be_forgotten():
    # In a process of its own: here, freed memory of earlier tests would be taken again.
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"] * 3
