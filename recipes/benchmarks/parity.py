"""How far encoder, prompts and mask decoder are from the reference: values and every gradient.

    python recipes/benchmarks/parity.py                 # measures, writes parity.json
    python recipes/benchmarks/parity.py --only prompts  # one part anew
    python recipes/benchmarks/parity.py --table         # renews the tables of README.md

Both networks get the same random weights (tables, biases and the position table too: they start
at zero, where half of what is compared would vanish) and the same random volumes. The reference
is the PyPI package `medim`. A figure is the relative L2 error of a tensor; a row shows the worst
tensor of its kind. Biases of query, key and value are compared as one tensor, because the gradient
of the key's is zero in theory.

Prompts are drawn anew for every set: 1 to 3 of them on one image or on one each, 0 to 20 points of
either label or none, with a mask of zeros, of logits, or none. In float32 a few sets put the input
of a ReLU within rounding of zero, where its derivative jumps: there gradients of parameters differ
by as much as one hidden unit does. The same sets in float64 have no such difference.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from medim.models.sam_med3d import (
    ImageEncoderViT3D,
    MaskDecoder3D,
    PromptEncoder3D,
    TwoWayTransformer3D,
)
from sammed3d_backbone.recipes.benchmarks import running
from torch import Tensor, nn

from sammed3d_backbone.models.image_encoder import ImageEncoder3D, resample_pos_embed
from sammed3d_backbone.models.sam import Sam3D
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
    global_attn_indexes: tuple[int, ...] = (1, 3)
    out_chans: int = 32


VIT_B = {
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "global_attn_indexes": (2, 5, 8, 11),
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


@dataclass(frozen=True)
class PromptCase:
    """A prompt encoder and mask decoder, and how many sets of prompts they get."""

    dtype: torch.dtype
    sets: int
    embed_dim: int = 384
    side: int = 128  # voxels of the input cube
    grid: int = 8
    num_heads: int = 8
    mlp_dim: int = 2048
    iou_head_hidden_dim: int = 256
    mask_in_chans: int = 16


PROMPT_CASES = (PromptCase(torch.float32, sets=200), PromptCase(torch.float64, sets=200))


def reference_encoder(*, global_attn_indexes: Sequence[int], **sizes: float) -> nn.Module:
    """The reference's image encoder of our sizes."""
    return ImageEncoderViT3D(
        **sizes,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=global_attn_indexes,
    )


def reference_decoder(
    *,
    embed_dim: int,
    side: int,
    grid: int,
    mask_in_chans: int,
    num_heads: int,
    mlp_dim: int,
    iou_head_hidden_dim: int,
) -> dict[str, nn.Module]:
    """The reference's prompt encoder and mask decoder of our sizes, by the names of their parts."""
    prompts = PromptEncoder3D(
        embed_dim=embed_dim,
        image_embedding_size=(grid,) * 3,
        input_image_size=(side,) * 3,
        mask_in_chans=mask_in_chans,
    )
    # The reference makes float32 places, whatever its weights; these are exact in float32.
    code, encode = prompts.pe_layer, prompts.pe_layer._pe_encoding
    code._pe_encoding = lambda places: encode(
        places.to(code.positional_encoding_gaussian_matrix.dtype)
    )
    decoder = MaskDecoder3D(transformer_dim=embed_dim, iou_head_hidden_dim=iou_head_hidden_dim)
    decoder.transformer = TwoWayTransformer3D(
        depth=2, embedding_dim=embed_dim, num_heads=num_heads, mlp_dim=mlp_dim
    )
    return {"prompt_encoder": prompts, "mask_decoder": decoder}


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
    reference = reference_encoder(**sizes, global_attn_indexes=case.global_attn_indexes)
    reference = reference.to(case.dtype)
    for name, parameter in reference.named_parameters():
        if "pos" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    ours = ImageEncoder3D(**sizes, global_attn_indexes=case.global_attn_indexes).to(case.dtype)
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
    want, got = (
        _run(network, volume, generator.manual_seed(seed + 2)) for network in (reference, ours)
    )
    return worst_errors([(want, got)])


