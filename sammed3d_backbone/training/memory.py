"""Memory of a training step: calculated before it is run, and as it was.

The calculation runs a step on tensors that have sizes and no values, and counts what is alive at
once. It knows of no kernel's own buffers and of no allocator's gaps, which `SLACK` stands for.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sammed3d_backbone.provenance import resident_bytes
from sammed3d_backbone.training import optim

# What a process holds beside its tensors: once, the code and threads of the kernels, on a CPU; and
# in proportion, freed blocks that fit nothing and the kernels' own copies. Chosen by what
# recipes/benchmarks/step_cost.py measures.
KERNELS = 100 * 2**20  # bytes
SLACK = 0.1


@dataclass(frozen=True)
class Memory:
    """What a training process holds when it holds most.

    Args:
        device: Where.
        parts: Name -> bytes.
    """

    device: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts and of the slack."""
        return round((1 + SLACK) * sum(self.parts.values()))

    def __str__(self) -> str:
        """One line."""
        listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in self.parts.items())
        return (
            f"{self.total / 2**30:.2f} GiB on {self.device}, in a step with all parts learning "
            f"({listed}, and {SLACK:.0%} for gaps and buffers)"
        )


def estimate(
    network: nn.Module,
    learning: Collection[str],
    step: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    batch: Mapping[str, Tensor],
    accelerator: Accelerator,
) -> Memory:
    """The memory that training a network with AdamW and an average of its weights will need.

    Args:
        network: One that the accelerator has not wrapped; it stays as it is.
        learning: Names of the parameters that will be trained.
        step: Loss of a batch. It may ask for the values of booleans in the batch, of nothing else.
        batch: Of the sizes of a training batch.
        accelerator: Knows device, precision, accumulation and the number of processes.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def sized(tensor: Tensor) -> Tensor:
        like: Tensor = fake.from_tensor(tensor).detach().to(accelerator.device)
        return like

    held = [*network.parameters(), *network.buffers()]
    copied = copy.deepcopy(network, {id(tensor): sized(tensor) for tensor in held}).train()
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(name in learning)
    inner = copied.forward

    def forward(*inputs: Tensor) -> Any:  # noqa: ANN401 (whatever the network returns)
        with accelerator.autocast():
            out = inner(*inputs)
        return convert_to_fp32(out)  # as prepared models do

    vars(copied)["forward"] = forward
    batch = {key: t if t.dtype is torch.bool else sized(t) for key, t in batch.items()}
    weights = [*copied.parameters(), *copied.buffers()]
    trained = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    optimizer = optim.layer_decayed(copied, 0.0)
    with _LiveBytes([*weights, *batch.values()]) as live:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        optimizer.zero_grad()
        for _ in range(min(2, accelerator.gradient_accumulation_steps)):
            step(copied, batch).backward()
        optimizer.step()
    size, moments = _bytes(weights), 2 * _bytes(trained)
    # Gradients come while activations go, so only their sum has a peak.
    parts = {
        "weights": size,
        "average": size,
        "moments": moments,
        "activations and gradients": live.peak - size - moments,
    }
    if accelerator.device.type == "cpu":
        parts["kernels"] = KERNELS
    if accelerator.num_processes > 1:
        parts["exchange"] = _bytes(trained)  # DDP's buckets
    return Memory(accelerator.device.type, parts)


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far, or since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resident_bytes("VmHWM")


def forget_peak(device: torch.device) -> int:
    """Begins to look for the peak anew; what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    control = Path("/proc/self/clear_refs")
    if control.exists():
        control.write_text("5")  # proc(5): resets VmHWM
    return resident_bytes("VmRSS")


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the fake tensors that are alive, and remembers their highest number."""

    def __init__(self, alive: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in alive:
            self._add(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (whatever the operator returns)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
