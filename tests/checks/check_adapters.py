"""Checks of an encoder under an adapter, which tests/adapters/test_pairs.py runs on all pairs.

Encoders are this package's and two of MONAI's behind the contract, adapters the pyramids and the
networks that cards name.
"""

import runpy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool3d

from sammed3d_backbone import encoder
from sammed3d_backbone.adapters.contract import Encoder
from sammed3d_backbone.adapters.pyramid import KINDS, Pyramid, pyramid
from sammed3d_backbone.adapters.registry import ADAPTERS, accepted_options, adapter
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.inference.card import Card
from sammed3d_backbone.inference.segmenter import Segmenter
from sammed3d_backbone.loading.checkpoint import read, write
from sammed3d_backbone.training.freezing import set_frozen

HERE = Path(__file__).parent
CLASSES = 3
WIDTH = 4  # feature_size
CUBE, ODD_CUBE, ODD_BOX = (16, 16, 16), (24, 24, 24), (24, 16, 40)  # voxels


class SwinOnOneGrid(nn.Module):
    """The encoder of MONAI's SwinUNETR behind the contract: a map of each stage, at stride 8.

    Its stages lie at strides 4 to 32; finer ones are pooled, coarser ones repeated.
    """

    patch_size = 8
    embed_dim = out_chans = 24  # there is no neck: the final map is the last stage's

    def __init__(self, in_chans: int = 1, img_size: Sequence[int] = CUBE) -> None:
        super().__init__()
        self.in_chans, self.img_size = in_chans, tuple(img_size)
        swin = SwinUNETR(in_chans, 2, feature_size=12).swinViT
        self.patch_embed = swin.patch_embed
        self.stages = nn.ModuleList([*swin.layers1, *swin.layers2, *swin.layers3, *swin.layers4])
        self.to_maps = nn.ModuleDict(  # those that are read, by the stage's number
            {str(i): nn.Conv3d(24 * 2**i, self.embed_dim, 1) for i in range(len(self.stages))}
        )

    @property
    def depth(self) -> int:
        """Number of stages."""
        return len(self.stages)

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """The last map unless left out, and maps of stages, each (B, E, x, y, z)."""
        grid = [n // self.patch_size for n in self.img_size]
        maps, x = {}, self.patch_embed(x)
        for i, stage in enumerate(self.stages):
            x = stage(x.contiguous())
            if str(i) in self.to_maps:
                maps[i] = adaptive_avg_pool3d(self.to_maps[str(i)](x), grid)
        wanted = [maps[i] for i in (maps if indices is None else indices)]
        return wanted if intermediates_only else (maps[self.depth - 1], wanted)

    def prune_intermediate_layers(
        self, indices: Sequence[int], *, prune_norm: bool = False
    ) -> list[int]:
        """Drops the stages behind the last index and the layers of unread maps."""
        read = {*indices} if prune_norm else {*indices, self.depth - 1}
        del self.stages[max(read) + 1 :]
        for i in {*map(int, self.to_maps)} - read:
            del self.to_maps[str(i)]
        return list(indices)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages' blocks in the backward pass."""
        for stage in self.stages:
            for block in stage.blocks:
                block.use_checkpoint = enable

    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions."""
        return {name for name, _ in self.named_parameters() if "relative_position" in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Stages and the layers of their maps, by depth."""
        stages = [(r"^stages\.(\d+)", None), (r"^to_maps\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": r"^stages|^to_maps" if coarse else stages}


@dataclass(frozen=True)
class Source:
    """An encoder.

    Args:
        make: Builds it from channels and sides in voxels.
        odd_vox: Sides whose token grid is odd, and no cube where it takes boxes.
        channels: Of its row.
        described: How a card names it; None where no card can.
    """

    make: Callable[[int, Sequence[int]], Encoder]
    odd_vox: tuple[int, int, int]
    channels: int = 1
    described: dict[str, Any] | None = None


def tiny(rel_pos: str, in_chans: int, img_size: Sequence[int]) -> Encoder:
    """This package's small encoder with random initialisation."""
    return encoder("tiny", pretrained=False, rel_pos=rel_pos, in_chans=in_chans, img_size=img_size)


def described(rel_pos: str, channels: int = 1) -> dict[str, Any]:
    """The encoder's description on a card."""
    return {"variant": "tiny", "rel_pos": rel_pos, "in_chans": channels, "img_size": CUBE[0]}


monai_vit = runpy.run_path(str(HERE.parents[1] / "examples/use_your_own_encoder.py"))["MonaiViT"]
released, axial = (partial(tiny, rel_pos) for rel_pos in ("sammed3d", "axial"))
ENCODERS = {
    "tiny, released positions": Source(released, ODD_CUBE, 1, described("sammed3d")),
    "tiny, axial positions": Source(axial, ODD_BOX, 1, described("axial")),
    "tiny, 2 channels": Source(released, ODD_CUBE, 2, described("sammed3d", 2)),
    "MONAI's ViT": Source(monai_vit, ODD_BOX),
    "MONAI's SwinUNETR encoder": Source(SwinOnOneGrid, ODD_BOX),
}
PYRAMIDS = {f"pyramid, {kind}": kind for kind in KINDS}
NETWORKS = {name: accepted_options(name, feature_size=WIDTH) for name in ADAPTERS}


@dataclass(frozen=True)
class Pair:
    """An encoder under an adapter."""

    source: Source
    adapter: str

    def build(self, channels: int | None = None, img_size: Sequence[int] = CUBE) -> nn.Module:
        """The network with random initialisation."""
        made = self.source.make(channels or self.source.channels, img_size)
        if self.adapter in PYRAMIDS:
            return pyramid(made, PYRAMIDS[self.adapter], feature_size=WIDTH)
        return adapter(self.adapter)(made, CLASSES, **NETWORKS[self.adapter])

    def failed(self) -> list[str]:
        """Names of the failed checks."""
        return [name for name, check in CHECKS.items() if not check(self)]


def outputs(network: nn.Module) -> list[Tensor]:
    """The outputs for two random volumes of its size, as a list."""
    source = network.encoder
    generator = torch.Generator().manual_seed(0)
    out = network(torch.randn(2, source.in_chans, *source.img_size, generator=generator))
    return [out] if isinstance(out, Tensor) else list(out)


def has_promised_shapes(network: nn.Module) -> bool:
    """Logits of every voxel, or the maps that a pyramid declares."""
    size = network.encoder.img_size
    wanted = [(2, CLASSES, *size)]
    if isinstance(network, Pyramid):
        levels = zip(network.out_channels, network.strides, strict=True)
        wanted = [(2, width, *(n // stride for n in size)) for width, stride in levels]
    with torch.no_grad():
        return [tuple(out.shape) for out in outputs(network.eval())] == wanted


def learns_everywhere(pair: Pair) -> bool:
    """A step reaches every parameter."""
    network = pair.build().train()
    sum(out.square().mean() for out in outputs(network)).backward()
    return all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def stays_frozen(pair: Pair) -> bool:
    """A frozen encoder gets no gradient and stays in evaluation mode."""
    network = pair.build()
    set_frozen(network.encoder, True)
    sum(out.square().mean() for out in outputs(network.train())).backward()
    frozen = {id(module) for module in network.encoder.modules()}
    modes = all(module.training != (id(module) in frozen) for module in network.modules())
    held = {id(p) for p in network.encoder.parameters()}
    reached = all((p.grad is None) == (id(p) in held) for p in network.parameters())
    set_frozen(network.encoder, False)
    return modes and reached and all(module.training for module in network.modules())


def comes_back_from_a_file(pair: Pair) -> bool:
    """A saved network is restored from its card, or its tensors fit a new network."""
    network = pair.build().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        if pair.source.described is not None and pair.adapter in NETWORKS:
            Segmenter(network, card_of(pair)).save(path)
            back = Segmenter.from_pretrained(path).model
        else:
            write(path, network.state_dict(), {})
            back = pair.build().eval()
            back.load_state_dict(read(path)[0], strict=True)
    with torch.no_grad():
        return all(map(torch.equal, outputs(back), outputs(network)))


def card_of(pair: Pair) -> Card:
    """The card of a pair's network."""
    return Card(
        network=pair.adapter,
        encoder=pair.source.described or {},
        adapter=NETWORKS[pair.adapter],
        labels=dict(enumerate(("background", "head", "tail"))),
        channels=("MRI",) * pair.source.channels,
        preprocessing=Preprocessing(None, {"default": "zscore"}, "volume", (CUBE[0],) * 3),
    )


CHECKS: dict[str, Callable[[Pair], bool]] = {
    "shapes": lambda pair: has_promised_shapes(pair.build()),
    "gradient": learns_everywhere,
    "odd sizes": lambda pair: has_promised_shapes(pair.build(img_size=pair.source.odd_vox)),
    "3 channels": lambda pair: has_promised_shapes(pair.build(channels=3)),
    "freezing": stays_frozen,
    "file": comes_back_from_a_file,
}
