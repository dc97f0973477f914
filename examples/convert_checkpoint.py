"""Turn a training checkpoint into safetensors, check it, and build an encoder from it.

    python examples/convert_checkpoint.py [FILE.pth OUT.safetensors]

Without arguments it makes a checkpoint of its own, as a training run of the original code would,
pickled argument namespace included. For weights on the Hub, give their name instead of a file.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from sammed3d_backbone import cli, encoder
from sammed3d_backbone.loading.checkpoint import read
from sammed3d_backbone.loading.stored_sizes import variant_of


def make_checkpoint(path: Path) -> None:
    """Write a small network the way training runs do."""
    network = encoder("tiny", pretrained=False)
    content = {
        "model_state_dict": {f"image_encoder.{n}": t for n, t in network.state_dict().items()},
        "epoch": 1,
        "args": argparse.Namespace(lr=8e-4, task_name="example"),
    }
    torch.save(content, path)


def main(source: str, target: str) -> None:
    """Convert, verify, describe and load."""
    if cli.main(["convert", "--force", source, target]):
        raise SystemExit(2)
    if cli.main(["verify", target]):
        raise SystemExit(1)
    cli.main(["info", target])
    tensors, _ = read(target)
    variant = variant_of(tensors)
    if variant is None:
        raise SystemExit(f"{target} has the sizes of no known variant")
    network = encoder(variant, weights=target)
    print(network.load_report)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(Path(folder) / "run.pth")
            main(f"{folder}/run.pth", f"{folder}/run.safetensors")
