"""A checkout works without an install, and names missing dependencies."""

import os
import subprocess
import sys

import pytest

BLOCK = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path = [Finder(), *(f for f in sys.meta_path if "editable" not in repr(f))]
"""


def run(root, tmp_path, code, *, blocked=()):
    """Runs code outside the checkout, which is on the path but not installed."""
    return subprocess.run(
        [sys.executable, "-c", f"BLOCKED = {blocked!r}{BLOCK}{code}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_weights_are_found_beside_the_package_and_by_torch_hub(root, tmp_path):
    code = (
        "import sammed3d_backbone, torch\n"
        "print(sammed3d_backbone.encoder('tiny').pretrained_cfg.name)\n"
        f"hub = torch.hub.load({str(root)!r}, 'sammed3d_encoder', 'tiny', source='local')\n"
        f"sam = torch.hub.load({str(root)!r}, 'sammed3d_sam', 'tiny', source='local')\n"
        "print(hub.load_report.missing, type(sam).__name__)\n"
    )
    done = run(root, tmp_path, code)
    assert done.stdout.split("\n")[:2] == ["tiny", "() Sam3D"], done.stderr


def test_a_missing_dependency_is_named(root, tmp_path):
    done = run(root, tmp_path, "from sammed3d_backbone import encoder", blocked=("torch",))
    assert "needs 'torch'" in done.stderr
    assert "pip install" in done.stderr
