"""Time from a file and clicks to masks, against the reference's own procedure, and peak memory.

    python recipes/benchmarks/click_speed.py          # measures, writes click_speed.json
    python recipes/benchmarks/click_speed.py --table  # renews the table of README.md

Both networks are of the size `vit_b` and have the same random weights, so the masks mean nothing
and the work is that of trained ones. All clicks lie in the middle of one window, and objects are
not followed beyond it. Every time runs from the path of the scan to masks on its own grid, in one
process, after imports and after building the networks; the two take turns.

`reference_mask` is what the reference's `medim_val_dataset.py` does for one class, written out on
`medim`. It needs the label, around which it crops, and encodes anew for every class. Resampling is
torch's, which is faster than the original's SimpleITK.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import nibabel.orientations as orientations
import numpy as np
import torch
import torch.nn.functional as F
from medim.models.sam_med3d import build_sam3D_vit_b_ori
from sammed3d_backbone.recipes.benchmarks import running
from torch import Tensor, nn
from tqdm import tqdm

from sammed3d_backbone import sam
from sammed3d_backbone.data.folders import DATA_VARIABLE, DEFAULT_DATA
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.inference.interactive.windows import Windows
from sammed3d_backbone.provenance import provenance, resident_bytes
from sammed3d_backbone.strategies import Draws, Errors, largest_centre

HERE = Path(__file__).parent
DATA = Path(os.environ.get(DATA_VARIABLE, DEFAULT_DATA)) / "singles/totalsegmentator"
SIDE, CELLS, SPACING_MM = 128, 32, 1.5
OBJECTS = 13
LATER_CLICKS = 10
LEAST_VOXELS = 27  # smallest structure that is clicked
LARGE = (512, 512, 800)  # voxels of the volume for peak memory
LARGE_MM = (0.8, 0.8, 0.7)

Clicks = dict[str, tuple[int, int, int]]  # label value -> voxel of the scan


# --- the reference -----------------------------------------------------------------------------


def reference() -> nn.Module:
    """The released implementation, as packaged in `medim`."""
    network: nn.Module = build_sam3D_vit_b_ori()
    return network.eval()


def reference_mask(network: nn.Module, scan: Path, labels: Path, value: int) -> np.ndarray:
    """One class of one scan the reference's way: load, resample, crop, encode, click, paste back.

    Returns:
        (X, Y, Z) bool on the scan's own grid.
    """
    image, label = _canonical(scan), _canonical(labels)
    label = (label == value).float()
    native = image.shape
    mm = nib.affines.voxel_sizes(nib.as_closest_canonical(nib.load(scan)).affine)
    shape = [max(1, round(n * s / SPACING_MM)) for n, s in zip(native, mm, strict=True)]
    image = F.interpolate(image[None, None], size=shape, mode="trilinear")[0, 0]
    label = F.interpolate(label[None, None], size=shape, mode="nearest")[0, 0]
    voxels = torch.nonzero(label)
    start = ((voxels.amin(0) + voxels.amax(0)) // 2 - SIDE // 2).tolist()
    crop, target = _cropped(image, start), _cropped(label, start)
    positive = crop[crop > 0]
    crop = (crop - positive.mean()) / positive.std()
    inside = torch.nonzero(target)
    click = inside[torch.randint(len(inside), (1,))]
    with torch.no_grad():
        embedding = network.image_encoder(crop[None, None])
        sparse, dense = network.prompt_encoder(
            points=(click[None].float(), torch.ones(1, 1)),
            boxes=None,
            masks=torch.zeros(1, 1, CELLS, CELLS, CELLS),
        )
        logits, _ = network.mask_decoder(
            image_embeddings=embedding,
            image_pe=network.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    found = F.interpolate(logits, size=(SIDE,) * 3, mode="trilinear")[0, 0].sigmoid() > 0.5
    whole = torch.zeros(shape, dtype=torch.uint8)
    _cropped(whole, start, paste=found.to(torch.uint8))
    back = F.interpolate(whole[None, None].float(), size=native, mode="nearest")[0, 0].numpy() > 0
    towards_ras = orientations.io_orientation(nib.load(scan).affine)
    ras = orientations.axcodes2ornt("RAS")
    return orientations.apply_orientation(back, orientations.ornt_transform(ras, towards_ras))


def _canonical(path: Path) -> Tensor:
    """A file's voxels with axes towards R, A, S."""
    image = nib.as_closest_canonical(nib.load(path))
    return torch.from_numpy(np.ascontiguousarray(image.get_fdata(dtype=np.float32)))


