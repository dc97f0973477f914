"""Time and memory of the encoder against the reference, and of UNETR against MONAI's.

    python recipes/benchmarks/encoder_speed.py            # measures, writes encoder_speed.json
    python recipes/benchmarks/encoder_speed.py --table    # renews the table of README.md

One 128-voxel cube, batch 1, float32 but where bf16 is named. Two networks that are compared run in
turn in one process (A B A B ...), the median of the runs counts, and ratios are what to quote. Peak
memory is taken in a process of its own for each: the highest resident size during forward and
backward minus the resident size after building the network.

`share` says how near the forward pass is to the machine's limit: the time that its matrix
products take on their own, each shape at the best rate of torch's public operators in the same
process, over the time of the whole pass.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets import UNETR as MonaiUNETR
from sammed3d_backbone.recipes.benchmarks import running
from sammed3d_backbone.recipes.benchmarks.parity import reference_encoder
from torch import Tensor, nn
from tqdm import tqdm

from sammed3d_backbone.adapters.unetr import unetr
from sammed3d_backbone.loading.variants import VARIANTS
from sammed3d_backbone.models.image_encoder import ImageEncoder3D
from sammed3d_backbone.provenance import provenance, resident_bytes
from sammed3d_backbone.training.compilation import compile_in_place

HERE = Path(__file__).parent
SIDE = 128  # voxels
SIZES = VARIANTS["vit_b"]
CLASSES = 14


def ours() -> nn.Module:
    """This package's encoder."""
    return ImageEncoder3D(**SIZES.encoder_sizes())


def reference() -> nn.Module:
    """The released implementation, as packaged in `medim`."""
    return reference_encoder(**SIZES.encoder_sizes())


def our_unetr() -> nn.Module:
    """MONAI's decoder on our encoder."""
    return unetr(ours(), CLASSES)


def monai_unetr() -> nn.Module:
    """MONAI's UNETR with its own ViT of the same width and depth."""
    return MonaiUNETR(1, CLASSES, img_size=(SIDE,) * 3, qkv_bias=True)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "reference": reference,
    "ours": ours,
    "monai_unetr": monai_unetr,
    "our_unetr": our_unetr,
}