def worst_errors(pairs: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> dict:
    """Worst relative L2 error of each kind of tensor; the kind is its name up to a colon."""
    worst: dict[str, float] = {}
    for want, got in pairs:
        if want.keys() != got.keys():
            raise ValueError(f"tensors differ: {sorted(want.keys() ^ got.keys())}")
        for name, value in want.items():
            kind = name.partition(":")[0]
            worst[kind] = max(worst.get(kind, 0.0), relative_error(got[name], value))
    return worst


def relative_error(got: Tensor, want: Tensor) -> float:
    """L2 norm of the difference over that of the wanted tensor, computed in float64."""
    want = want.double()
    error = (got.double() - want).norm()
    return (error / want.norm()).item() if error else 0.0  # where both are zero or empty, too


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


def prompt_pair(case: PromptCase, seed: int) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Prompt encoder and mask decoder of the reference and ours, with the same random weights."""
    torch.manual_seed(seed)
    decoder = {
        "mask_in_chans": case.mask_in_chans,
        "num_heads": case.num_heads,
        "mlp_dim": case.mlp_dim,
        "iou_head_hidden_dim": case.iou_head_hidden_dim,
    }
    reference = nn.ModuleDict(
        reference_decoder(embed_dim=case.embed_dim, side=case.side, grid=case.grid, **decoder)
    )
    for name, parameter in reference.named_parameters():
        if name.endswith("bias") or parameter.ndim == 1:  # norms' gains too
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn_like(parameter))
    # Only the sizes of our encoder are used here.
    part = ImageEncoder3D(
        img_size=case.side,
        patch_size=case.side // case.grid,
        embed_dim=1,
        depth=0,
        num_heads=1,
        global_attn_indexes=(),
        out_chans=case.embed_dim,
    )
    network = Sam3D.around(part, **decoder, point_pos="swapped")
    ours = nn.ModuleDict({name: network.get_submodule(name) for name in reference})
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference.to(case.dtype), ours.to(case.dtype)


def compare_prompts(case: PromptCase, seed: int = 0) -> dict[str, float]:
    """Worst relative L2 error of each kind of tensor over all sets of prompts."""
    reference, ours = prompt_pair(case, seed)
    drawn = (
        _drawn(case, torch.Generator().manual_seed(seed + 1 + index)) for index in range(case.sets)
    )
    return worst_errors(
        (_run_prompts(reference, prompts), _run_prompts(ours, prompts)) for prompts in drawn
    )


@dataclass(frozen=True)
class Prompts:
    """One or several image embeddings and their prompts."""

    embedding: Tensor
    points: tuple[Tensor, Tensor] | None
    masks: Tensor | None
    projections: tuple[Tensor, ...]  # random projections of all outputs onto one number


def _drawn(case: PromptCase, generator: torch.Generator) -> Prompts:
    """A random set of prompts on random image embeddings."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=case.dtype)

    prompts, count, side = 1 + below(3), below(21), 4 * case.grid
    images = prompts if below(2) else 1
    points = None
    if below(10):
        coords = torch.randint(case.side, (prompts, count, 3), generator=generator)
        labels = torch.randint(2, (prompts, count), generator=generator)
        points = coords.to(case.dtype), labels
    masks = [None, torch.zeros(prompts, 1, side, side, side, dtype=case.dtype)][min(below(3), 1)]
    if masks is not None and below(2):
        masks = 4 * normal(*masks.shape)
    if points is None and masks is None:
        prompts = 1  # the reference's output without any prompt
        images = 1
    shapes = [(prompts, n, *size) for n in (1, 3) for size in ((side,) * 3, ())]
    return Prompts(
        embedding=normal(images, case.embed_dim, *(case.grid,) * 3),
        points=points,
        masks=masks,
        projections=tuple(normal(*shape) for shape in shapes),
    )


def _run_prompts(network: nn.ModuleDict, prompts: Prompts) -> dict[str, Tensor]:
    """Embeddings, masks and qualities, and the gradients of a random projection of all of them."""
    network.zero_grad()
    encoder, decoder = network["prompt_encoder"], network["mask_decoder"]
    embedding = prompts.embedding.clone().requires_grad_()
    masks = None if prompts.masks is None else prompts.masks.clone().requires_grad_()
    code = encoder.get_dense_pe()
    sparse, dense = encoder(points=prompts.points, boxes=None, masks=masks)
    outputs = [
        output
        for several in (False, True)
        for output in decoder(embedding, code, sparse, dense, multimask_output=several)
    ]
    torch.stack(
        [(o * p).sum() for o, p in zip(outputs, prompts.projections, strict=True)]
    ).sum().backward()
    kinds = ("mask 0", "quality:0", "masks 1-3", "quality:1-3")
    found = {
        "position code": code.detach(),
        "sparse": sparse.detach(),
        "dense": dense.detach(),
        **{kind: output.detach() for kind, output in zip(kinds, outputs, strict=True)},
        "input gradient:embedding": embedding.grad,
    }
    if masks is not None:
        found["input gradient:masks"] = masks.grad
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in network.named_parameters()
    }
    for name, gradient in gradients.items():
        if name.endswith("k_proj.bias"):
            stem = name.removesuffix("k_proj.bias")
            parts = (gradients[f"{stem}{part}_proj.bias"] for part in "qv")
            gradient = torch.cat([gradient, *parts])
        elif name.endswith(("q_proj.bias", "v_proj.bias")):
            continue
        found[f"parameter gradient:{name}"] = gradient
    return found


