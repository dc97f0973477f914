"""The wheel works without the checkout."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKS = """
from pathlib import Path
from sammed3d_backbone import config, encoder
from sammed3d_backbone.recipes import finetune_unetr
assert encoder("tiny").pretrained_cfg.name == "tiny"
configs = Path(finetune_unetr.__file__).parent / "configs"
config.load(finetune_unetr.Config, configs / "own.yaml", ["data=."])
"""


def shipped():
    """Every file that has to be in the wheel."""
    kinds = {
        "sammed3d_backbone": ("**/*",),
        "recipes": (
            "*.py",
            "studies/*.py",
            "benchmarks/*.py",
            "README.md",
            "configs/**/*.*",
            "layouts/*.*",
            "accelerate/*.*",
        ),
        "weights": ("*.py", "*.md", "*.safetensors", "SHA256SUMS"),
    }
    return {
        Path("sammed3d_backbone", "" if folder == "sammed3d_backbone" else folder)
        .joinpath(path.relative_to(ROOT / folder))
        .as_posix()
        for folder, patterns in kinds.items()
        for pattern in patterns
        for path in (ROOT / folder).glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout, so that a build leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("checkout") / "sammed3d_backbone"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "runs"),
    )
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """The wheel, built from the source distribution as a package index would serve it."""
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, checkout)
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The interpreter of a new environment: our dependencies, and the package by pip."""
    prefix = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", prefix)
    python = prefix / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Only names these folders: Python does not read the .pth files in them, so an editable install
    # of the checkout that runs this test stays out of sight.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(libraries), encoding="utf-8")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel
    )
    return python


def test_what_the_package_imports_is_what_it_asks_pip_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"]
    names = ("cluster", "dicom", "itk", "nrrd", "onnx", "serve")
    optional = "\n".join(extras[name] for name in names)
    needed, allowed = (
        {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in part.split()}
        for part in (setup["options"]["install_requires"] + extras["peft"], optional)
    )
    imported = set()
    for path in (ROOT / "sammed3d_backbone").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    owners = packages_distributions()
    libraries = {owners[name][0] for name in imported & owners.keys() - {"sammed3d_backbone"}}
    found = {name.lower().replace("-", "_") for name in libraries}
    assert needed <= found <= needed | allowed


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == shipped()
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}


@pytest.mark.slow
def test_the_installed_package_works_outside_the_checkout(installed, tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    where = run(installed, "-c", "import sammed3d_backbone as s; print(s.__file__)", cwd=tmp_path)
    assert not Path(where).is_relative_to(ROOT)
    # The weights and the configuration lie in the package; the network is built from them.
    run(installed, "-c", WORKS, cwd=tmp_path, env=env)
    assert "info" in run(installed.parent / "sammed3d", "--help", cwd=tmp_path)