def volume() -> Tensor:
    """One random cube."""
    return torch.randn(1, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def forward(network: nn.Module, x: Tensor) -> None:
    """One forward pass as predictions make it."""
    with torch.inference_mode():
        network(x)


def forward_bf16(network: nn.Module, x: Tensor) -> None:
    """One forward pass as `sammed3d predict --precision bf16` makes it."""
    with torch.autocast("cpu", torch.bfloat16):
        forward(network, x)


def train_step(network: nn.Module, x: Tensor) -> None:
    """Forward and backward, gradients dropped afterwards."""
    network(x).square().mean().backward()
    network.zero_grad(set_to_none=True)


def in_turn(actions: dict[str, Callable[[], None]], runs: int) -> dict[str, dict[str, object]]:
    """Times actions A B A B ... after one uncounted round.

    Returns:
        For each action its times in seconds and their median.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    rounds = tqdm(range(runs + 1), desc=" / ".join(actions), leave=False)
    for count in rounds:
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if count:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median_s": statistics.median(times), "all_s": times}
        for name, times in seconds.items()
    }


def matrix_products() -> list[tuple[str, int, tuple[int, int, int, int]]]:
    """Every matrix product of a forward pass: name, count, (batch, rows, inner, columns)."""
    tokens = (SIDE // SIZES.patch_size) ** 3
    e, heads = SIZES.embed_dim, SIZES.num_heads
    mlp = int(e * SIZES.mlp_ratio)
    return [
        ("patch embedding", 1, (1, tokens, SIZES.patch_size**3, e)),
        ("qkv", SIZES.depth, (1, tokens, e, 3 * e)),
        ("logits", SIZES.depth, (heads, tokens, e // heads, tokens)),
        ("values", SIZES.depth, (heads, tokens, tokens, e // heads)),
        ("proj", SIZES.depth, (1, tokens, e, e)),
        ("lin1", SIZES.depth, (1, tokens, e, mlp)),
        ("lin2", SIZES.depth, (1, tokens, mlp, e)),
        ("neck 1", 1, (1, tokens, e, SIZES.out_chans)),
    ]


def best_seconds(shape: tuple[int, int, int, int], runs: int) -> float:
    """The shortest median time of one matrix product over the ways to ask torch for it."""
    batch, rows, inner, columns = shape
    a, b = torch.randn(batch, rows, inner), torch.randn(batch, columns, inner)
    b_t = b.mT.contiguous()
    ways: dict[str, Callable[[], object]] = {
        "bmm": lambda: torch.bmm(a, b_t),
        "bmm transposed": lambda: torch.bmm(a, b.mT),
    }
    if batch == 1:
        bias = torch.zeros(columns)
        ways["linear"] = lambda: F.linear(a[0], b[0], bias)
        ways["mm"] = lambda: torch.mm(a[0], b_t[0])
    return min(float(t["median_s"]) for t in in_turn(ways, runs).values())


def limit(runs: int) -> dict[str, object]:
    """FLOPs of the forward pass's matrix products and the time they need on their own."""
    flops, seconds = 0.0, 0.0
    for _name, count, shape in matrix_products():
        batch, rows, inner, columns = shape
        flops += 2.0 * count * batch * rows * inner * columns
        seconds += count * best_seconds(shape, runs)
    grid = SIDE // SIZES.patch_size
    x = torch.randn(1, SIZES.out_chans, grid, grid, grid)
    w = torch.randn(SIZES.out_chans, SIZES.out_chans, 3, 3, 3)
    conv = in_turn({"conv": lambda: F.conv3d(x, w, padding=1)}, runs)["conv"]
    flops += 2.0 * 27 * SIZES.out_chans**2 * grid**3
    seconds += float(conv["median_s"])
    return {
        "gflop": flops / 1e9,
        "matrix_products_s": seconds,
        "gflop_per_s": flops / 1e9 / seconds,
    }


def where_the_time_goes(network: nn.Module, x: Tensor, runs: int) -> dict[str, float]:
    """Median seconds of UNETR's parts in a forward pass, the encoder as one."""
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return run

    network.encoder.forward_intermediates = timed("encoder", network.encoder.forward_intermediates)
    network.stem.forward = timed("stem, full resolution", network.stem.forward)
    for stage, skip in enumerate(network.skips, start=1):
        skip.forward = timed(f"skip to stride {2**stage}", skip.forward)
    for stage, up in enumerate(network.ups):
        where = f"stride {2**stage}" if stage else "full resolution"
        up.forward = timed(f"up to {where}", up.forward)
    network.out.forward = timed("class logits", network.out.forward)
    for _ in range(runs + 1):
        forward(network, x)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def measure_peak(name: str) -> int:
    """The highest resident size of this process in a training step minus that after building."""
    network, x = NETWORKS[name](), volume()
    gc.collect()
    built = resident_bytes("VmRSS")
    train_step(network, x)
    return resident_bytes("VmHWM") - built


def measure(runs: int) -> dict[str, object]:
    """All figures of the benchmark."""
    torch.manual_seed(0)
    x = volume()
    pair = {name: NETWORKS[name]().eval() for name in ("reference", "ours")}
    result: dict[str, object] = {
        "side_vox": SIDE,
        "runs": runs,
        "encoder_forward": in_turn({n: partial(forward, m, x) for n, m in pair.items()}, runs),
        "limit": limit(4 * runs),
        "encoder_forward_alone": in_turn({"ours": partial(forward, pair["ours"], x)}, 4 * runs),
        "encoder_step": in_turn({n: partial(train_step, m, x) for n, m in pair.items()}, runs),
    }
    del pair
    pair = {name: NETWORKS[name]() for name in ("monai_unetr", "our_unetr")}
    result["unetr_step"] = in_turn({n: partial(train_step, m, x) for n, m in pair.items()}, runs)
    result["unetr_forward"] = in_turn({n: partial(forward, m, x) for n, m in pair.items()}, runs)
    start = time.perf_counter()
    compile_in_place(pair["our_unetr"])
    actions = {n: partial(train_step, m, x) for n, m in pair.items()}
    actions["our_unetr"]()
    result["compile_s"] = time.perf_counter() - start  # and one step
    result["compiled_step"] = in_turn(actions, runs)
    pair["our_unetr"] = our_unetr()
    half = {"our_unetr": partial(forward_bf16, pair["our_unetr"], x)}
    peer = {"monai_unetr": partial(forward, pair["monai_unetr"], x)}
    result["unetr_forward_bf16"] = in_turn(peer | half, runs)
    result["unetr_parts_s"] = where_the_time_goes(pair["our_unetr"], x, runs)
    del pair
    gc.collect()
    result["peak_bytes"] = {
        name: running.alone(measure_peak, name) for name in tqdm(NETWORKS, desc="memory")
    }
    return {**result, **provenance(HERE)}


def table(result: dict) -> str:
    """The README's table as Markdown."""
    rows = [
        ("encoder, forward", "encoder_forward", "reference", "ours"),
        ("encoder, forward + backward", "encoder_step", "reference", "ours"),
        ("UNETR, forward", "unetr_forward", "monai_unetr", "our_unetr"),
        ("UNETR, forward, ours in bf16", "unetr_forward_bf16", "monai_unetr", "our_unetr"),
        ("UNETR, forward + backward", "unetr_step", "monai_unetr", "our_unetr"),
        (
            f"UNETR, forward + backward, ours compiled in {result['compile_s']:.0f} s",
            "compiled_step",
            "monai_unetr",
            "our_unetr",
        ),
    ]
    lines = [
        f"| one {result['side_vox']}³ volume, float32 | peer | ours | ratio |",
        "|---|---|---|---|",
    ]
    for title, key, peer, mine in rows:
        a, b = result[key][peer]["median_s"], result[key][mine]["median_s"]
        lines.append(f"| {title} | {a:.2f} s | {b:.2f} s | {a / b:.1f} x |")
    peak = result["peak_bytes"]
    for title, peer, mine in (
        ("encoder, peak memory of a step", "reference", "ours"),
        ("UNETR, peak memory of a step", "monai_unetr", "our_unetr"),
    ):
        a, b = peak[peer] / 2**30, peak[mine] / 2**30
        lines.append(f"| {title} | {a:.2f} GiB | {b:.2f} GiB | {a / b:.1f} x |")
    bound, alone = result["limit"], result["encoder_forward_alone"]["ours"]["median_s"]
    lines.append(
        f"| encoder, share of the matrix products' own time ({bound['gflop']:.0f} GFLOP at "
        f"{bound['gflop_per_s']:.0f} GFLOP/s) | | {bound['matrix_products_s'] / alone:.2f} | |"
    )
    lines.append("")
    lines.append(
        f"Peer: `medim` 0.1.2 for the encoder, MONAI {result['monai']} for UNETR. "
        f"{running.machine(result)}; median of {result['runs']} runs in turn in one process."
    )
    return "\n".join(lines)


def main() -> None:
    """Measures, or prints what was measured."""
    parser = running.make_parser("encoder_speed", __doc__)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    running.run(arguments, lambda: measure(arguments.runs), {"encoder_speed": table})


if __name__ == "__main__":
    main()
