"""How far the encoder is from the reference: forward, every block, every gradient.

    python recipes/parity.py           # measures, writes recipes/results/parity.json
    python recipes/parity.py --table   # prints the README's table from that file

Both networks get the same random weights (tables, biases and the position table too: they start
at zero, where half of what is compared would vanish) and the same random volumes. The reference
is the PyPI package `medim`. A figure is the relative L2 error of a tensor; a row shows the worst
tensor of its kind. The parts of `qkv.bias` are compared as one tensor, because the gradient of
the key part is zero in theory.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from medim.models.sam_med3d import ImageEncoderViT3D
from torch import Tensor, nn

from sammed3d_backbone.models.image_encoder import ImageEncoder3D, resample_pos_embed
from sammed3d_backbone.provenance import provenance

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One network on one input size."""

    side: int  # voxels of the input cube
    dtype: torch.dtype
    batch: int = 1
    trained_side: int = 128  # voxels the tables are made for
    embed_dim: int = 48
    depth: int = 4
    num_heads: int = 3
    global_attn_blocks: tuple[int, ...] = (1, 3)
    out_chans: int = 32


VIT_B = {
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "global_attn_blocks": (2, 5, 8, 11),
    "out_chans": 384,
}
CASES = (
    Case(96, torch.float64, batch=2),
    Case(128, torch.float64, batch=2),
    Case(160, torch.float64),
    Case(256, torch.float64, trained_side=256, embed_dim=16, num_heads=1, depth=2),
    Case(96, torch.float32, **VIT_B),
    Case(128, torch.float32, **VIT_B),
    Case(160, torch.float32, **VIT_B),
)


def pair(case: Case, seed: int) -> tuple[nn.Module, ImageEncoder3D]:
    """The reference and ours with the same random weights, set to the case's input size."""
    torch.manual_seed(seed)
    sizes = {
        "img_size": case.trained_side,
        "patch_size": 16,
        "embed_dim": case.embed_dim,
        "depth": case.depth,
        "num_heads": case.num_heads,
        "out_chans": case.out_chans,
        "window_size": 14,
        "mlp_ratio": 4.0,
    }
    reference = ImageEncoderViT3D(
        **sizes,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=case.global_attn_blocks,
    ).to(case.dtype)
    for name, parameter in reference.named_parameters():
        if "pos" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    ours = ImageEncoder3D(**sizes, global_attn_blocks=case.global_attn_blocks).to(case.dtype)
    ours.load_state_dict(reference.state_dict(), strict=True)
    if case.side != case.trained_side:
        ours.set_input_size(case.side)
        table = resample_pos_embed(reference.pos_embed.detach(), ours.grid)
        reference.pos_embed = nn.Parameter(table)
    return reference, ours


def compare(case: Case, seed: int = 0) -> dict[str, float]:
    """Worst relative L2 error of each kind of tensor."""
    reference, ours = pair(case, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (case.batch, 1, case.side, case.side, case.side)
    volume = torch.randn(shape, generator=generator, dtype=case.dtype)
    want = _run(reference, volume, generator.manual_seed(seed + 2))
    got = _run(ours, volume, generator.manual_seed(seed + 2))
    if want.keys() != got.keys():
        raise ValueError(f"tensors differ: {sorted(want.keys() ^ got.keys())}")
    worst: dict[str, float] = {}
    for name, value in want.items():
        kind = name.partition(":")[0]
        worst[kind] = max(worst.get(kind, 0.0), relative_error(got[name], value))
    return worst


def relative_error(got: Tensor, want: Tensor) -> float:
    """L2 norm of the difference over that of the wanted tensor, computed in float64."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm()).item()


def _run(network: nn.Module, volume: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Output, every block's output, and the gradients of a random projection of the output."""
    found: dict[str, Tensor] = {}

    def keep(index: int) -> object:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found[f"block:{index}"] = output.detach()

        return hook

    handles = [b.register_forward_hook(keep(i)) for i, b in enumerate(network.blocks)]
    volume = volume.clone().requires_grad_()
    output = network(volume)
    weights = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    (output * weights).sum().backward()
    for handle in handles:
        handle.remove()
    found["neck"] = output.detach()
    found["input gradient"] = volume.grad
    for name, parameter in network.named_parameters():
        found[f"parameter gradient:{name}"] = parameter.grad
    return found


def table(result: dict) -> str:
    """The README's table as Markdown."""
    lines = [
        "| input | tokens | width | blocks | precision | blocks' outputs | neck | input gradient | "
        "parameter gradients |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        errors = (
            f"{row[kind]:.1e}" for kind in ("block", "neck", "input gradient", "parameter gradient")
        )
        lines.append(
            f"| {row['batch']} x {row['side_vox']}³ | {row['grid']}³ | {row['embed_dim']} | "
            f"{row['depth']} | {row['dtype']} | {' | '.join(errors)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints one row per case and writes all of them with their provenance."""
    parser = argparse.ArgumentParser(description="Compare the encoder with the reference.")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "parity.json")
    parser.add_argument("--table", action="store_true", help="print the table and measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.out.read_text())))
        return
    rows = []
    for case in CASES:
        errors = compare(case)
        row = {
            "side_vox": case.side,
            "grid": case.side // 16,
            "embed_dim": case.embed_dim,
            "depth": case.depth,
            "batch": case.batch,
            "dtype": str(case.dtype).removeprefix("torch."),
            **errors,
        }
        rows.append(row)
        print(json.dumps(row))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"rows": rows, **provenance(HERE)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