def _cropped(volume: Tensor, start: list[int], paste: Tensor | None = None) -> Tensor:
    """The cube at a place, zeros outside the volume; with `paste`, writes it there instead."""
    inner, outer = [], []
    for first, n in zip(start, volume.shape, strict=True):
        low, high = max(first, 0), max(min(first + SIDE, n), max(first, 0))
        outer.append(slice(low, high))
        inner.append(slice(low - first, high - first))
    if paste is not None:
        volume[tuple(outer)] = paste[tuple(inner)]
        return volume
    cube = volume.new_zeros(SIDE, SIDE, SIDE)
    cube[tuple(inner)] = volume[tuple(outer)]
    return cube


# --- ours --------------------------------------------------------------------------------------


def our_masks(predictor: Predictor, scan: Path, clicks: Clicks) -> dict[str, np.ndarray]:
    """Masks of clicked objects on the scan's own grid."""
    predictor.set_volume(scan, modality="ct")
    for name, click in clicks.items():
        predictor.click(click, object=name)
    return {name: predictor.predict(name).mask for name in clicks}


def clicks_in_one_window(scan: Path, labels: Path, wanted: int) -> Clicks:
    """Clicks on structures that reach the middle of one window, the one that holds most of them.

    The first click is the centre of the structure that places the window, the others are the centre
    of what lies in its middle half, where clicks are answered from that window.

    Raises:
        ValueError: If no window holds as many.
    """
    volume, label = Volume.load(scan), Volume.load(labels)
    masks = {str(int(v)): label.array == v for v in np.unique(label.array[label.array > 0])}
    windows = Windows(volume, SAM_MED3D, "ct")
    best: Clicks = {}
    for name, mask in masks.items():
        first = _centre(mask, label)
        middle = np.zeros_like(mask)
        start = windows.around(windows.grid_point(first), None)
        bounds = [np.add((SIDE // 4, 3 * SIDE // 4), s - 0.5) for s in start]
        box = [np.searchsorted(windows.grid_points(a), bounds[a]) for a in range(3)]
        windows.geometry.oriented(middle)[tuple(slice(*side) for side in box)] = True
        others = {other: m & middle for other, m in masks.items() if other != name}
        reached = {other: m for other, m in others.items() if m.sum() >= LEAST_VOXELS}
        if len(reached) >= len(best):
            best = {name: first, **{other: _centre(m, label) for other, m in reached.items()}}
    if len(best) < wanted:
        raise ValueError(f"no window of {scan} holds {wanted} structures, at most {len(best)}")
    return dict(list(best.items())[:wanted])


def _centre(mask: np.ndarray, volume: Volume) -> tuple[int, int, int]:
    click = largest_centre(Errors(mask, np.zeros_like(mask), volume.affine, Draws("centre")))
    assert click is not None  # no mask is empty
    return click.point_vox


# --- measuring ---------------------------------------------------------------------------------


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock seconds of an action."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(scan: Path, labels: Path, runs: int, runs_many: int) -> dict[str, object]:
    """All figures of the benchmark."""
    torch.manual_seed(0)
    theirs, ours = reference(), sam("vit_b", pretrained=False)
    ours.load_state_dict(theirs.state_dict())
    predictor = Predictor(ours, follow=False)
    clicks = clicks_in_one_window(scan, labels, OBJECTS)
    first = dict(list(clicks.items())[:1])

    def reference_of(some: Clicks) -> None:
        for value in some:
            reference_mask(theirs, scan, labels, int(value))

    result: dict[str, object] = {"scan": scan.name, "clicks": clicks}
    for title, some, count in (("one", first, runs), ("many", clicks, runs_many)):
        times: dict[str, list[float]] = {"reference": [], "ours": []}
        for number in tqdm(range(count + 1), desc=f"{len(some)} objects"):
            mine = seconds(lambda some=some: our_masks(predictor, scan, some))
            if number == 0:  # warm-up, not counted
                continue
            times["ours"].append(mine)
            times["reference"].append(seconds(lambda some=some: reference_of(some)))
        result[title] = {name: _with_median(values) for name, values in times.items()}
    result["later"] = _with_median(later_clicks(predictor, scan, next(iter(first.values()))))
    result["peak"] = {
        name: running.alone(measure_peak, name, scan, labels)
        for name in ("reference", "ours", "large")
    }
    return {**result, **provenance(HERE)}


def later_clicks(
    predictor: Predictor, scan: Path | Volume, point: tuple[int, int, int]
) -> list[float]:
    """Seconds of clicks after the first on one object, corrections of both kinds."""
    predictor.set_volume(scan, modality="ct")
    predictor.click(point)
    predictor.predict()
    times = []
    for number in range(LATER_CLICKS):
        i, j, k = point
        predictor.click((i + 1 + number % 5, j + 1 + number // 5, k), positive=number % 2 == 0)
        times.append(seconds(predictor.predict))
    return times


def measure_peak(name: str, scan: Path, labels: Path) -> dict[str, float]:
    """The highest resident size of this process in a procedure minus that before it.

    "reference" and "ours" work on the scan, "large" on a synthetic volume of 512 x 512 x 800 voxels
    that is in memory before; its times are returned as well.
    """
    torch.manual_seed(0)
    clicks = clicks_in_one_window(scan, labels, OBJECTS)
    value, point = next(iter(clicks.items()))
    network = reference() if name == "reference" else sam("vit_b", pretrained=False)
    if name == "large":
        i, j, k = (n // 2 for n in LARGE)
        scan_array = np.zeros(LARGE, dtype=np.int16)
        for plane in range(LARGE[0]):  # a ball in noise, a plane at a time
            noise = np.random.default_rng(plane).normal(0, 30, LARGE[1:])
            y, z = np.ogrid[: LARGE[1], : LARGE[2]]
            ball = (plane - i) ** 2 + (y - j) ** 2 + (z - k) ** 2 < 60**2
            scan_array[plane] = noise + np.where(ball, 200, -100)
        volume = Volume(scan_array, np.diag([*LARGE_MM, 1.0]))
        predictor = Predictor(network, follow=False)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident_bytes("VmRSS")
    found: dict[str, float] = {}
    if name == "reference":
        reference_mask(network, scan, labels, int(value))
    elif name == "ours":
        our_masks(Predictor(network, follow=False), scan, {value: point})
    else:
        found["set_volume_s"] = seconds(lambda: predictor.set_volume(volume, modality="ct"))
        predictor.click((i, j, k))
        found["first_s"] = seconds(predictor.predict)
        predictor.click((i + 3, j, k))
        found["later_s"] = seconds(predictor.predict)
    return {"bytes": resident_bytes("VmHWM") - before, **found}


def _with_median(values: list[float]) -> dict[str, object]:
    return {"median_s": statistics.median(values), "all_s": values}


def table(result: dict) -> str:
    """The README's table as Markdown."""
    one, many, later = result["one"], result["many"], result["later"]
    objects = len(result["clicks"])
    lines = [
        "| one CT torso, one click per object | reference | ours | ratio |",
        "|---|---|---|---|",
    ]
    for title, times in (("1 object", one), (f"{objects} objects", many)):
        a, b = times["reference"]["median_s"], times["ours"]["median_s"]
        what = f"{title}, from the file to masks on its grid"
        lines.append(f"| {what} | {a:.1f} s | {b:.2f} s | {a / b:.0f} x |")
    click, first = later["median_s"], one["ours"]["median_s"]
    lines.append(f"| a later click | | {1000 * click:.0f} ms, {click / first:.0%} of the first | |")
    peaks, mib = result["peak"], 2**20
    a, b = peaks["reference"]["bytes"], peaks["ours"]["bytes"]
    lines.append(
        f"| peak memory, 1 object | {a / mib:.0f} MiB | {b / mib:.0f} MiB | {a / b:.1f} x |"
    )
    large = peaks["large"]
    lines.append(
        f"| {' x '.join(map(str, LARGE))} voxels in memory: peak, first and later click | | "
        f"{large['bytes'] / mib:.0f} MiB, {large['set_volume_s'] + large['first_s']:.1f} s, "
        f"{1000 * large['later_s']:.0f} ms | |"
    )
    lines.append("")
    lines.append(
        f"Random weights of the size `vit_b`, one window of {SIDE}³ voxels, following off. "
        f"Reference: its procedure per class on `medim` 0.1.2. {running.machine(result)}; medians "
        "of runs in turn in one process."
    )
    return "\n".join(lines)


def main() -> None:
    """Measures, or prints what was measured."""
    parser = running.make_parser("click_speed", __doc__)
    parser.add_argument("--scan", type=Path, default=DATA / "ct_torso.nii.gz")
    parser.add_argument("--labels", type=Path, default=DATA / "ct_torso_seg.nii.gz")
    parser.add_argument("--runs", type=int, default=5, help="runs with one object")
    parser.add_argument("--runs-many", type=int, default=1, help=f"runs with {OBJECTS} objects")
    args = parser.parse_args()
    running.run(
        args,
        lambda: measure(args.scan, args.labels, args.runs, args.runs_many),
        {"click_speed": table},
    )


if __name__ == "__main__":
    main()
