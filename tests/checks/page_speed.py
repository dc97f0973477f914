"""How fast the page of `sammed3d view` is on the CT torso, and its picture for the documentation.

    python -m tests.checks.page_speed                        # -> results/page_speed.json
    python -m tests.checks.page_speed --picture FILE.png     # and the picture

Needs Debian's `chromium`. Seconds run from the key to the drawn mask, as the page reports them.
"""

import argparse
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
from playwright.sync_api import Page, expect, sync_playwright

from sammed3d_backbone import Volume, sam
from sammed3d_backbone.data.regions import depth_mm
from sammed3d_backbone.provenance import provenance
from sammed3d_backbone.serving.labelling import OpenScan
from tests.support.live_server import serving

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
FOLDER = Path(os.environ.get("SAMMED3D_DATA", ROOT / "../shared/data")) / "singles/totalsegmentator"
ORGANS = ("liver", "kidney_left", "kidney_right", "vertebrae_L3", "urinary_bladder")
PATIENCE_MS = 300_000
GO = """(mm) => {
  viewer.scene.crosshairPos = viewer.mm2frac(mm);
  viewer.createOnLocationChange();
  viewer.drawScene();
}"""


def points_mm() -> dict[str, list[float]]:
    """The innermost point of each organ, in mm."""
    labels = Volume.load(FOLDER / "ct_torso_seg.nii.gz")
    listed = json.loads((FOLDER / "labels.json").read_text(encoding="utf-8"))
    case = next(entry for entry in listed if entry["image"] == "ct_torso.nii.gz")
    values = {name: int(value) for value, name in case["labels"].items()}
    points = {}
    for name in ORGANS:
        depth = depth_mm(labels.array == values[name], labels.spacing_mm)
        voxel = np.unravel_index(depth.argmax(), depth.shape)
        points[name] = (labels.affine @ [*voxel, 1])[:3].tolist()
    return points


def click(page: Page, point_mm: list[float], key: str = "p") -> tuple[float, float]:
    """Seconds until the answer, and from there until it is drawn."""
    page.evaluate(GO, point_mm)
    page.keyboard.press(key)
    page.evaluate("() => sent")
    answered, drawn = re.findall(r"[\d.]+(?= s)", page.inner_text("#status"))
    return float(answered), float(drawn)


def measured(page: Page, address: str, points: dict[str, list[float]], *, follow: bool) -> dict:
    """Seconds of opening, of the first click, and of the clicks that follow."""
    began = time.perf_counter()
    page.goto(address)
    expect(page.locator("#status")).to_contain_text("Place", timeout=PATIENCE_MS)
    ready = time.perf_counter() - began
    page.locator("#follow").set_checked(follow)
    page.evaluate("() => sent")
    page.locator("#views").focus()
    liver = points["liver"]
    first = click(page, liver)
    moved = [[liver[0], liver[1] + n, liver[2]] for n in (6, -6, 12, -12, 18)]
    later = [click(page, point) for point in moved]
    page.keyboard.press("o")
    other = click(page, [liver[0] + 3, liver[1], liver[2]])
    return {
        "ready_s": round(ready, 2),
        "first_click_with_encoding_s": first,
        "later_clicks_s": [statistics.median(part) for part in zip(*later, strict=True)],
        "first_click_on_the_next_object_s": other,
    }


def draw(page: Page, address: str, points: dict[str, list[float]], target: Path) -> None:
    """The page after a click on each organ."""
    page.set_viewport_size({"width": 1200, "height": 760})
    page.goto(address)
    expect(page.locator("#status")).to_contain_text("Place", timeout=PATIENCE_MS)
    page.locator("#rendering").check()
    page.locator("#views").focus()
    for number, (name, point_mm) in enumerate(points.items(), start=1):
        if number > 1:
            page.locator("#views").press("o")
        page.get_by_label(f"Name of object {number}").fill(name.replace("_", " "))
        page.locator("#views").focus()
        click(page, point_mm)
    page.evaluate(GO, points["kidney_left"])
    page.wait_for_timeout(2000)
    page.screenshot(path=target)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    parser.add_argument("--out", type=Path, default=HERE / "results/page_speed.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    points = points_mm()
    scan = OpenScan.load(FOLDER / "ct_torso.nii.gz", modality="ct")
    hosts: set[str | None] = set()
    found: dict[str, object] = {"machine": provenance(ROOT)}
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)

        def new_page() -> Page:
            page = browser.new_page(viewport={"width": 1200, "height": 760})
            page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
            page.set_default_timeout(PATIENCE_MS)
            return page

        tiny = sam("tiny", weights="tiny")
        if args.picture is not None:
            with serving(tiny, scan, modality="ct") as address:
                draw(new_page(), address, points, args.picture)
        else:
            big = sam("vit_b", pretrained=False)
            for name, model, follow in (
                ("vit_b, random initialisation, following off", big, False),
                ("tiny, following on", tiny, True),
            ):
                with serving(model, scan, modality="ct") as address:
                    found[name] = measured(new_page(), address, points, follow=follow)
        browser.close()
    found["other_hosts_asked"] = len(hosts - {None, "127.0.0.1"})
    text = json.dumps(found, indent=1)
    print(text)
    if args.picture is None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
