"""Difference of exported encoders from their networks, by size, form of positions and format.

    python -m tests.checks.exports                # all sizes; writes results/exports.json
    python -m tests.checks.exports tiny nano      # these only; prints, and writes nothing

Every file is run on batches of 1 and 3, as `sammed3d export` runs it, which allows 1e-4 of the
largest output. Values that start at zero are random here, since nothing would show otherwise where
a term is exported wrongly.
"""

import gc
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from sammed3d_backbone import encoder, list_variants
from sammed3d_backbone.inference.export import SUFFIXES, TOLERANCE, export
from sammed3d_backbone.models.image_encoder import ImageEncoder3D
from sammed3d_backbone.provenance import provenance

HERE = Path(__file__).parent
RESULT = HERE / "results/exports.json"
FORMS = ("sammed3d", "axial")
NAMES = ("onnx", "onnxscript", "onnxruntime")


def network(variant: str, rel_pos: str) -> ImageEncoder3D:
    """An encoder of which no value is zero."""
    torch.manual_seed(0)
    made = encoder(variant, pretrained=False, rel_pos=rel_pos)
    for name, parameter in made.named_parameters():
        if "pos" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def measured(variant: str, rel_pos: str, folder: Path) -> dict[str, object]:
    """The differences of one encoder in all formats."""
    found: dict[str, object] = {"variant": variant, "rel_pos": rel_pos}
    for suffix in SUFFIXES:
        began, made = time.monotonic(), network(variant, rel_pos)
        difference = export(made, folder / f"encoder{suffix}", (1, *made.img_size), {})
        (folder / f"encoder{suffix}").unlink()
        found[suffix[1:]] = difference
        print(
            f"{variant:10} {rel_pos:9} {suffix:6} {difference:.1e}  "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        del made
        gc.collect()
    return found


def main(names: list[str]) -> bool:
    """Prints the differences; whether all are within what is allowed."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measured(name, form, Path(folder))
            for name in names or list_variants()
            for form in FORMS
        ]
    if not names:
        from importlib.metadata import version

        about = {**provenance(HERE), **{name: version(name) for name in NAMES}}
        result = {"allowed": TOLERANCE, "about": about, "encoders": rows}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return all(row[suffix[1:]] <= TOLERANCE for row in rows for suffix in SUFFIXES)


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
