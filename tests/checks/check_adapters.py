"""Checks of an encoder under an adapter, which tests/adapters/test_pairs.py runs on all pairs.

Encoders are this package's and MONAI's ViT behind the contract, adapters the pyramids and the
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
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Source:
    """An encoder.

    Args:
        make: Builds it from channels and sides in voxels.
        odd_vox: Sides whose token grid is odd, and no cube where it takes boxes.
        channels: Number of channels in its row.
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
