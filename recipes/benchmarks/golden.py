"""Writes what `sammed3d selftest` compares with: the reference's outputs, computed in float64.

    python recipes/benchmarks/golden.py   # or: make golden

The networks and inputs are those of `sammed3d_backbone.selftest`; the reference is the PyPI package
`medim`. Prints how far the new values are from the committed ones.
"""

import json
from importlib import metadata
from pathlib import Path

import torch
from sammed3d_backbone.recipes.benchmarks import parity
from torch import nn

from sammed3d_backbone import selftest
from sammed3d_backbone.loading.variants import Variant

OWN = ("point_pos", "high_resolution")  # options that the reference does not have
FILE = Path(selftest.__file__).with_name(selftest.GOLDEN)


def reference(sizes: Variant) -> nn.Module:
    """The reference's parts with the selftest's values, in float64."""
    decoder = {name: value for name, value in vars(sizes.decoder).items() if name not in OWN}
    parts = nn.ModuleDict(
        {
            "image_encoder": parity.reference_encoder(**sizes.encoder_sizes()),
            **parity.reference_decoder(
                embed_dim=sizes.out_chans,
                side=sizes.img_size,
                grid=sizes.img_size // sizes.patch_size,
                **decoder,
            ),
        }
    )
    parts.load_state_dict(selftest.network_of(sizes).state_dict(), strict=True)
    return parts.double()


def golden(sizes: Variant) -> dict[str, list[float]]:
    """The samples of every output of the reference."""
    found = selftest.outputs(reference(sizes), sizes, torch.float64)
    return {
        name: [float(f"{value:.8e}") for value in selftest.samples(name, tensor).tolist()]
        for name, tensor in found.items()
    }


def main() -> None:
    """Computes all cases, says how they differ from the committed ones, and writes them."""
    before = json.loads(FILE.read_text())["cases"] if FILE.exists() else {}
    cases = {name: golden(sizes) for name, sizes in selftest.CASES.items()}
    for case, tensors in cases.items():
        for name, values in tensors.items():
            earlier = before.get(case, {}).get(name)
            if earlier is None:
                print(f"{case}: {name}: new")
                continue
            now, then = torch.tensor(values), torch.tensor(earlier)
            print(f"{case}: {name}: {((now - then).norm() / then.norm()).item():.1e}")
    source = f"medim {metadata.version('medim')}, float64"
    FILE.write_text(json.dumps({"source": source, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