def table(result: dict) -> str:
    """The README's table of the encoder as Markdown."""
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
    return "\n".join([*lines, "", running.machine(result) + "."])


PROMPT_KINDS = (
    "position code",
    "sparse",
    "dense",
    "mask 0",
    "masks 1-3",
    "quality",
    "input gradient",
    "parameter gradient",
)


def prompt_table(result: dict) -> str:
    """The README's table of prompts and masks as Markdown."""
    kinds = " | ".join(f"{kind}s" if "gradient" in kind else kind for kind in PROMPT_KINDS)
    lines = [f"| prompt sets | precision | {kinds} |", "|---" * (2 + len(PROMPT_KINDS)) + "|"]
    for row in result["prompts"]["rows"]:
        errors = " | ".join(f"{row[kind]:.1e}" for kind in PROMPT_KINDS)
        lines.append(f"| {row['sets']} | {row['dtype']} | {errors} |")
    return "\n".join([*lines, "", running.machine(result["prompts"]) + "."])


def encoder_rows() -> list[dict]:
    """One row per case of the encoder."""
    return [
        {
            "side_vox": case.side,
            "grid": case.side // 16,
            "embed_dim": case.embed_dim,
            "depth": case.depth,
            "batch": case.batch,
            "dtype": _name_of(case.dtype),
            **compare(case),
        }
        for case in CASES
    ]


def prompt_rows() -> list[dict]:
    """One row per case of the prompts."""
    return [
        {
            "sets": case.sets,
            "embed_dim": case.embed_dim,
            "dtype": _name_of(case.dtype),
            **compare_prompts(case),
        }
        for case in PROMPT_CASES
    ]


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    """Measures the chosen parts, writes them with their provenance and prints the tables."""
    parser = running.make_parser("parity", __doc__)
    parser.add_argument("--only", choices=("encoder", "prompts"), help="measure one part anew")
    arguments = parser.parse_args()

    def measure() -> running.Result:
        out = arguments.out
        result = json.loads(out.read_text()) if out.exists() and arguments.only else {}
        if arguments.only != "prompts":
            result = {**result, "rows": encoder_rows(), **provenance(HERE)}
        if arguments.only != "encoder":
            result["prompts"] = {"rows": prompt_rows(), **provenance(HERE)}
        return result

    running.run(arguments, measure, {"parity": table, "parity_prompts": prompt_table})


if __name__ == "__main__":
    main()
