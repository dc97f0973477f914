"""Compares this machine's outputs with the reference's, without weights and without medim.

The result is the relative error of every tensor of interest. The networks are filled from a stream
of random bits that is the same on every machine, and the reference's values are in
`golden.json`, which `recipes/benchmarks/golden.py` writes.
"""

import dataclasses
import importlib.resources
import json
import math
import zlib
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sammed3d_backbone.loading.variants import VARIANTS, DecoderSizes, Variant
from sammed3d_backbone.models.attention import Grid
from sammed3d_backbone.models.image_encoder import ImageEncoder3D
from sammed3d_backbone.models.layers import LayerNorm3d
from sammed3d_backbone.models.sam import Sam3D

GOLDEN = "golden.json"
SAMPLES = 64  # values of a tensor that are compared
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
TOLERANCE = 1e-5  # relative, in float32

# The second has all widths and all kinds of blocks of the released network.
CASES: dict[str, Variant] = {
    "small network": Variant(
        img_size=48,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        global_attn_indexes=(1,),
        window_size=4,
        out_chans=48,
        decoder=DecoderSizes(mask_in_chans=8, num_heads=4, mlp_dim=96, iou_head_hidden_dim=32),
    ),
    "3 blocks of vit_b": dataclasses.replace(VARIANTS["vit_b"], depth=3, global_attn_indexes=(2,)),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One compared tensor."""

    case: str
    tensor: str
    error: float

    @property
    def is_right(self) -> bool:
        """Whether the error is within the tolerance; False for NaN."""
        return self.error <= TOLERANCE


def run() -> Iterator[Check]:
    """Compares every tensor of every case with the reference's."""
    golden = json.loads(
        importlib.resources.files("sammed3d_backbone").joinpath(GOLDEN).read_text(encoding="utf-8")
    )
    for case, sizes in CASES.items():
        for name, found in outputs(network_of(sizes), sizes, torch.float32).items():
            want = torch.tensor(golden["cases"][case][name], dtype=torch.float64)
            error = (samples(name, found) - want).norm() / want.norm()
            yield Check(case, name, error.item())


def network_of(sizes: Variant) -> Sam3D:
    """A promptable network in which no value is zero, the same on every machine."""
    network = Sam3D.around(ImageEncoder3D(**sizes.encoder_sizes()), **vars(sizes.decoder))
    with torch.no_grad():
        for name, value in network.state_dict().items():
            noise = _noise(name, *value.shape)
            module = network.get_submodule(name.rpartition(".")[0])
            is_weight = name.endswith(".weight")
            if is_weight and isinstance(module, (nn.Linear, nn.Conv3d, nn.ConvTranspose3d)):
                noise *= value[0].numel() ** -0.5
            elif is_weight and isinstance(module, (nn.LayerNorm, LayerNorm3d)):
                noise = 1 + 0.5 * noise
            else:
                noise *= 0.5
            value.copy_(noise)
    return network.eval()


def outputs(network: nn.Module, sizes: Variant, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs of a promptable network for one volume, one click, and a second click."""
    side = sizes.img_size
    volume = _noise("volume", 1, 1, side, side, side).to(dtype)
    points = torch.from_numpy(_bits("points", 6) % side).view(1, 2, 3).to(dtype)
    labels = torch.tensor([[1, 0]])
    mask = torch.zeros(1, 1, *(4 * side // sizes.patch_size,) * 3, dtype=dtype)
    # The reference's modules are not typed.
    image_encoder, prompt_encoder, mask_decoder = (
        cast(Any, network.get_submodule(part)) for part in PARTS
    )
    with torch.no_grad():
        found = {"image embedding": image_encoder(volume)}
        found["position code"] = prompt_encoder.get_dense_pe()
        for click, count in (("first", 1), ("second", 2)):
            sparse, dense = prompt_encoder(
                points=(points[:, :count], labels[:, :count]), boxes=None, masks=mask
            )
            mask, quality = mask_decoder(
                found["image embedding"], found["position code"], sparse, dense
            )
            found[f"points of the {click} click"] = sparse
            found[f"mask prompt of the {click} click"] = dense
            found[f"mask after the {click} click"] = mask
            found[f"quality after the {click} click"] = quality
    return found


def samples(name: str, tensor: Tensor) -> Tensor:
    """Some values of a tensor, at places that depend on its name alone."""
    places = torch.from_numpy(_bits(f"samples of {name}", SAMPLES) % tensor.numel())
    return tensor.flatten()[places].double()


def phantom(shape_vox: Grid) -> Tensor:
    """A bright ball in noise, with mean 0 and deviation 1.

    Shapes:
        returns: (1, 1, X, Y, Z).
    """
    axes = [torch.linspace(-1, 1, n) for n in shape_vox]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)  # (X, Y, Z)
    volume = _noise("phantom", 1, 1, *shape_vox) + 3 * (radius < 0.4)
    normal: Tensor = (volume - volume.mean()) / volume.std()
    return normal


def _noise(name: str, *shape: int) -> Tensor:
    """Uniform numbers of mean 0 and deviation 1 that depend on a name alone."""
    halves = _bits(name, math.prod(shape)).astype(np.float32) * np.float32(2**-23) - 1
    return torch.from_numpy(halves * np.float32(math.sqrt(3))).view(shape)


def _bits(name: str, count: int) -> NDArray[np.int64]:
    """Random whole numbers below 2 ** 24, exact in float32, that depend on a name alone."""
    # NumPy promises that raw bits stay the same in all releases; it does so for no distribution.
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(count)
    bits: NDArray[np.int64] = (raw >> np.uint64(40)).astype(np.int64)
    return bits
