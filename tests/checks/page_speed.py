"""How fast the page of `sammed3d view` is on the CT torso, and its picture for the documentation.

    python -m tests.checks.page_speed                        # -> results/page_speed.json
    python -m tests.checks.page_speed --picture FILE.png     # and the picture

Needs Debian's `chromium`. Seconds run from the key to the drawn mask, as the page reports them.
"""

import argparse
import io
import json
import os
import re
import shutil
import statistics
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from sammed3d_backbone import Volume, sam
from sammed3d_backbone.data.regions import depth_mm
from sammed3d_backbone.inference.validation import validate_volume
from sammed3d_backbone.provenance import provenance
from sammed3d_backbone.serving.labelling import OpenScan
from tests.support.live_server import serving

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
FOLDER = Path(os.environ.get("SAMMED3D_DATA", ROOT / "../shared/data")) / "singles/totalsegmentator"
STORED = ("liver", "spleen", "kidney_left", "kidney_right", "aorta", "urinary_bladder")
CLICKED = "vertebrae_L3"
PARTS = ("answered", "then_drawn")
PATIENCE_MS = 300_000
REST_MS = 1500
GO = """(mm) => {
  viewer.scene.crosshairPos = viewer.mm2frac(mm);
  viewer.createOnLocationChange();
  viewer.drawScene();
}"""


def organs() -> tuple[Volume, dict[str, int]]:
    """The labels of the scan, and their values by name."""
    listed = json.loads((FOLDER / "labels.json").read_text(encoding="utf-8"))
    case = next(entry for entry in listed if entry["image"] == "ct_torso.nii.gz")
    values = {name: int(value) for value, name in case["labels"].items()}
    return Volume.load(FOLDER / "ct_torso_seg.nii.gz"), values


def middle_mm(labels: Volume, value: int) -> list[float]:
    """The innermost point of an organ, in mm."""
    depth = depth_mm(labels.array == value, labels.spacing_mm)
    voxel = np.unravel_index(depth.argmax(), depth.shape)
    return (labels.affine @ [*voxel, 1])[:3].tolist()


def click(page: Page, point_mm: list[float], key: str = "p") -> tuple[float, float]:
    """Seconds until the answer, and from there until it is drawn.

    The crosshair rests before the key is pressed, as when a person looks at where it is.
    """
    page.evaluate(GO, point_mm)
    page.wait_for_timeout(REST_MS)
    page.evaluate("drawn()")  # nobody clicks before the crosshair is there
    page.keyboard.press(key)
    page.evaluate("() => sent")
    answered, drawn = re.findall(r"[\d.]+(?= s)", page.inner_text("#status"))
    return float(answered), float(drawn)


def measured(page: Page, address: str, point_mm: list[float], *, follow: bool) -> dict:
    """Seconds of opening, of the first click, and of the clicks that follow."""
    began = time.perf_counter()
    page.goto(address)
    expect(page.locator("#status")).to_contain_text("Place", timeout=PATIENCE_MS)
    ready = time.perf_counter() - began
    page.locator("#follow").set_checked(follow)
    page.evaluate("() => sent")
    page.locator("#views").focus()
    first = click(page, point_mm)
    x, y, z = point_mm
    later = [click(page, [x, y + n, z]) for n in (6, -6, 12, -12, 18)]
    page.keyboard.press("o")
    other = click(page, [x + 3, y, z])
    return {
        "ready_s": round(ready, 2),
        "first_click_s": dict(zip(PARTS, first, strict=True)),
        "first_click_in_an_encoded_window_s": dict(zip(PARTS, other, strict=True)),
        "later_click_s": {
            part: statistics.median(times)
            for part, times in zip(PARTS, zip(*later, strict=True), strict=True)
        },
    }


def draw(page: Page, address: str, point_mm: list[float], target: Path) -> None:
    """The page with stored objects, and one that was clicked."""
    page.goto(address)
    expect(page.locator("#status")).to_contain_text("Place", timeout=PATIENCE_MS)
    page.locator("#views").press("o")
    for number, name in enumerate((*STORED, "spine"), start=1):
        page.get_by_label(f"Name of object {number}").fill(name.replace("_", " "))
    page.locator("#views").focus()
    x, y, z = point_mm
    for n in (0, 9, -9):
        click(page, [x + n, y, z])
    click(page, [x, y - 30, z], "n")
    page.evaluate(GO, point_mm)
    page.locator("#rendering").check()
    page.locator("#views").focus()
    page.evaluate("document.querySelector('aside').scrollTo(0, 0)")
    page.wait_for_timeout(2000)
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        picture.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    parser.add_argument("--out", type=Path, default=HERE / "results/page_speed.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    labels, values = organs()
    path = FOLDER / "ct_torso.nii.gz"
    hosts: set[str | None] = set()
    found: dict[str, object] = {"machine": provenance(ROOT), "load": os.getloadavg()[0]}
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)

        def new_page() -> Page:
            page = browser.new_page(viewport={"width": 1180, "height": 860})
            page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
            page.set_default_timeout(PATIENCE_MS)
            return page

        tiny = sam("tiny", weights="tiny")
        if args.picture is not None:
            stored = np.zeros(labels.shape, np.uint8)
            for number, name in enumerate(STORED, start=1):
                stored[labels.array == values[name]] = number
            scan = OpenScan(validate_volume(path), "ct_torso", modality="ct", labels=stored)
            with serving(tiny, scan, name="tiny") as address:
                draw(new_page(), address, middle_mm(labels, values[CLICKED]), args.picture)
        else:
            scan = OpenScan.load(path, modality="ct")
            for name, model, follow in (
                (
                    "vit_b, random initialisation, following off",
                    sam("vit_b", pretrained=False),
                    False,
                ),
                ("tiny, following on", tiny, True),
            ):
                with serving(model, scan) as address:
                    point_mm = middle_mm(labels, values["liver"])
                    found[name] = measured(new_page(), address, point_mm, follow=follow)
        browser.close()
    found["other_hosts_asked"] = len(hosts - {None, "127.0.0.1"})
    text = json.dumps(found, indent=1)
    print(text)
    if args.picture is None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
