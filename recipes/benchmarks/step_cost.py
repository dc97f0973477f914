"""Memory and time of a fine-tuning step of UNETR on `vit_b`.

    python recipes/benchmarks/step_cost.py             # measures, writes step_cost.json
    python recipes/benchmarks/step_cost.py --table     # renews the table in README.md

One 128-voxel cube, 14 classes, with and without recomputing blocks and bf16: each is a dry run of
finetune_unetr.py in a process of its own, so that no peak is another's.
"""

import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from sammed3d_backbone.recipes.benchmarks import running
from sammed3d_backbone.recipes.finetune_unetr import Config
from sammed3d_backbone.recipes.finetune_unetr import main as finetune
from tqdm import tqdm

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.provenance import provenance

HERE = Path(__file__).parent
SIDE = 128  # voxels
SPACING_MM = 1.5
CLASSES = 14
WAYS = {
    "float32": {},
    "float32, recomputed": {"checkpointing": True},
    "bf16": {"mixed_precision": "bf16"},
    "bf16, recomputed": {"checkpointing": True, "mixed_precision": "bf16"},
}


def write_cubes(folder: Path) -> None:
    """Two cases of noise with a box of every class, in the Decathlon's layout."""
    rng = np.random.default_rng(0)
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1])
    entries = []
    for number in range(2):
        labels = np.zeros((SIDE,) * 3, np.uint8)
        for value in range(1, CLASSES):
            corner = rng.integers(0, SIDE - 20, 3)
            labels[tuple(slice(c, c + 20) for c in corner)] = value
        labels.flat[: CLASSES - 1] = range(1, CLASSES)  # none was covered whole
        name = f"cube_{number}.nii.gz"
        noise = rng.normal(size=labels.shape).astype(np.float32)
        Volume(noise, affine).save(folder / "imagesTr" / name)
        Volume(labels, affine).save(folder / "labelsTr" / name)
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    names = {str(k): f"class {k}" if k else "background" for k in range(CLASSES)}
    info = {"name": "Cubes", "modality": {"0": "MRI"}, "labels": names, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(info))


def measure_one(way: str, data: str, threads: int) -> dict[str, object]:
    """The figures of a dry run in this process."""
    cfg = Config(
        name="cost",
        data=data,
        folds=2,
        variant="vit_b",
        scratch=True,
        crop_vox=SIDE,
        spacing_mm=(SPACING_MM,) * 3,
        batch=1,
        threads=threads,
        **WAYS[way],
    )
    return finetune(cfg, dry_run=True)


def measure(threads: int) -> dict[str, object]:
    """All figures, each way in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_cubes(Path(folder))
        found = {way: running.alone(measure_one, way, folder, threads) for way in tqdm(WAYS)}
    return {"side_vox": SIDE, "classes": CLASSES, "ways": found, **provenance(HERE)}


def table(result: dict) -> str:
    """The figures as Markdown."""
    first = result["ways"]["float32"]
    lines = [
        f"| UNETR on `vit_b`, {result['side_vox']}³ | time of a step | memory |",
        "|---|---|---|",
    ]
    for way, row in result["ways"].items():
        seconds = statistics.median(row["step_seconds"])
        share = seconds / statistics.median(first["step_seconds"])
        peak = row["peak_bytes"] / 2**30
        lines.append(f"| {way} | {seconds:.1f} s ({share:.2f} x) | {peak:.2f} GiB |")
    lines.append("")
    lines.append(
        f"{running.machine(result)}; median of three steps, AdamW and an average of the weights "
        "included, memory of the libraries not."
    )
    return "\n".join(lines)


def main() -> None:
    """Measures, or prints what was measured."""
    arguments = running.make_parser("step_cost", __doc__).parse_args()
    running.run(arguments, lambda: measure(arguments.threads), {"step_cost": table})


if __name__ == "__main__":
    main()
