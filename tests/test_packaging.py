"""What pip installs works without the checkout, from a wheel and in place alike."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_EXAMPLE = README.split("```python\n")[1].split("```")[0]
SHIPPED = (
    {
        f"sammed3d_backbone/{path.relative_to(ROOT / 'sammed3d_backbone').as_posix()}"
        for path in (ROOT / "sammed3d_backbone").rglob("*")
        if path.suffix in (".py", ".html", ".json") or path.name == "py.typed"
    }
    | {f"sammed3d_backbone/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")}
    | {
        f"sammed3d_backbone/weights/{path.name}"
        for path in (ROOT / "weights").iterdir()
        if any(fnmatch(path.name, kind) for kind in ("*.py", "*.md", "*.safetensors", "SHA256SUMS"))
    }
)


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


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory):
    """The interpreter of a new environment: our dependencies, and the package by pip."""
    prefix = tmp_path_factory.mktemp(request.param)
    run(sys.executable, "-m", "venv", "--without-pip", prefix)
    python = prefix / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Only names this folder: Python does not read the .pth files in it, so an editable install
    # of the checkout that runs this test stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    if request.param == "wheel":
        run(*pip, request.getfixturevalue("wheel"))
    else:
        checkout = request.getfixturevalue("checkout")
        run(*pip, "--no-build-isolation", "--editable", checkout)
    return python


def test_what_the_package_imports_is_what_it_asks_pip_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    asked = {
        re.match(r"[\w-]+", line)[0].lower().replace("-", "_")
        for part in (setup["options"]["install_requires"], setup["options.extras_require"]["peft"])
        for line in part.split()
    }
    imported = set()
    for path in (ROOT / "sammed3d_backbone").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    owners = packages_distributions()
    libraries = {owners[name][0] for name in imported & owners.keys() - {"sammed3d_backbone"}}
    assert {name.lower().replace("-", "_") for name in libraries} == asked


def test_the_wheel_holds_every_module_and_every_shipped_weight(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == SHIPPED


def test_the_wheel_carries_licence_and_notice(wheel):
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
    assert {"LICENSE", "NOTICE"} <= names


def test_the_first_example_of_the_readme_runs_outside_the_checkout(installed, tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    where = run(installed, "-c", "import sammed3d_backbone as s; print(s.__file__)", cwd=tmp_path)
    assert not Path(where).is_relative_to(ROOT)
    run(installed, "-c", FIRST_EXAMPLE, cwd=tmp_path, env=env)


def test_the_shipped_weights_are_found_in_the_installed_package(installed, tmp_path):
    code = "from importlib.resources import files; print(*[p.name for p in files(NAME).iterdir()])"
    found = run(installed, "-c", code.replace("NAME", "'sammed3d_backbone.weights'"), cwd=tmp_path)
    expected = {Path(name).name for name in SHIPPED if name.split("/")[1] == "weights"}
    assert expected <= set(found.split())


def test_the_command_is_installed(installed, tmp_path):
    assert "info" in run(installed.parent / "sammed3d", "--help", cwd=tmp_path)
